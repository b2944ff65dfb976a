"""A worker whose first run loses the device: `python -m tests.gpu.lost_device_worker DEVICE`.

On cuda the run indexes beyond a tensor, and the assertion in the kernel makes every later call of
the process fail. On a CPU the exception of such a failure is raised. With `none` nothing fails.
"""

import sys
from collections.abc import Sequence

import torch

from consumer.app.daemon import run
from consumer.ports.model import RunnerOutput, RunRequest
from consumer.runners.faults import translate_failures
from consumer.settings import Settings
from consumer.telemetry import configure_logging
from tests.support.quick_runner import QuickRunner


class LosingRunner(QuickRunner):
    """Loses the device in each run."""

    def __init__(self, device: str) -> None:
        self._device = device

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> list[RunnerOutput | None]:
        return translate_failures(self._lose, free=lambda: None)

    def _lose(self) -> list[RunnerOutput | None]:
        if self._device == "cuda":
            index = torch.tensor([2**20], device="cuda")
            torch.zeros(1, device="cuda")[index].cpu()
            torch.cuda.synchronize()
            raise AssertionError("the device did not notice the invalid index")
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def main() -> None:
    """Run the worker."""
    settings = Settings.load()
    configure_logging(settings.log_format, settings.log_level)
    device = sys.argv[1]
    make = QuickRunner if device == "none" else (lambda: LosingRunner(device))
    sys.exit(run(settings, make_runner=lambda _: make()))


if __name__ == "__main__":
    main()
