"""The optional features of a pipeline: each is turned on through diffusers, or refused.

An option that a pipeline does not support is refused when the model is loaded.
"""

# mypy: allow-untyped-calls

from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

from consumer.ports.model import ModelMisconfigured
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement
from consumer.runners.setting_errors import attention_errors
from generation_contracts import Task

GRAPHS = 64  # the most graphs of one compiled block


def require_attention_backend(config: ModelConfig) -> None:
    """Refuse an attention backend that diffusers lacks, or whose package is missing.

    Raises:
        ModelMisconfigured: Names the available backends, or the missing package.
    """
    name = config.attention
    if not name:
        return
    if error := next(attention_errors(Task.TEXT_TO_IMAGE, name), None):
        raise ModelMisconfigured(error)
    try:
        with attention_backend(AttentionBackendName(name)):
            pass
    except RuntimeError as error:  # what diffusers raises for a missing package
        raise ModelMisconfigured(f"MODEL_ATTENTION: {error}") from None


def apply(pipe: Any, denoiser: Any, placement: Placement, config: ModelConfig) -> None:
    """Turn the configured options on and move the pipeline to its device.

    Args:
        pipe: The loaded pipeline.
        denoiser: The part of the pipeline that runs at each step.
        placement: The device of the pipeline.
        config: The options.

    Raises:
        ModelMisconfigured: The pipeline does not support an option.
    """
    family = type(pipe).__name__.removesuffix("Pipeline")
    if config.attention:
        _set_attention(denoiser, config.attention, family)
    for enabled, setting, mode in (
        (config.vae_tiling, "MODEL_VAE_TILING", "tiling"),
        (config.vae_slicing, "MODEL_VAE_SLICING", "slicing"),
    ):
        if enabled:
            _enable_vae_mode(getattr(pipe, "vae", None), setting, mode, family)
    if config.channels_last:
        _set_channels_last([denoiser, getattr(pipe, "vae", None)], family)
    _move_to_device(pipe, placement, config)
    # Last, so that the cached and compiled forward pass includes the hooks of the options above.
    if config.step_cache:
        _cache_steps(denoiser, config.step_cache, family)
    if config.compile:
        _compile(denoiser, config)


def _set_attention(denoiser: Any, name: str, family: str) -> None:
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    # Older processors call torch directly, and diffusers silently skips them.
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ModelMisconfigured(f"MODEL_ATTENTION: {family} has no selectable attention backend")
    denoiser.set_attention_backend(name)


def _enable_vae_mode(vae: Any, setting: str, mode: str, family: str) -> None:
    if not hasattr(vae, f"use_{mode}"):
        raise ModelMisconfigured(f"{setting}: {family} has no vae with {mode}")
    getattr(vae, f"enable_{mode}")()


def _set_channels_last(parts: list[Any], family: str) -> None:
    with_convolutions = [
        part
        for part in parts
        if part is not None and any(isinstance(m, torch.nn.Conv2d) for m in part.modules())
    ]
    if not with_convolutions:
        raise ModelMisconfigured(
            f"MODEL_CHANNELS_LAST: {family} has no two-dimensional convolutions"
        )
    for part in with_convolutions:
        part.to(memory_format=torch.channels_last)


def _move_to_device(pipe: Any, placement: Placement, config: ModelConfig) -> None:
    device = placement.device
    if config.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif config.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif config.offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level")
    elif config.device_map == "none":
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)


def _cache_steps(denoiser: Any, threshold: float, family: str) -> None:
    """Skip the later blocks at a step whose first block changes little.

    `maybe_free_model_hooks` clears the cached state after each run.
    """
    if not hasattr(denoiser, "enable_cache"):
        raise ModelMisconfigured(f"MODEL_STEP_CACHE: {family} has no step cache")
    try:
        denoiser.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    except (ValueError, IndexError):  # diffusers does not know its blocks, or there is only one
        raise ModelMisconfigured(
            f"MODEL_STEP_CACHE: the first-block cache does not know the blocks of {family}"
        ) from None


def _compile(denoiser: Any, config: ModelConfig) -> None:
    if config.quantization.startswith("bitsandbytes"):
        # As diffusers advises: output shapes of bitsandbytes operations depend on the input values.
        torch._dynamo.config.capture_dynamic_output_shape_ops = True  # noqa: SLF001
    # The cache branches in the middle of a block, which cannot be part of one graph.
    whole = not config.step_cache
    # Each way to call a block has a graph: with and without guidance, for one image and several,
    # for each size. Above torch's limit of 8 graphs, a block that must be one graph raises.
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)  # noqa: SLF001
    # The repeated blocks of a transformer share one compilation.
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks(fullgraph=whole)
    else:
        denoiser.compile()
