"""The model does not heed an interruption, and takes minutes; it holds no lock."""

import time
from collections.abc import Sequence

from PIL.Image import Image

from consumer.ports import IsCancelled, OnPreview, OnStep, OnText, RunnerOutput
from consumer.settings import Settings
from generation_contracts import Request
from tests.support.quick_runner import QuickRunner, note

MINUTES = 600.0  # seconds


class Deaf(QuickRunner):
    def run(
        self,
        request: Request,
        images: Sequence[Image],
        *,
        on_step: OnStep,
        cancelled: IsCancelled,
        on_text: OnText | None = None,
        on_preview: OnPreview | None = None,
        save_memory: bool = False,
    ) -> RunnerOutput:
        note("runs", request.request_id or "")
        time.sleep(MINUTES)
        return self.output(request, images)


def make_runner(_: Settings) -> Deaf:
    return Deaf()
