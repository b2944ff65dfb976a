"""The state of one run of a pipeline: its requests and the images to generate."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from consumer.ports.model import RunRequest
from consumer.runners.text_to_image.truncation import TruncationTracker
from generation_contracts import TextToImageRequest


class BatchMembers:
    """The requests of one run. Progress is reported to a request until it is cancelled.

    Args:
        runs: The requests in delivery order; one for a run of a single request.

    Attributes:
        active: Positions in `runs` of the requests that are not cancelled, ascending.
    """

    def __init__(self, runs: Sequence[RunRequest]) -> None:
        self._runs = runs
        self.active = list(range(len(runs)))

    def report(self, done: int, of: int) -> None:
        """Report a step to the active requests."""
        for position in self.active:
            self._runs[position].progress.step(done, of)

    def preview(self, jpeg: bytes) -> None:
        """Report a preview of the first image; a request with previews runs alone."""
        self._runs[0].progress.preview(jpeg)

    def all_cancelled(self) -> bool:
        """Remove the cancelled requests from `active`; return whether none is left.

        A pipeline cannot drop a row of a batch. While other requests are active, the images of a
        cancelled request are generated too, and dropped.
        """
        self.active = [position for position in self.active if not self._runs[position].cancelled()]
        return not self.active


class PlannedImage(NamedTuple):
    """One image that a run is to generate."""

    position: int  # of its request among the requests of the run
    seed: int


@dataclass
class ImageRun:
    """The input of one run, and what was recorded during the run.

    Attributes:
        members: The requests with their progress and cancellation.
        requests: The request bodies, in the same order.
        planned: The images to generate; images of one request are adjacent.
        truncation: Records truncated prompts: one prompt for each image of a batch, else one.
        saved: The measures that were taken to save memory, as text for the sender.
    """

    members: BatchMembers
    requests: Sequence[TextToImageRequest]
    planned: Sequence[PlannedImage]
    truncation: TruncationTracker
    saved: list[str] = field(default_factory=list)

    @property
    def is_batch(self) -> bool:
        """Whether the images are for several requests, each with a prompt."""
        return self.planned[0].position != self.planned[-1].position

    @property
    def request(self) -> TextToImageRequest:
        """The first request, for parameters that all requests share."""
        return self.requests[self.planned[0].position]

    def prompt_index(self, position: int) -> int:
        """Return the index of a request's prompt among the prompts of the pipeline call."""
        return [image.position for image in self.planned].index(position) if self.is_batch else 0

    def seeds(self, position: int) -> list[int]:
        """Return the seeds of the images of one request."""
        return [image.seed for image in self.planned if image.position == position]
