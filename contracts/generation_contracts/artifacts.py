"""Artifacts: what a request may name as its input pictures, and what a result carries."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, Discriminator, Field, StringConstraints, Tag

from generation_contracts.base import EventPart, RequestPart, says

# What is read may lie in a bucket of the early years of S3, with capitals and underscores.
_BUCKET = r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]"
BucketName = Annotated[
    str,
    StringConstraints(pattern=rf"^{_BUCKET}$", max_length=63),
    says("must be a bucket name: 3-63 characters of A-Z a-z 0-9 . _ -"),
]
# Any character but the control characters: minio-py lets tabs, newlines and ESC through to the
# server. No empty, `.` or `..` segment: the S3 client refuses some of them with a bare ValueError,
# and a store on a file system takes `a//b` for `a/b`, and on some systems `\` for `/`.
_CONTROL = r"\x00-\x1f\x7f-\x9f"
_SEGMENT = rf"(?:\.*[^./\\{_CONTROL}][^/\\{_CONTROL}]*|\.{{3,}})"
_KEY = rf"{_SEGMENT}(?:[/\\]{_SEGMENT})*"
_KEY_WORDS = (
    "without control characters, and without an empty, `.` or `..` part between its slashes"
)

MAX_KEY = 1024  # bytes of UTF-8
MAX_INLINE_IMAGE = 8 * 2**20  # base64 characters; the server's max_payload bounds it further
MAX_URI = 2048  # characters


def _short_enough(key: str) -> str:
    if len(key.encode()) > MAX_KEY:
        raise ValueError(f"an object key has at most {MAX_KEY} bytes of UTF-8")
    return key


def _with_short_key(uri: str) -> str:
    _short_enough(uri.removeprefix("s3://").partition("/")[2])
    return uri


ObjectKey = Annotated[
    str,
    StringConstraints(pattern=rf"^{_KEY}$", min_length=1, max_length=MAX_KEY),
    says(f"must be an object key {_KEY_WORDS}"),
    AfterValidator(_short_enough),
]
InlineUri = Annotated[
    str,
    StringConstraints(
        pattern=r"^data:image/[a-z0-9.+-]+;base64,[A-Za-z0-9+/]+={0,2}$",
        max_length=MAX_INLINE_IMAGE,
    ),
    says("must be data:image/…;base64,… with base64 that has no line ends or spaces"),
]
# The key is written as it is: nothing is percent-decoded, as in aws-cli and boto3.
S3Uri = Annotated[
    str,
    StringConstraints(pattern=rf"^s3://{_BUCKET}/{_KEY}$", max_length=MAX_URI),
    says(f"must be s3://bucket/key, with a key {_KEY_WORDS}"),
    AfterValidator(_with_short_key),
]
HttpUri = Annotated[
    str,
    StringConstraints(pattern=r"^https?://[!-~]+$", max_length=MAX_URI),
    says("must be an http(s) address of printable ASCII characters without spaces"),
]


class ArtifactReference(RequestPart):
    """An object in the store, named in a request as `{"bucket": …, "key": …}`."""

    bucket: BucketName
    key: ObjectKey = Field(
        description=f"as it is, up to {MAX_KEY} bytes of UTF-8; nothing is percent-decoded"
    )


class InlineImage(RequestPart):
    """A picture inside the request itself; the decoded bytes are a PNG, JPEG or WebP file."""

    base64: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=MAX_INLINE_IMAGE),
        says("must be base64 without line ends, spaces or a data: prefix"),
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
