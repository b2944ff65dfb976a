"""The demonstration models: small trained models that are part of the package.

The daemon loads them when MODEL_ID is empty: a StableDiffusion3Pipeline that draws coloured shapes,
and a Qwen2.5-VL that describes them, 10 MB together. README.md in this folder is their model card.
The folder `training` contains the code that trained them.
"""

from collections.abc import Mapping
from pathlib import Path

from generation_contracts import Task

# The best settings of these models; the defaults of their families are for large models.
DEFAULTS: Mapping[Task, Mapping[str, int | float | str]] = {
    Task.TEXT_TO_IMAGE: {"num_inference_steps": 16, "guidance_scale": 2.5},
    Task.IMAGE_TO_TEXT: {},
}


def folder_of(task: Task) -> Path:
    """Return the folder of a task's demonstration model."""
    return Path(__file__).with_name(str(task))
