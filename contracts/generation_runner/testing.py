"""A `Context` for the tests of a runner, without a worker."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from generation_runner.runner import Cancelled

if TYPE_CHECKING:
    from PIL.Image import Image


class RecordedContext:
    """A `generation_runner.Context` that records what a runner reports.

    Args:
        images: The input images.
        seed: The seed.
        cancel_at: `step` raises `Cancelled` from this number of finished steps; None: never.

    Attributes:
        steps: `(done, of)` of each reported step.
        warnings: The warnings.
    """

    def __init__(
        self, images: "Sequence[Image]" = (), *, seed: int = 0, cancel_at: int | None = None
    ) -> None:
        self.images = images
        self.seed = seed
        self.steps: list[tuple[int, int]] = []
        self.warnings: list[str] = []
        self._cancel_at = cancel_at

    @property
    def cancelled(self) -> bool:
        """Whether the request counts as cancelled."""
        done = self.steps[-1][0] if self.steps else 0
        return self._cancel_at is not None and done >= self._cancel_at

    def step(self, done: int, of: int) -> None:
        """Record a step."""
        self.steps.append((done, of))
        if self.cancelled:
            raise Cancelled

    def warn(self, text: str) -> None:
        """Record a warning."""
        self.warnings.append(text)
