"""Port of the object store."""

from typing import Protocol

from consumer.ports.media import EncodedImage
from consumer.ports.unavailable import Unavailable
from generation_contracts import ImageArtifact, Task
from generation_contracts.artifacts import ImageSource


class Artifacts(Protocol):
    """The object store."""

    async def store(
        self, task: Task, request_id: str, index: int, image: EncodedImage
    ) -> ImageArtifact:
        """Put one output under a key derived from the request id and the output's bytes.

        Raises:
            StoreUnavailable: Not stored within the adapter's own tries.
        """

    async def discard(self, artifact: ImageArtifact) -> None:
        """Delete an output that no event tells of, if possible. Never raises."""

    async def fetch(self, source: ImageSource, *, max_bytes: int) -> bytes:
        """The bytes of one input picture.

        Raises:
            InputUnavailable: It is missing, too large, or not one that this worker may read.
            StoreUnavailable: The store does not answer, or not with this object.
        """

    async def reachable(self) -> bool:
        """Whether the store answers this worker at all. Never raises."""


class StoreUnavailable(Unavailable):
    """The store does not answer, or refuses for a reason that may pass; safe to show."""
