"""What makes a run of a pipeline smaller and slower, turned on for one run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from consumer.runners.device import release
from consumer.runners.pipeline_loading import modules


@contextmanager
def saving(pipe: Any, device: torch.device, *, offload: bool) -> Iterator[None]:
    """Decode in slices and tiles and, where it is possible, hold one part on the device at a time.

    Everything is afterwards as it was before, however the run ends.

    Args:
        pipe: The shared pipeline; the copies made of it inside the context save memory.
        device: Where it computes.
        offload: Whether to move the parts; not when they are moved anyway, and not on a CPU.
    """
    with ExitStack() as stack:
        decoder = getattr(pipe, "vae", None)  # families that work on pixels have none
        stack.callback(_decode_whole, decoder, _decoding(decoder))
        for switch in ("enable_slicing", "enable_tiling"):
            if hasattr(decoder, switch):
                getattr(decoder, switch)()
        if offload and pipe.model_cpu_offload_seq is not None:
            stack.callback(_bring_back, pipe, device)
            pipe.enable_model_cpu_offload(device=device)
            release(device)
        yield


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
    pipe._all_hooks = []  # noqa: SLF001 - else `maybe_free_model_hooks` would offload again
    pipe.to(device)
