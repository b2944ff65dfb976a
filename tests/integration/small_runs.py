"""Small runs of loaded models and refusals to load them, for the tests of options."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from consumer.ports.model import ModelUnavailable
from consumer.runners import ModelConfig, ModelRunner, create_runner
from generation_contracts import ImageToTextRequest, Task, TextToImageRequest
from tests.support.model_runs import run_model

SMALL = {"width": 64, "height": 64}  # pixels


def refusal(folder: Path | str, task: Task = Task.TEXT_TO_IMAGE, **given: Any) -> str:
    """The one line with which a model is not loaded."""
    runner = create_runner(task, ModelConfig(**{"model_id": str(folder), **given}))
    with pytest.raises(ModelUnavailable) as refused:
        runner.load()
    assert "\n" not in str(refused.value)
    assert refused.value.__cause__ is None
    return str(refused.value)


def pipeline(runner: ModelRunner) -> Any:
    model: Any = runner._model
    return model._pipe


def made(runner: ModelRunner, **fields: Any) -> Image.Image:
    """A small image in four steps."""
    asked = {"prompt": "a cat", **SMALL, "num_inference_steps": 4, "seed": 7, **fields}
    request = TextToImageRequest(**asked)
    output = run_model(runner, request, [])
    return output.images[0].image


def written(runner: ModelRunner) -> str:
    """A greedy text of a few tokens about a red image."""
    request = ImageToTextRequest(
        prompt="What?", images=("s3://bucket/key.png",), max_new_tokens=6, temperature=0
    )
    image = Image.new("RGB", (56, 56), "red")
    output = run_model(runner, request, [image])
    assert output.text is not None
    return output.text.text


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    bands: Any = ImageChops.difference(one, other).getextrema()
    return max(int(high) for _, high in bands)
