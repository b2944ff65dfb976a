"""Upload of an input image: the request of a sender, and the worker's reply."""

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, ValidationError

from generation_contracts.base import EventPart, RequestPart
from generation_contracts.requests import invalid_request

MediaType = Literal["image/png", "image/webp", "image/jpeg"]


class UploadRequest(RequestPart):
    """Ask for an address to which the sender can upload one input image."""

    size: Annotated[
        int, Field(gt=0, le=2**40, description="bytes of the file; the worker has a lower limit")
    ]
    media_type: MediaType


class UploadReply(EventPart):
    """Reply to an upload request: an HTTP POST form that accepts this one file until it expires.

    POST `fields` and then the file, in a field named `file`, to `url` as `multipart/form-data`. A
    status of 2xx means that the file is stored. Use `{"bucket": …, "key": …}` as an input image.
    """

    url: str = Field(description="address of the form; no credentials are needed")
    fields: dict[str, str] = Field(
        description="form fields; the signed policy allows this key, size and media type only"
    )
    expires_at: AwareDatetime = Field(description="the store refuses the form from then on")
    bucket: str
    key: str = Field(description="of the uploaded object; the store deletes the object after a day")


def decode_upload_request(body: bytes) -> UploadRequest:
    """Decode the bytes of an upload request.

    Raises:
        InvalidRequest: Not JSON, or against the contract. The text may be shown to the sender.
    """
    try:
        return UploadRequest.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise invalid_request(error) from None


def decode_upload_reply(body: bytes) -> UploadReply:
    """Decode the bytes of a reply.

    Raises:
        pydantic.ValidationError: The bytes are not a reply of this version.
    """
    return UploadReply.model_validate_json(body)
