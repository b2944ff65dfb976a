"""The model raises in every run until the test creates a mark."""

import os
from pathlib import Path

from consumer.ports.model import ModelError
from consumer.settings import Settings
from generation_contracts import Request
from tests.support.holding import FIXED
from tests.support.quick_runner import FOLDER, QuickRunner


class RaisesUntilMended(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        super().begin(request, save_memory=save_memory)
        if not (Path(os.environ[FOLDER]) / FIXED).exists():
            raise ModelError("RuntimeError")


def make_runner(_: Settings) -> RaisesUntilMended:
    return RaisesUntilMended()
