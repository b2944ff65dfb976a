"""Artifacts: the forms of input images in a request, and the outputs in a result."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    Discriminator,
    Field,
    JsonValue,
    StringConstraints,
    Tag,
)

from generation_contracts.base import EventPart, RequestPart, pattern_message

# Old S3 buckets have capitals and underscores in their names, and inputs may be in one of them.
_BUCKET = r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]"
BucketName = Annotated[
    str,
    StringConstraints(pattern=rf"^{_BUCKET}$", max_length=63),
    pattern_message("must be a bucket name: 3-63 characters of A-Z a-z 0-9 . _ -"),
]
# No control characters: minio-py passes tabs, newlines and ESC to the server. No empty, `.` or `..`
# segment: minio-py raises ValueError for some of them, and a store on a file system reads `a//b` as
# `a/b`, and on some systems `\` as `/`.
_CONTROL = r"\x00-\x1f\x7f-\x9f"
_SEGMENT = rf"(?:\.*[^./\\{_CONTROL}][^/\\{_CONTROL}]*|\.{{3,}})"
_KEY = rf"{_SEGMENT}(?:[/\\]{_SEGMENT})*"
_KEY_RULE = "without control characters, and without an empty, `.` or `..` part between its slashes"

MAX_KEY = 1024  # bytes of UTF-8
MAX_INLINE_IMAGE = 8 * 2**20  # base64 characters; max_payload of the server is often lower
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
    pattern_message(f"must be an object key {_KEY_RULE}"),
    AfterValidator(_short_enough),
]
InlineUri = Annotated[
    str,
    StringConstraints(
        pattern=r"^data:image/[a-z0-9.+-]+;base64,[A-Za-z0-9+/]+={0,2}$",
        max_length=MAX_INLINE_IMAGE,
    ),
    pattern_message("must be data:image/…;base64,… with base64 that has no line ends or spaces"),
]
# The key is not percent-decoded, as in aws-cli and boto3.
S3Uri = Annotated[
    str,
    StringConstraints(pattern=rf"^s3://{_BUCKET}/{_KEY}$", max_length=MAX_URI),
    pattern_message(f"must be s3://bucket/key, with a key {_KEY_RULE}"),
    AfterValidator(_with_short_key),
]
HttpUri = Annotated[
    str,
    StringConstraints(pattern=r"^https?://[!-~]+$", max_length=MAX_URI),
    pattern_message("must be an http(s) address of printable ASCII characters without spaces"),
]


class ArtifactReference(RequestPart):
    """Reference to an object in the store."""

    bucket: BucketName
    key: ObjectKey = Field(description=f"up to {MAX_KEY} bytes of UTF-8; not percent-decoded")


class InlineImage(RequestPart):
    """An image inside the request. The decoded bytes are a PNG, JPEG or WebP file."""

    base64: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=MAX_INLINE_IMAGE),
        pattern_message("must be base64 without line ends, spaces or a data: prefix"),
    ]


def _form(value: Any) -> str | None:
    """Return the tag of a value's form; None reports the error that lists the forms."""
    if isinstance(value, ArtifactReference | InlineImage):
        return type(value).__name__
    if isinstance(value, dict):
        return "InlineImage" if "base64" in value else "ArtifactReference"
    if not isinstance(value, str):
        return None
    scheme = value.partition(":")[0]
    return {"data": "InlineUri", "s3": "S3Uri", "http": "HttpUri", "https": "HttpUri"}.get(scheme)


# The forms of one input image. A worker refuses `http(s)://` unless a setting lists the host.
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


class StoredArtifact(EventPart):
    """One generated file in the store.

    `bucket`, `key`, `etag` and `sha256` identify the file. The presigned `url` expires at
    `url_expires_at`.
    """

    kind: str
    bucket: str
    key: str
    url: str = Field(description="presigned: anyone with this URL can fetch the file")
    url_expires_at: AwareDatetime
    etag: str = Field(description="as returned by the store")
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="hexadecimal digest of the file"
    )
    size: Annotated[int, Field(gt=0, description="bytes")]
    media_type: str


class ImageArtifact(StoredArtifact):
    """One generated image in the store.

    `bucket`, `key`, `etag` and `sha256` identify the file. The presigned `url` expires at
    `url_expires_at`.
    """

    kind: Literal["image"] = "image"
    media_type: Literal["image/png", "image/webp", "image/jpeg"]
    width: Annotated[int, Field(gt=0, description="pixels")]
    height: Annotated[int, Field(gt=0, description="pixels")]
    seed: int = Field(
        ge=0, description="seed of this image: the request's seed plus the image's index"
    )
    flagged: bool | None = Field(
        default=None, description="result of the safety checker; absent if the worker has none"
    )
    marks: tuple[str, ...] | None = Field(
        default=None,
        description=(
            "marks in the file that say that a model made it: `iptc` (digital source type in XMP), "
            "`c2pa` (signed Content Credentials); absent in events of workers without marks"
        ),
    )


class FileArtifact(StoredArtifact):
    """One generated file of any type in the store.

    `bucket`, `key`, `etag` and `sha256` identify the file. The presigned `url` expires at
    `url_expires_at`.
    """

    kind: Literal["file"] = "file"


class JsonOutput(EventPart):
    """One value, inside the event."""

    kind: Literal["json"] = "json"
    value: JsonValue


class TextOutput(EventPart):
    """One generated text, inside the event."""

    kind: Literal["text"] = "text"
    text: str
    finish_reason: Literal["stop", "length"] = Field(
        description="`stop`: the model ended the text; `length`: it reached `max_new_tokens`"
    )
    prompt_tokens: int = Field(ge=0, description="including the tokens of images")
    completion_tokens: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="seed of sampling; absent if the text was not sampled"
    )


Output = Annotated[
    ImageArtifact | FileArtifact | TextOutput | JsonOutput, Field(discriminator="kind")
]

__all__ = [
    "ArtifactReference",
    "BucketName",
    "FileArtifact",
    "ImageArtifact",
    "ImageSource",
    "InlineImage",
    "JsonOutput",
    "ObjectKey",
    "Output",
    "StoredArtifact",
    "TextOutput",
]
