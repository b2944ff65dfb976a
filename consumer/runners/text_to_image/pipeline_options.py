"""Options of a pipeline, each by diffusers' own feature, or refused where the pipeline lacks it."""

# mypy: allow-untyped-calls

from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

from consumer.ports.model import ModelUnavailable
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement

GRAPHS = 64  # that one compiled block may have
_FROM_THE_HUB = "_hub"  # ending of the backends whose code diffusers fetches from the hub


def require_attention_backend(config: ModelConfig) -> None:
    """Refuse an attention backend that diffusers lacks, or whose package is missing.

    Raises:
        ModelUnavailable: Says which there are, or which package is missing.
    """
    name = config.attention
    if not name:
        return
    known = sorted(b.value for b in AttentionBackendName if not b.value.endswith(_FROM_THE_HUB))
    if name not in known:
        raise ModelUnavailable(f"MODEL_ATTENTION: must be one of {', '.join(known)}")
    try:
        with attention_backend(AttentionBackendName(name)):
            pass
    except RuntimeError as error:  # diffusers' word for a missing package
        raise ModelUnavailable(f"MODEL_ATTENTION: {error}") from None


def apply(pipe: Any, denoiser: Any, placement: Placement, config: ModelConfig) -> None:
    """Turn the options on and put the pipeline where it computes.

    Args:
        pipe: Just loaded.
        denoiser: Its part that is run at each step.
        placement: Where it computes.
        config: Which options.

    Raises:
        ModelUnavailable: The pipeline has nothing to which an option could apply.
    """
    family = type(pipe).__name__.removesuffix("Pipeline")
    if config.attention:
        _choose_attention(denoiser, config.attention, family)
    for wanted, setting, way in (
        (config.vae_tiling, "MODEL_VAE_TILING", "tiling"),
        (config.vae_slicing, "MODEL_VAE_SLICING", "slicing"),
    ):
        if wanted:
            _decode_in_parts(getattr(pipe, "vae", None), setting, way, family)
    if config.channels_last:
        _order_channels_last([denoiser, getattr(pipe, "vae", None)], family)
    _put_in_place(pipe, placement, config)
    # Last: what is cached and compiled is the forward pass with all the hooks above.
    if config.step_cache:
        _cache_steps(denoiser, config.step_cache, family)
    if config.compile:
        _compile(denoiser, config)


def _choose_attention(denoiser: Any, name: str, family: str) -> None:
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    # The older processors call torch directly, and diffusers passes over them without a word.
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ModelUnavailable(f"MODEL_ATTENTION: {family} has no choice of attention")
    denoiser.set_attention_backend(name)


def _decode_in_parts(vae: Any, setting: str, way: str, family: str) -> None:
    if not hasattr(vae, f"use_{way}"):
        raise ModelUnavailable(f"{setting}: {family} has no vae with {way}")
    getattr(vae, f"enable_{way}")()


def _order_channels_last(parts: list[Any], family: str) -> None:
    with_convolutions = [
        part
        for part in parts
        if part is not None and any(isinstance(m, torch.nn.Conv2d) for m in part.modules())
    ]
    if not with_convolutions:
        raise ModelUnavailable(f"MODEL_CHANNELS_LAST: {family} has no two-dimensional convolutions")
    for part in with_convolutions:
        part.to(memory_format=torch.channels_last)


def _put_in_place(pipe: Any, placement: Placement, config: ModelConfig) -> None:
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

    What is kept from step to step goes with `maybe_free_model_hooks` after each run.
    """
    if not hasattr(denoiser, "enable_cache"):
        raise ModelUnavailable(f"MODEL_STEP_CACHE: {family} has no step cache")
    try:
        denoiser.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    except (ValueError, IndexError):  # diffusers knows nothing of its blocks, or there is one only
        raise ModelUnavailable(
            f"MODEL_STEP_CACHE: the first-block cache does not know the blocks of {family}"
        ) from None


def _compile(denoiser: Any, config: ModelConfig) -> None:
    if config.quantization.startswith("bitsandbytes"):
        # diffusers' advice: bitsandbytes has operations whose result's shape depends on its input.
        torch._dynamo.config.capture_dynamic_output_shape_ops = True  # noqa: SLF001
    # The cache decides in the middle of a block, outside of what can be compiled.
    whole = not config.step_cache
    # A graph for each way in which a block is called: with and without guidance, for one image
    # and for several, two sizes. Beyond the limit, 8, torch raises where the graph must be whole.
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)  # noqa: SLF001
    # The blocks of a transformer are alike: compiled once, used for all of them.
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks(fullgraph=whole)
    else:
        denoiser.compile()
