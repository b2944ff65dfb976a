"""Small runs of loaded models, and the errors of models that do not load."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from consumer.ports.model import ModelMisconfigured, ModelUnavailable
from consumer.runners import ModelConfig, ModelRunner, create_runner
from generation_contracts import ImageToTextRequest, Task, TextToImageRequest
from tests.support.model_runs import run_model

SMALL = {"width": 64, "height": 64}  # pixels


def load_error(folder: Path | str, task: Task = Task.TEXT_TO_IMAGE, **options: Any) -> str:
    """Load a model, which must fail; return the error.

    It is one line without the path of the folder, unless the folder is a wrong setting.
    """
    runner = create_runner(task, ModelConfig(**{"model_id": str(folder), **options}))
    with pytest.raises(ModelUnavailable) as refused:
        runner.load()
    line = str(refused.value)
    assert "\n" not in line
    assert refused.value.__cause__ is None
    if isinstance(folder, Path) and not isinstance(refused.value, ModelMisconfigured):
        assert str(folder.parent) not in line
    return line


def pipeline(runner: ModelRunner) -> Any:
    model: Any = runner._model
    return model._pipe


def generate_image(runner: ModelRunner, **fields: Any) -> Image.Image:
    """Generate an image of 64x64 pixels in four steps."""
    values = {"prompt": "a cat", **SMALL, "num_inference_steps": 4, "seed": 7, **fields}
    request = TextToImageRequest(**values)
    output = run_model(runner, request, [])
    return output.images[0].image


def generate_text(runner: ModelRunner) -> str:
    """Generate a greedy text of six tokens about a red image."""
    request = ImageToTextRequest(
        prompt="What?", images=("s3://bucket/key.png",), max_new_tokens=6, temperature=0
    )
    image = Image.new("RGB", (56, 56), "red")
    output = run_model(runner, request, [image])
    assert output.text is not None
    return output.text.text


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    """Return the largest difference of two images' values, of 255."""
    bands: Any = ImageChops.difference(one, other).getextrema()
    return max(int(high) for _, high in bands)
