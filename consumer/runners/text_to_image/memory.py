"""What makes a run of a pipeline smaller and slower, turned on for one run."""

from contextlib import ExitStack
from typing import Any

import structlog
import torch

from consumer.runners.device import release
from consumer.runners.text_to_image.pipeline_loading import modules

log = structlog.get_logger()


def save(undo: ExitStack, pipe: Any, device: torch.device, *, offload: bool) -> tuple[str, ...]:
    """Decode in slices and tiles and, where it is possible, hold one part on the device at a time.

    Args:
        undo: Takes what makes everything as it was before. It is closed once nothing holds the
            run's tensors any more: there must be room for the weights on the device.
        pipe: The shared pipeline; the copies made of it meanwhile save memory.
        device: Where it computes.
        offload: Whether to move the parts; not when they are moved anyway, and not on a CPU.

    Returns:
        What was not so before, in words for the sender.
    """
    done = []
    decoder = getattr(pipe, "vae", None)  # families that work on pixels have none
    before = _decoding(decoder)
    undo.callback(_decode_whole, decoder, before)
    for switch in ("enable_slicing", "enable_tiling"):
        if hasattr(decoder, switch):
            getattr(decoder, switch)()
    if _decoding(decoder)[1] and not before[1]:
        done.append("decoded in tiles")
    if offload and pipe.model_cpu_offload_seq is not None:
        undo.callback(_bring_back, pipe, device)
        pipe.enable_model_cpu_offload(device=device)
        release(device)
        done.append("kept only the part at work on the device")
    return tuple(done)


def types_of(pipe: Any) -> dict[str, torch.dtype]:
    """The type of each part, to be restored by `restore_types`."""
    types = {name: getattr(module, "dtype", None) for name, module in modules(pipe)}
    return {name: dtype for name, dtype in types.items() if isinstance(dtype, torch.dtype)}


def restore_types(pipe: Any, types: dict[str, torch.dtype]) -> None:
    """Give each part its type back.

    SDXL decodes in float32 and casts its autoencoder for that; a run that fails there leaves it so,
    and every later one fails as well.
    """
    for name, module in modules(pipe):
        if name in types and module.dtype != types[name]:
            module.to(dtype=types[name])


def _decoding(decoder: Any) -> tuple[bool, bool]:
    return getattr(decoder, "use_slicing", False), getattr(decoder, "use_tiling", False)


def _decode_whole(decoder: Any, before: tuple[bool, bool]) -> None:
    for was_on, switch in zip(before, ("disable_slicing", "disable_tiling"), strict=True):
        if not was_on and hasattr(decoder, switch):
            getattr(decoder, switch)()


def _bring_back(pipe: Any, device: torch.device) -> None:
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
