"""`/v1/images/edits` of OpenAI's API: images and a mask, as files or in JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from starlette.datastructures import FormData, UploadFile

from consumer.gateway.contract import unsupported
from consumer.gateway.errors import ApiError, invalid
from consumer.gateway.openai_images import IMAGES_ANSWERS, answer
from consumer.gateway.openai_parameters import Fixed, ImageParameters, Word
from consumer.gateway.waiting import SenderPart
from generation_contracts import TextToImageRequest
from generation_contracts.fields import MAX_IMAGES

EDIT = "image_edit"  # prefix of the event types of a stream
MAX_FIELDS = 64  # fields of a form
_FILES = ("image", "image[]", "mask")
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"

router = APIRouter(tags=["OpenAI"])


class EditParameters(ImageParameters):
    """The parameters of an image edit."""

    fixed: ClassVar[Mapping[str, Fixed]] = {**ImageParameters.fixed, "input_fidelity": Fixed()}

    input_fidelity: Word | None = None


@dataclass(frozen=True)
class ImageInputs:
    """The images of a request: the content of files, or URLs.

    Attributes:
        mask: Its transparent pixels mark the area of the first image to change.
    """

    images: tuple[bytes | str, ...]
    mask: bytes | str | None = None


def request_with_images(parameters: EditParameters, inputs: ImageInputs) -> TextToImageRequest:
    """Return the request of the contract, or refuse images as inputs.

    Raises:
        ApiError: 400: no model takes images yet.
    """
    parameters.to_request()  # first report other errors
    if inputs.images:
        raise unsupported("image", "no model here takes images as input")
    raise invalid("image: is missing", param="image")


def _body_schema() -> dict[str, Any]:
    """Return the OpenAPI schema of both forms of the body."""
    schema = EditParameters.model_json_schema()
    fields, url = schema["properties"], {"type": "string"}
    images = {"image": {"anyOf": [url, {"type": "array", "items": url}]}, "mask": url}
    file = {"type": "string", "format": "binary"}
    files = {"image": file, "image[]": {"type": "array", "items": file}, "mask": file}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {**schema, "properties": {**fields, **files}}},
            "application/json": {"schema": {**schema, "properties": {**fields, **images}}},
        },
    }


@router.post(
    "/v1/images/edits",
    summary="Change images by a prompt",
    responses=IMAGES_ANSWERS,
    openapi_extra={"requestBody": _body_schema()},
)
async def edit_images(http: Request, sender: SenderPart) -> Response:
    """Change images. No model accepts images as input yet, so the response is a 400 error."""
    parameters, inputs = await _read(http)
    request = request_with_images(parameters, inputs)
    return await answer(sender, parameters, request, kind=EDIT)


async def _read(http: Request) -> tuple[EditParameters, ImageInputs]:
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with http.form(max_files=MAX_IMAGES + 1, max_fields=MAX_FIELDS) as form:
            return await _from_form(form)
    if kind == "application/json":
        return _from_json(await http.body())
    raise ApiError(415, "send multipart/form-data or JSON", "unsupported_media_type")


async def _from_form(form: FormData) -> tuple[EditParameters, ImageInputs]:
    texts = {name: value for name, value in form.items() if isinstance(value, str)}
    files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
    for name, _ in files:
        if name not in _FILES:
            raise invalid(f"{name[:64]}: there is no such file", param=name[:64])
    images = [await _content(name, file) for name, file in files if name != "mask"]
    masks = [await _content(name, file) for name, file in files if name == "mask"]
    parameters = EditParameters.model_validate_strings(texts, strict=False)
    return parameters, ImageInputs(tuple(images), masks[0] if masks else None)


async def _content(name: str, file: UploadFile) -> bytes:
    content = await file.read()
    is_webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    if not (content.startswith((_PNG, _JPEG)) or is_webp):
        raise invalid(f"{name}: must be a PNG, JPEG or WebP file", param=name)
    return content


def _from_json(body: bytes) -> tuple[EditParameters, ImageInputs]:
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise invalid("the body is not JSON") from None
    if not isinstance(value, dict):
        raise invalid("the body must be an object")
    given = {name: inner for name, inner in value.items() if inner is not None}
    images = _urls("image", given.pop("image", ())) + _urls("images", given.pop("images", ()))
    masks = _urls("mask", given.pop("mask", ()))
    if len(images) > MAX_IMAGES:
        raise invalid(f"image: at most {MAX_IMAGES}", param="image")
    return EditParameters.model_validate(given), ImageInputs(images, masks[0] if masks else None)


def _urls(name: str, value: Any) -> tuple[str, ...]:
    """Return the URLs of `"data:…"`, `{"image_url": …}` or a list of these."""
    items = value if isinstance(value, (list, tuple)) else [value]
    urls = [item.get("image_url") if isinstance(item, Mapping) else item for item in items]
    usable = [url for url in urls if str(url).startswith(("data:", "https://"))]
    if len(usable) < len(urls):
        raise invalid(f"{name}: must be data: or https:// URLs", param=name)
    return tuple(str(url) for url in usable)
