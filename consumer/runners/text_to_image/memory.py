"""Measures that reduce the memory of one run and make it slower."""

from contextlib import ExitStack
from typing import Any

import structlog
import torch

from consumer.runners.device import release
from consumer.runners.text_to_image.pipeline_loading import modules

log = structlog.get_logger()


def save(undo: ExitStack, pipe: Any, device: torch.device, *, offload: bool) -> tuple[str, ...]:
    """Turn on decoding in slices and tiles and, where requested, offloading of inactive parts.

    Args:
        undo: Gets the callbacks that restore the previous state. Close it after the run's tensors
            are freed, because the weights need room on the device.
        pipe: The shared pipeline; its copies have the same settings.
        device: The device of the pipeline.
        offload: Whether to offload parts; False where they are offloaded anyway, or on a CPU.

    Returns:
        What was changed, as text for the sender.
    """
    done = []
    decoder = getattr(pipe, "vae", None)  # families that work on pixels have none
    before = _decoding(decoder)
    undo.callback(_restore_decoding, decoder, before)
    for switch in ("enable_slicing", "enable_tiling"):
        if hasattr(decoder, switch):
            getattr(decoder, switch)()
    if _decoding(decoder)[1] and not before[1]:
        done.append("decoded in tiles")
    if offload and pipe.model_cpu_offload_seq is not None:
        undo.callback(_restore_to_device, pipe, device)
        pipe.enable_model_cpu_offload(device=device)
        release(device)
        done.append("kept only the active part on the device")
    return tuple(done)


def dtypes_of(pipe: Any) -> dict[str, torch.dtype]:
    """Return the dtype of each part by its name."""
    dtypes = {name: getattr(module, "dtype", None) for name, module in modules(pipe)}
    return {name: dtype for name, dtype in dtypes.items() if isinstance(dtype, torch.dtype)}


def restore_dtypes(pipe: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Cast each part back to its dtype, as returned by `dtypes_of`.

    SDXL casts its autoencoder to float32 for decoding. A run that fails there does not cast it
    back, and every later run would fail as well.
    """
    for name, module in modules(pipe):
        if name in dtypes and module.dtype != dtypes[name]:
            module.to(dtype=dtypes[name])


def _decoding(decoder: Any) -> tuple[bool, bool]:
    return getattr(decoder, "use_slicing", False), getattr(decoder, "use_tiling", False)


def _restore_decoding(decoder: Any, before: tuple[bool, bool]) -> None:
    for was_on, switch in zip(before, ("disable_slicing", "disable_tiling"), strict=True):
        if not was_on and hasattr(decoder, switch):
            getattr(decoder, switch)()


def _restore_to_device(pipe: Any, device: torch.device) -> None:
    pipe.remove_all_hooks()
    fits = True
    try:
        pipe.to(device)
    except torch.OutOfMemoryError:
        fits = False
    if not fits:
        log.warning("weights_stay_in_main_memory")
        release(device)
        pipe.enable_model_cpu_offload(device=device)
