"""The first run hangs in C forever, without holding the interpreter lock."""

import ctypes
import os

from consumer.settings import Settings
from generation_contracts import Request
from tests.support.quick_runner import QuickRunner, first_time, note


class HangsOnce(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        if first_time("hung"):
            note("hanging", str(os.getpid()))
            ctypes.CDLL(None).pause()


def make_runner(_: Settings) -> HangsOnce:
    return HangsOnce()
