"""Options for memory and speed: which combinations are refused before anything is loaded.

`pipeline_options` checks what a loaded pipeline supports, and `first_run` checks that it runs.
"""

from collections.abc import Iterable, Iterator

import torch

from consumer.ports.model import ModelUnavailable
from consumer.runners import quantization
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement
from generation_contracts import Task

# Fields of the configuration that apply to only one task.
_FOR_IMAGES = (
    "vae_tiling",
    "vae_slicing",
    "channels_last",
    "step_cache",
    "adapters",
    "safety_checker",
)
_FOR_TEXTS = ("max_image_pixels",)

# Options that only a run validates: a kernel may not support the device, a family not the cache.
_NEEDING_PROBE = ("quantization", "attention", "step_cache", "compile", "device_map", "warm_up")

_BY_LAYERS = {"sequential", "group"}  # offload modes that move single layers
_MIN_GPUS = 2  # to distribute parts over


def validate_options(task: Task, config: ModelConfig, placement: Placement) -> None:
    """Refuse settings that contradict each other, the task or this machine.

    Raises:
        ModelUnavailable: The message is one line that begins with the names of the settings.
    """
    for line in _refusals(task, config, placement):
        raise ModelUnavailable(line)
    quantization.require_quantization(config, placement)


def options_needing_probe(config: ModelConfig) -> tuple[str, ...]:
    """Return the settings in use that a probe run must validate."""
    return _in_use(config, _NEEDING_PROBE)


def _refusals(task: Task, config: ModelConfig, placement: Placement) -> Iterator[str]:
    yield from _task_refusals(task, config)
    yield from _device_map_refusals(task, config, placement)
    if config.quantization != "none" and config.offload in _BY_LAYERS:
        # accelerate cannot split weights of torchao and GGUF, and group offloading of bitsandbytes
        # weights is not documented to work.
        yield (
            "MODEL_QUANTIZATION, MODEL_OFFLOAD: quantized weights are moved as whole parts only; "
            "take none or model"
        )
    if config.quantization == "torchao-int4" and config.offload == "model":
        yield "MODEL_QUANTIZATION, MODEL_OFFLOAD: torchao-int4 stays on its device; take none"
    if config.compile and config.offload in _BY_LAYERS:
        yield (
            "MODEL_COMPILE, MODEL_OFFLOAD: the weights of compiled blocks stay in them; "
            "take none or model"
        )
    if config.compile and config.adapters:
        # Each change of adapters would recompile the blocks during a job.
        yield "MODEL_COMPILE, MODEL_ADAPTERS: each change of adapters would recompile; set one"


def _task_refusals(task: Task, config: ModelConfig) -> Iterator[str]:
    if task is Task.TEXT_TO_IMAGE:
        others, foreign = Task.IMAGE_TO_TEXT, _in_use(config, _FOR_TEXTS)
    else:
        others, foreign = Task.TEXT_TO_IMAGE, _in_use(config, _FOR_IMAGES)
        if config.offload == "group":
            yield "MODEL_OFFLOAD: group is for pipelines; take model or sequential"
        if config.quantization == "gguf":
            yield f"MODEL_QUANTIZATION: gguf is only for MODEL_TYPE={others}"
    if foreign:
        yield f"{', '.join(foreign)}: only for MODEL_TYPE={others}"


def _device_map_refusals(task: Task, config: ModelConfig, placement: Placement) -> Iterator[str]:
    if config.device_map == "none":
        return
    if config.offload != "none":
        yield "MODEL_DEVICE_MAP, MODEL_OFFLOAD: parts on several GPUs stay there; set one of them"
    if config.quantization != "none" and task is Task.TEXT_TO_IMAGE:
        yield "MODEL_DEVICE_MAP, MODEL_QUANTIZATION: not together for a pipeline; set one of them"
    if placement.device.type != "cuda":
        yield f"MODEL_DEVICE_MAP: needs the device cuda, this one is {placement.device.type}"
    elif torch.cuda.device_count() < _MIN_GPUS:
        yield f"MODEL_DEVICE_MAP: needs {_MIN_GPUS} GPUs, there is {torch.cuda.device_count()}"


def _in_use(config: ModelConfig, fields: Iterable[str]) -> tuple[str, ...]:
    unset = ModelConfig()
    return tuple(
        f"MODEL_{field.upper()}"
        for field in fields
        if getattr(config, field) != getattr(unset, field)
    )
