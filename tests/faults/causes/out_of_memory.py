"""A `large` image fits into device memory only with memory saving, a `huge` image never."""

from consumer.ports.model import OutOfMemory
from consumer.settings import Settings
from generation_contracts import Request
from tests.support.quick_runner import QuickRunner, note


class OutOfMemoryOnDemand(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        note("saving", str(save_memory))
        if request.prompt == "huge" or (request.prompt == "large" and not save_memory):
            raise OutOfMemory("too large", ("saving",) if save_memory else ())


def make_runner(_: Settings) -> OutOfMemoryOnDemand:
    return OutOfMemoryOnDemand()
