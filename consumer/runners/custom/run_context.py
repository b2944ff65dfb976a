"""What one run of a custom runner is given."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from consumer.ports.model import RunRequest
from generation_runner import Cancelled

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_WARNINGS = 20
MAX_WARNING = 500  # characters


class RunContext:
    """A `generation_runner.Context`.

    Args:
        run: The request, its images and its progress.
        raises: Whether `step` raises after a cancellation; in a batch the others go on.
    """

    def __init__(self, run: RunRequest, *, raises: bool) -> None:
        self._run = run
        self._raises = raises
        self.warnings: list[str] = []

    @property
    def images(self) -> "Sequence[Image]":
        """The input images."""
        return self._run.images

    @property
    def seed(self) -> int:
        """The seed of the request, which the worker has drawn if the sender gave none."""
        return self._run.request.seed or 0

    @property
    def cancelled(self) -> bool:
        """Whether the request was cancelled."""
        return self._run.cancelled()

    def step(self, done: int, of: int) -> None:
        """Report progress; raise `Cancelled` after a cancellation."""
        of = max(1, int(of))
        self._run.progress.step(min(max(0, int(done)), of), of)
        if self._raises and self.cancelled:
            raise Cancelled

    def warn(self, text: str) -> None:
        """Add a warning to the result event."""
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(str(text)[:MAX_WARNING])
