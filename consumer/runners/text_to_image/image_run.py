"""One run of a pipeline: its requests, and the images that it is to make."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from consumer.ports.model import RunRequest
from consumer.runners.text_to_image.truncation import TruncationTracker
from generation_contracts import TextToImageRequest


class BatchMembers:
    """The requests of one run: each gets its progress, until it is cancelled.

    Args:
        runs: In their order; one for a run of a single request.

    Attributes:
        active: Places of those that are not cancelled, in their order.
    """

    def __init__(self, runs: Sequence[RunRequest]) -> None:
        self._runs = runs
        self.active = list(range(len(runs)))

    def report(self, done: int, of: int) -> None:
        """Report a step to the active members."""
        for place in self.active:
            self._runs[place].progress.step(done, of)

    def preview(self, jpeg: bytes) -> None:
        """Show how the first image looks; a request with previews runs alone."""
        self._runs[0].progress.preview(jpeg)

    def have_all_left(self) -> bool:
        """Poll the active members, and return whether none is left. A cancelled one leaves.

        Its images are made to the end nevertheless, where others stay: a pipeline cannot let go of
        one row.
        """
        self.active = [place for place in self.active if not self._runs[place].cancelled()]
        return not self.active


class Wanted(NamedTuple):
    """One image that a run is to make."""

    place: int  # of the request that it is for
    seed: int


@dataclass
class ImageRun:
    """What one run is asked for, and what it has noted so far.

    Attributes:
        members: Its requests as the daemon has them.
        requests: Theirs, by their places.
        wanted: The images, those of one request next to each other.
        cuts: By the places in `wanted`, or of one prompt for all of them.
        saved: What it did to save memory.
    """

    members: BatchMembers
    requests: Sequence[TextToImageRequest]
    wanted: Sequence[Wanted]
    cuts: TruncationTracker
    saved: list[str] = field(default_factory=list)

    @property
    def is_batch(self) -> bool:
        """Whether it is made for several, each with a prompt."""
        return self.wanted[0].place != self.wanted[-1].place

    @property
    def request(self) -> TextToImageRequest:
        """The first, for what all of them have in common."""
        return self.requests[self.wanted[0].place]

    def prompt_of(self, place: int) -> int:
        """Where the prompt of a request is among those that the pipeline is given."""
        return [w.place for w in self.wanted].index(place) if self.is_batch else 0

    def seeds_of(self, place: int) -> list[int]:
        """Of the images of one request."""
        return [w.seed for w in self.wanted if w.place == place]
