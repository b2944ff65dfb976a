"""Options for memory and speed that are refused before anything is loaded.

`setting_errors` has the checks that need no library, `pipeline_options` checks what a loaded
pipeline supports, and `first_run` checks that it runs.
"""

from collections.abc import Iterator

import torch

from consumer.ports.model import ModelMisconfigured
from consumer.runners import quantization
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement
from consumer.runners.setting_errors import combination_errors, in_use
from generation_contracts import Task

# Options that only a run validates: a kernel may not support the device, a family not the cache.
_NEEDING_PROBE = ("quantization", "attention", "step_cache", "compile", "device_map", "warm_up")

_MIN_GPUS = 2  # to distribute parts over


def validate_options(task: Task, config: ModelConfig, placement: Placement) -> None:
    """Refuse settings that contradict each other, the task or this machine.

    Raises:
        ModelMisconfigured: The message is one line that begins with the names of the settings.
    """
    for line in _refusals(task, config, placement):
        raise ModelMisconfigured(line)
    quantization.require_quantization(config, placement)


def options_needing_probe(config: ModelConfig) -> tuple[str, ...]:
    """Return the settings in use that a probe run must validate."""
    return in_use(config, _NEEDING_PROBE)


def _refusals(task: Task, config: ModelConfig, placement: Placement) -> Iterator[str]:
    yield from combination_errors(task, config)
    if config.device_map == "none":
        return
    if placement.device.type != "cuda":
        yield f"MODEL_DEVICE_MAP: needs the device cuda, this one is {placement.device.type}"
    elif torch.cuda.device_count() < _MIN_GPUS:
        yield f"MODEL_DEVICE_MAP: needs {_MIN_GPUS} GPUs, there is {torch.cuda.device_count()}"
