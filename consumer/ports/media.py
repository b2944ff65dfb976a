"""Port of the image codec."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image


OutputFormat = Literal["png", "webp", "jpeg"]


@dataclass(frozen=True)
class EncodedImage:
    """One picture as a file, hashed once.

    Attributes:
        sha256: Hex.
    """

    data: bytes = field(repr=False)
    media_type: Literal["image/png", "image/webp", "image/jpeg"]
    extension: str
    width: int  # pixels
    height: int  # pixels
    seed: int
    sha256: str


class InputUnavailable(Exception):  # noqa: N818 - the contract's word for it is input_unavailable
    """An input picture cannot be had or read. The text is safe to show to the sender."""


class Images(Protocol):
    """The pictures' codec. Both methods compute: call them in a thread."""

    @property
    def max_bytes(self) -> int:
        """The largest input file."""

    def decode(self, data: bytes) -> "Image":
        """An input file to an RGB picture, upright.

        Raises:
            InputUnavailable: Not a PNG, JPEG or WebP file, broken, animated, or over the limits.
        """

    def encode(
        self,
        image: "Image",
        output_format: OutputFormat,
        *,
        seed: int,
        provenance: Mapping[str, str] | None = None,
    ) -> EncodedImage:
        """A picture to a file with its hash.

        Args:
            image: RGB.
            output_format: Of the file.
            seed: Goes into what is returned.
            provenance: Written into the file as its metadata: names and values.
        """
