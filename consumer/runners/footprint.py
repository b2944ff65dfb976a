"""The memory use of this process and its device, for `consumer check --model`."""

# mypy: allow-untyped-calls

import resource
import sys

import torch

_GIB = 2**30  # bytes
_KIB = 1 if sys.platform == "darwin" else 2**10  # bytes in the unit of ru_maxrss


def footprint() -> str:
    """Describe the peak of main memory and, on cuda, the device's current and peak memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    text = f"main memory at most {peak / _GIB:.2f} GiB"
    for gpu in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        now, most = torch.cuda.memory_allocated(gpu), torch.cuda.max_memory_allocated(gpu)
        text += f"; cuda:{gpu} {now / _GIB:.2f} GiB, at most {most / _GIB:.2f} GiB"
    return text
