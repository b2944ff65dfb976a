"""The model raises in every run."""

from consumer.ports import ModelError
from consumer.settings import Settings
from generation_contracts import Request
from tests.support.quick_runner import QuickRunner


class Raising(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        raise ModelError("ValueError")


def make_runner(_: Settings) -> Raising:
    return Raising()
