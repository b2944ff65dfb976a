"""The demonstration models: small, trained, shipped with the package.

What is loaded when MODEL_ID is empty: a real StableDiffusion3Pipeline that draws coloured shapes,
and a real Qwen2.5-VL that describes them, 10 MB together. README.md in this folder is their model
card; `training` is how they were made.
"""

from collections.abc import Mapping
from pathlib import Path

from generation_contracts import Task

# What they do best; the defaults of the large models of their families are made for those.
DEFAULTS: Mapping[Task, Mapping[str, int | float | str]] = {
    Task.TEXT_TO_IMAGE: {"num_inference_steps": 16, "guidance_scale": 2.5},
    Task.IMAGE_TO_TEXT: {},
}


def folder_of(task: Task) -> Path:
    """Where the demonstration model of a task is."""
    return Path(__file__).with_name(str(task))
