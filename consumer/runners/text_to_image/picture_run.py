"""One run of a pipeline: whom it is made for, and which pictures it is to make."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from consumer.ports.model import BatchMember, OnPreview
from consumer.runners.text_to_image.truncation import Cuts
from generation_contracts import TextToImageRequest


class Company:
    """Those for whom one run is made: told its steps, and asked whether they still want it.

    Args:
        members: In their order; one for a run of a single request.

    Attributes:
        staying: Places of those who have not left, in their order.
    """

    def __init__(self, members: Sequence[BatchMember]) -> None:
        self._members = members
        self.staying = list(range(len(members)))

    def tell(self, done: int, of: int) -> None:
        """Tell a step to those who are staying."""
        for place in self.staying:
            self._members[place].on_step(done, of)

    def have_all_left(self) -> bool:
        """Ask those who are staying; who is cancelled leaves, and is neither told nor asked again.

        Their pictures are made to the end nevertheless, where others stay: a pipeline cannot let go
        of one row.
        """
        self.staying = [p for p in self.staying if not self._members[p].cancelled()]
        return not self.staying


class Wanted(NamedTuple):
    """One picture that a run is to make."""

    place: int  # of the request that it is for
    seed: int


@dataclass
class PictureRun:
    """What one run is asked for, and what it has told so far.

    Attributes:
        company: Whom it is made for.
        requests: Theirs, by their places.
        wanted: The pictures, those of one request beside each other.
        cuts: By the places in `wanted`, or of one prompt for all of them.
        saved: What it did to save memory.
    """

    company: Company
    requests: Sequence[TextToImageRequest]
    wanted: Sequence[Wanted]
    cuts: Cuts
    on_preview: OnPreview | None = None
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
        """Of the pictures of one request."""
        return [w.seed for w in self.wanted if w.place == place]
