"""Port of the object store."""

from typing import Protocol

from consumer.ports.media import EncodedFile
from consumer.ports.unavailable import Unavailable
from generation_contracts import FileArtifact, ImageArtifact, StoredArtifact
from generation_contracts.artifacts import ImageSource


class Artifacts(Protocol):
    """The object store."""

    async def store(
        self, queue: str, request_id: str, index: int, file: EncodedFile
    ) -> ImageArtifact | FileArtifact:
        """Store one output under a key that is derived from the request id and the output's bytes.

        Raises:
            StoreUnavailable: Not stored within the attempts that the implementation makes.
        """

    async def discard(self, artifact: StoredArtifact) -> None:
        """Delete an output that no event refers to, if possible. Never raises."""

    async def fetch(self, source: ImageSource, *, max_bytes: int) -> bytes:
        """Return the bytes of one input image.

        Raises:
            InputUnavailable: It is missing or too large, or this worker may not read it.
            StoreUnavailable: The store does not answer, or cannot return this object now.
        """

    async def reachable(self) -> bool:
        """Return whether the store answers this worker. Never raises."""


class UploadTooLarge(Exception):  # noqa: N818 - it describes the upload
    """A sender asks to upload more bytes than an input may have; the text is safe to show."""


class StoreUnavailable(Unavailable):
    """The store does not answer, or has a transient failure; the text is safe to show."""
