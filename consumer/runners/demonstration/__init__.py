"""The demonstration models: tiny, made from code, saved as a folder that the usual path loads.

What is loaded when MODEL_ID is empty: a real StableDiffusion3Pipeline and a real Qwen2.5-VL, each
a few hundred thousand parameters. Their weights are RANDOM until trained ones come with the
package: the picture is noise and the text is gibberish, but every part of the daemon works on them
as it does on FLUX.1, without a network, in well under a second on two CPU cores. The seed is fixed:
the same request gives the same noise everywhere.
"""

import importlib
from pathlib import Path

import torch

from generation_contracts import Task

WEIGHTS_SEED = 20_260_101

_MODULES = {
    Task.TEXT_TO_IMAGE: "consumer.runners.demonstration.pictures",
    Task.IMAGE_TO_TEXT: "consumer.runners.demonstration.texts",
}


def build(task: Task, folder: Path) -> None:
    """Make the demonstration model of a task and save it in a folder.

    The global random generator is left as it was.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(WEIGHTS_SEED)
        importlib.import_module(_MODULES[task]).save(folder)
