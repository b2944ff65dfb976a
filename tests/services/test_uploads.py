"""Inputs from a sender's machine: uploads without credentials of the store, and scaled photos."""

import asyncio
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from generation_client import (
    GenerationClient,
    NoWorker,
    RequestInvalid,
    UploadFailed,
    images,
)
from generation_contracts import (
    ArtifactReference,
    ImageToTextRequest,
    InlineImage,
    SucceededEvent,
    Task,
    TextOutput,
    decode_upload_reply,
)
from tests.integration import minio_server
from tests.integration.minio_server import MinioServer
from tests.services.conftest import Caller
from tests.support.plain_s3 import plain_s3_client
from tests.support.scene import WITHIN, Scene


def encoded(size: tuple[int, int], kind: str = "JPEG", **options: Any) -> bytes:
    """Return an image file of noise, which no format compresses well."""
    noise = np.random.default_rng(1).integers(0, 255, (*reversed(size), 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


def client_of(scene: Scene) -> GenerationClient:
    return GenerationClient(scene.stack.nats.url, root=scene.subjects.root)


@pytest.fixture
async def describer(scene: Scene) -> Scene:
    """A scene with a worker that describes images."""
    scene.task = Task.IMAGE_TO_TEXT
    await scene.apply()
    await scene.start("none")
    return scene


def text_of(event: SucceededEvent) -> str:
    (output,) = event.outputs
    assert isinstance(output, TextOutput)
    return output.text


# -- the endpoint ---------------------------------------------------------------------------------


async def test_an_uploaded_file_is_stored_and_can_be_described(describer: Scene) -> None:
    data = encoded((2000, 1000))
    assert len(data) > 1_100_000
    async with client_of(describer) as client:
        reference = await client.upload(data)
        assert "/uploads/" in f"/{reference.key}"
        assert text_of(await client.image_to_text("What?", reference)) == "1 images"
    assert await describer.object(reference.model_dump()) == data


@pytest.mark.skipif(not minio_server.is_installed(), reason="minio is not installed")
async def test_an_upload_to_minio_can_be_described(scene: Scene, tmp_path: Path) -> None:
    scene.task = Task.IMAGE_TO_TEXT
    await scene.apply()
    with MinioServer(tmp_path) as store:
        plain_s3_client(store).make_bucket(scene.stack.store.bucket)
        await scene.start(
            S3_ENDPOINT=store.endpoint,
            S3_ACCESS_KEY=store.access_key,
            S3_SECRET_KEY=store.secret_key,
        )
        data = encoded((2000, 1000))
        async with client_of(scene) as client:
            reference = await client.upload(data)
            assert text_of(await client.image_to_text("What?", reference)) == "1 images"
        stored = plain_s3_client(store).get_object(reference.bucket, reference.key)
        assert stored.read() == data


async def form(scene: Scene, caller: Caller, size: int = 10) -> tuple[str, dict[str, str]]:
    wanted = {"size": size, "media_type": "image/png"}
    body = await caller.client.request(
        f"{scene.subjects.root}.upload", json.dumps(wanted).encode(), timeout=WITHIN
    )
    reply = decode_upload_reply(body.data)
    return reply.url, reply.fields


async def post(url: str, fields: Mapping[str, str], data: bytes) -> int:
    async with httpx2.AsyncClient() as http:
        answer = await http.post(url, data=dict(fields), files={"file": ("x", data)})
    return answer.status_code


async def test_a_form_accepts_only_what_was_asked_for(scene: Scene, caller: Caller) -> None:
    await scene.start()
    url, fields = await form(scene, caller)
    key = fields["key"]
    other = key.replace("uploads/", "text_to_image/")
    assert other != key
    unsigned = {name: value for name, value in fields.items() if name != "x-amz-signature"}
    refused = {
        "too large": (fields, b"x" * 11),
        "too small": (fields, b"x" * 9),
        "other type": ({**fields, "Content-Type": "text/html"}, b"x" * 10),
        "other key": ({**fields, "key": f"{key}.other"}, b"x" * 10),
        "key of an output": ({**fields, "key": other}, b"x" * 10),
        "other field": ({**fields, "x-amz-meta-other": "1"}, b"x" * 10),
        "without signature": (unsigned, b"x" * 10),
        "other signature": ({**fields, "x-amz-signature": "0" * 64}, b"x" * 10),
    }
    for name, (sent, data) in refused.items():
        assert 400 <= await post(url, sent, data) < 500, name
    assert await post(url, fields, b"x" * 10) in {200, 204}


async def test_two_uploads_have_different_keys(scene: Scene, caller: Caller) -> None:
    await scene.start()
    keys = {(await form(scene, caller))[1]["key"] for _ in range(3)}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        (b"{", "400", "the body is not JSON"),
        (b"", "400", "the body is not JSON"),
        (b"[]", "400", "input should be"),
        (b'{"size":9}', "400", "media_type: field required"),
        (b'{"size":0,"media_type":"image/png"}', "400", "size: "),
        (b'{"size":9,"media_type":"text/html"}', "400", "media_type: "),
        (b'{"size":9,"media_type":"image/png","key":"a"}', "400", "key: there is no such field"),
        (b'{"size":99999999,"media_type":"image/png"}', "413", "size: the image has more than"),
    ],
    ids=[
        *("no JSON", "no body", "no object", "no type", "no bytes", "other type", "own key"),
        "too large",
    ],
)
async def test_an_invalid_upload_request_gets_a_service_error(
    scene: Scene, caller: Caller, body: bytes, code: str, text: str
) -> None:
    await scene.start()
    reply = await caller.client.request(f"{scene.subjects.root}.upload", body, timeout=WITHIN)
    headers = reply.headers or {}
    assert headers["Nats-Service-Error-Code"] == code
    assert text in headers["Nats-Service-Error"]
    assert json.loads(reply.data)["error"]["code"] == code


