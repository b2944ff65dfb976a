"""Port of the image codec."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image


OutputFormat = Literal["png", "webp", "jpeg"]


@dataclass(frozen=True)
class EncodedFile:
    """One output as a file, with its hash.

    Attributes:
        sha256: Hexadecimal digest of `data`.
    """

    data: bytes = field(repr=False)
    media_type: str
    extension: str
    sha256: str


@dataclass(frozen=True)
class EncodedImage(EncodedFile):
    """One image as a file, with its hash.

    Attributes:
        marks: Names of the marks in the file that say that it was generated.
    """

    media_type: Literal["image/png", "image/webp", "image/jpeg"]
    width: int  # pixels
    height: int  # pixels
    seed: int
    marks: tuple[str, ...] = ()


class InputUnavailable(Exception):  # noqa: N818 - the contract's word for it is input_unavailable
    """An input image cannot be fetched or read. The text is safe to show to the sender."""


class SigningFailed(Exception):  # noqa: N818 - what has happened to the file
    """A file cannot be signed. The text is for the log: it may name hosts of the operator."""


class Credentials(Protocol):
    """Signs image files."""

    def submit(self, image: EncodedImage, provenance: Mapping[str, str]) -> "Future[EncodedImage]":
        """Sign a file in another thread, and check the signature.

        The signed bytes, and so their hash, differ in each call.

        Args:
            image: The file, with all its other metadata.
            provenance: How the image was made; the signature covers some of these values.

        Returns:
            The signed file. The future raises SigningFailed if there is no valid signature.
        """


class Images(Protocol):
    """Image codec. Both methods use the CPU: call them in a thread."""

    @property
    def max_bytes(self) -> int:
        """Size limit of an input file, in bytes."""

    def decode(self, data: bytes) -> "Image":
        """Decode an input file to an RGB image, with its EXIF orientation applied.

        Raises:
            InputUnavailable: Not a PNG, JPEG or WebP file, damaged, animated, or over the limits.
        """

    def encode(
        self,
        image: "Image",
        output_format: OutputFormat,
        *,
        seed: int,
        provenance: Mapping[str, str] | None = None,
    ) -> EncodedImage:
        """Encode an image to a file and hash the file.

        Args:
            image: RGB.
            output_format: Format of the file.
            seed: Copied into the returned value.
            provenance: Metadata that is written into the file: names and values.
        """
