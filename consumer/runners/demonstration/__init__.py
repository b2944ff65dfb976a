"""The demonstration models: small trained models that are part of the package.

The daemon loads them when MODEL_ID is empty: a StableDiffusion3Pipeline that draws coloured shapes,
and a Qwen2.5-VL that describes them, 10 MB together. README.md in this folder is their model card.
The folder `training` contains the code that trained them.
"""

from pathlib import Path

from generation_contracts import Task


def folder_of(task: Task) -> Path:
    """Return the folder of a task's demonstration model."""
    return Path(__file__).with_name(str(task))