async def test_an_upload_is_refused_with_a_sentence(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_of(scene) as client:
        with pytest.raises(NoWorker, match="no worker is running that could sign the upload"):
            await client.upload(encoded((8, 8)))
        await scene.start(CONSUMER_MAX_INPUT_BYTES="100")
        with pytest.raises(UploadFailed, match="the image has more than 100 bytes"):
            await client.upload(encoded((64, 64)))
        with pytest.raises(RequestInvalid, match="not a PNG, JPEG or WebP file"):
            await client.upload(b"GIF89a")
        with pytest.raises(RequestInvalid, match=r"missing\.png: No such file"):
            await client.upload(Path("missing.png"))


# -- images of the client -------------------------------------------------------------------------


async def test_each_form_of_an_image_is_accepted(describer: Scene, tmp_path: Path) -> None:
    small = encoded((32, 16), "PNG")
    file = tmp_path / "small.png"
    file.write_bytes(small)
    async with client_of(describer) as client:
        reference = await client.upload(small)
        uri = f"s3://{reference.bucket}/{reference.key}"
        inline = InlineImage(base64=images.inline(small).base64)
        alone = [small, bytearray(small), file, reference, uri, inline, Image.open(file)]
        for image in alone:
            assert text_of(await client.image_to_text("What?", image)) == "1 images", image
        assert text_of(await client.image_to_text("What?", alone)) == "7 images"


async def test_a_result_and_its_outputs_are_images(describer: Scene) -> None:
    describer.task = Task.TEXT_TO_IMAGE
    await describer.apply()
    await describer.start("none")
    async with client_of(describer) as client:
        drawn = await client.text_to_image("a", num_images=2)
        assert text_of(await client.image_to_text("What?", drawn)) == "2 images"
        assert text_of(await client.image_to_text("What?", drawn.outputs)) == "2 images"
        assert text_of(await client.image_to_text("What?", drawn.outputs[0])) == "1 images"
        text = await client.image_to_text("What?", drawn)
        with pytest.raises(RequestInvalid, match="the result has no image"):
            await client.image_to_text("What?", text)


async def test_a_photo_of_12_megapixels_is_scaled_into_the_request(describer: Scene) -> None:
    photo = encoded((4000, 3000), quality=60)
    assert len(photo) > 5_000_000
    request = ImageToTextRequest(prompt="What?", images=("s3://bucket/key",))
    async with client_of(describer) as client:
        fitting = await client.with_images(request, photo)
        (image,) = fitting.images
        assert isinstance(image, InlineImage)
        assert text_of(await client.run(fitting)) == "1 images"
        (uploaded,) = (await client.with_images(request, photo, upload=True)).images
        assert isinstance(uploaded, ArtifactReference)
        assert await describer.object(uploaded.model_dump()) == photo


async def test_a_photo_is_uploaded_without_pillow(
    describer: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "scaled", lambda _: None)
    photo = encoded((1600, 1000))
    request = ImageToTextRequest(prompt="What?", images=("s3://bucket/key",))
    async with client_of(describer) as client:
        (image,) = (await client.with_images(request, photo)).images
        assert isinstance(image, ArtifactReference)
        assert text_of(await client.image_to_text("What?", [photo, photo])) == "2 images"


async def test_a_store_that_is_away_is_named(scene: Scene) -> None:
    await scene.start(S3_PUBLIC_ENDPOINT="http://127.0.0.1:1")
    async with client_of(scene) as client:
        with pytest.raises(UploadFailed, match=r"http://127\.0\.0\.1:1/.*: Client"):
            await asyncio.wait_for(client.upload(encoded((8, 8))), WITHIN)
