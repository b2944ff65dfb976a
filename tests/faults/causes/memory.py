"""A model with large objects in the frames of its exceptions.

A leaked exception or frame keeps megabytes, which the memory size of the worker shows. The first
word of the prompt selects the fault.
"""

import ctypes
from collections.abc import Sequence

from PIL import Image

from consumer.ports.model import ModelError, OutOfMemory, RunnerOutput
from consumer.settings import Settings
from generation_contracts import Request
from tests.bench import mishaps
from tests.support.quick_runner import QuickRunner

_LIBC = ctypes.CDLL(None)

LARGE = 8 * 2**20  # bytes


class LargeError(ModelError):
    """An exception that refers to data of the run, as in some libraries."""

    def __init__(self, tensors: bytes) -> None:
        super().__init__("LargeError")
        self.tensors = tensors


class LargeOutOfMemory(OutOfMemory):
    """An exception that refers to data of the run."""

    def __init__(self, tensors: bytes) -> None:
        super().__init__("LargeOutOfMemory")
        self.tensors = tensors


class MemoryRunner(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        # Free space that imports leave in the heap would hide leaked objects.
        _LIBC.malloc_trim(0)
        # The bytes are not zero, because unwritten pages use no memory.
        tensors = b"\1" * LARGE
        match request.prompt.split()[0]:
            case mishaps.RAISES:
                raise LargeError(tensors)
            case mishaps.OUT_OF_MEMORY:
                raise LargeOutOfMemory(tensors)
            case mishaps.OUT_OF_MEMORY_ONCE if not save_memory:
                raise LargeOutOfMemory(tensors)
            case _:
                pass

    def output(self, request: Request, images: Sequence[Image.Image]) -> RunnerOutput:
        output = super().output(request, images)
        for one in output.images:
            one.image.info["tensors"] = b"\1" * LARGE
        return output


def make_runner(_: Settings) -> MemoryRunner:
    return MemoryRunner()
