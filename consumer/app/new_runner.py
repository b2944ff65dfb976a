"""`consumer new runner`: the files of a custom runner to begin with."""

from pathlib import Path
from string import Template

_RUNNER = Template('''"""A custom runner: `MODEL_RUNNER=$module:$name consumer run`."""

from PIL import ImageOps
from pydantic import Field

from generation_runner import Context, Image, Output, Parameters, Runner


class ${name}Parameters(Parameters):
    """What a request may set in `parameters`."""

    levels: int = Field(default=4, ge=1, le=8, description="bits of each channel that are kept")


class $name(Runner[${name}Parameters]):
    """Returns the input image with fewer colours. Replace it with your model."""

    parameters = ${name}Parameters
    min_images = max_images = 1
    name = "$queue"
    version = "0.1"

    def load(self, device: str) -> None:
        """Load the weights to the device: `cuda`, `mps` or `cpu`."""
        self._device = device

    def run(self, parameters: ${name}Parameters, context: Context) -> Output:
        """Process one request. `context.step` reports progress, and ends a cancelled run."""
        context.step(0, 1)
        image = ImageOps.posterize(context.images[0], parameters.levels)
        context.step(1, 1)
        return Image(image)
''')

_TEST = Template('''"""Tests of $module.py, without a worker: `pytest test_$module.py`."""

import pytest
from PIL import Image as PillowImage

from generation_runner import Cancelled, Image
from generation_runner.testing import RecordedContext
from $module import $name, ${name}Parameters


def test_an_image_is_processed() -> None:
    runner = $name()
    runner.load("cpu")
    context = RecordedContext([PillowImage.new("RGB", (8, 8), (255, 130, 3))])
    output = runner.run(${name}Parameters(levels=1), context)
    assert isinstance(output, Image)
    assert output.image.getpixel((0, 0)) == (128, 128, 0)
    assert context.steps[-1] == (1, 1)
    runner.close()


def test_a_cancelled_run_ends_at_its_next_step() -> None:
    context = RecordedContext([PillowImage.new("RGB", (8, 8))], cancel_at=0)
    with pytest.raises(Cancelled):
        $name().run(${name}Parameters(), context)
''')


class NameTaken(Exception):  # noqa: N818 - a state of the folder
    """A file with this name exists. The text is for people."""


def write_runner(module: str, folder: Path) -> tuple[Path, Path]:
    """Write a runner and its test.

    Args:
        module: Name of the module, in lower case with underscores.
        folder: Where the files are written.

    Returns:
        The file of the runner, and the file of its test.

    Raises:
        NameTaken: One of the files exists; nothing was written.
        OSError: A file cannot be written.
    """
    values = {
        "module": module,
        "name": module.title().replace("_", ""),
        "queue": module.replace("_", "-"),
    }
    files = folder / f"{module}.py", folder / f"test_{module}.py"
    for file in files:
        if file.exists():
            raise NameTaken(f"{file.name} exists already")
    for file, template in zip(files, (_RUNNER, _TEST), strict=True):
        file.write_text(template.substitute(values), encoding="utf-8")
    return files
