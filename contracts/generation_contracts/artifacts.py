"""Artifacts: what a request may name as its input pictures, and what a result carries."""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Discriminator, Field, StringConstraints, Tag

from generation_contracts.base import EventPart, RequestPart

# The rules of S3 itself for bucket names, without the legacy forms.
BucketName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", max_length=63)
]
# Printable ASCII without backslash, query and fragment signs: minio-py lets tabs, newlines and ESC
# through to the server.
# No empty, `.` or `..` segment either: the S3 client refuses some of them with a bare ValueError,
# and a store on a file system takes `a//b` for `a/b`.
_SEGMENT = r"(?:\.*[A-Za-z0-9_\-!~*'()=@+, ][A-Za-z0-9_\-.!~*'()=@+, ]*|\.{3,})"
_KEY = rf"{_SEGMENT}(?:/{_SEGMENT})*"
ObjectKey = Annotated[str, StringConstraints(pattern=rf"^{_KEY}$", min_length=1, max_length=1024)]

MAX_INLINE_IMAGE = 8 * 2**20  # base64 characters; the server's max_payload bounds it further
MAX_URI = 2048  # characters

InlineUri = Annotated[
    str,
    StringConstraints(
        pattern=r"^data:image/[a-z0-9.+-]+;base64,[A-Za-z0-9+/]+={0,2}$",
        max_length=MAX_INLINE_IMAGE,
    ),
]
S3Uri = Annotated[
    str,
    StringConstraints(
        pattern=rf"^s3://[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9]/{_KEY}$",
        max_length=MAX_URI,
    ),
]
HttpUri = Annotated[str, StringConstraints(pattern=r"^https?://[!-~]+$", max_length=MAX_URI)]


class ArtifactReference(RequestPart):
    """An object in the store, named in a request as `{"bucket": …, "key": …}`."""

    bucket: BucketName
    key: ObjectKey


class InlineImage(RequestPart):
    """A picture inside the request itself; the decoded bytes are a PNG, JPEG or WebP file."""

    base64: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=MAX_INLINE_IMAGE),
    ]


def _form(value: Any) -> str | None:
    """Which wire form a value has; None makes the one error that says what the forms are."""
    if isinstance(value, ArtifactReference | InlineImage):
        return type(value).__name__
    if isinstance(value, dict):
        return "InlineImage" if "base64" in value else "ArtifactReference"
    if not isinstance(value, str):
        return None
    scheme = value.partition(":")[0]
    return {"data": "InlineUri", "s3": "S3Uri", "http": "HttpUri", "https": "HttpUri"}.get(scheme)


# The wire forms of one input picture. `http(s)://` is refused by a worker unless a setting lists
# the host.
ImageSource = Annotated[
    Annotated[ArtifactReference, Tag("ArtifactReference")]
    | Annotated[InlineImage, Tag("InlineImage")]
    | Annotated[InlineUri, Tag("InlineUri")]
    | Annotated[S3Uri, Tag("S3Uri")]
    | Annotated[HttpUri, Tag("HttpUri")],
    Discriminator(
        _form,
        custom_error_type="image_source",
        custom_error_message=(
            "must be {bucket, key}, {base64}, s3://bucket/key or data:image/…;base64,…"
        ),
    ),
]


class ImageArtifact(EventPart):
    """One generated picture in the store.

    `bucket`, `key`, `etag` and `sha256` are the truth; `url` is a presigned convenience that ends
    at `url_expires_at`.
    """

    kind: Literal["image"] = "image"
    bucket: str
    key: str
    url: str = Field(description="presigned: whoever has it can fetch the file")
    url_expires_at: AwareDatetime
    etag: str = Field(description="as the store gave it")
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="of the file, hexadecimal"
    )
    size: Annotated[int, Field(gt=0, description="bytes")]
    media_type: Literal["image/png", "image/webp", "image/jpeg"]
    width: Annotated[int, Field(gt=0, description="pixels")]
    height: Annotated[int, Field(gt=0, description="pixels")]
    seed: int = Field(ge=0, description="of this picture: that of the request, plus its number")
    flagged: bool | None = Field(
        default=None, description="what the worker's safety checker says; absent: there is none"
    )


class TextOutput(EventPart):
    """One generated text, carried in the event itself."""

    kind: Literal["text"] = "text"
    text: str
    finish_reason: Literal["stop", "length"] = Field(
        description="the model ended it, or it reached `max_new_tokens`"
    )
    prompt_tokens: int = Field(ge=0, description="pictures included")
    completion_tokens: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="of the sampling; absent where the text was not drawn by chance"
    )


Output = Annotated[ImageArtifact | TextOutput, Field(discriminator="kind")]

__all__ = [
    "ArtifactReference",
    "BucketName",
    "ImageArtifact",
    "ImageSource",
    "InlineImage",
    "ObjectKey",
    "Output",
    "TextOutput",
]
