"""Bad input leads to one failed event and, for some codes, to a dead letter.

The tests publish each case with plain nats-py. A valid request follows each case.
"""

import asyncio
import base64
import io
import json
import struct
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from minio import Minio
from nats.aio.client import Client
from nats.errors import TimeoutError as NatsTimeout
from PIL import Image

from consumer.devstack import Daemon, DevStack
from tests.e2e.conftest import LogOf
from tests.e2e.senders import (
    WITHIN,
    dead_letter_of,
    new_id,
    publish_and_wait,
    run_request,
    wait_until_settled,
)
from tests.support.tiny_models import Folder

SECRET_PROMPT = "xyzzy-the-prompt"  # must not appear in messages and logs


@dataclass(frozen=True)
class Bad:
    """A bad request and its expected failure."""

    task: str
    fields: dict[str, Any]
    code: str
    message: str  # part of the failure's message
    dead_letter: bool = True
    headers: dict[str, str] = field(default_factory=dict)


def image_request(**fields: Any) -> dict[str, Any]:
    return {"prompt": SECRET_PROMPT, "steps": 2, **fields}


def question(*images: Any, **fields: Any) -> dict[str, Any]:
    return {"prompt": SECRET_PROMPT, "images": list(images), "max_new_tokens": 2, **fields}


def inline(data: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(data).decode()}


def truncated_png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return file.getvalue()[:-200]


def png_claiming(width: int, height: int) -> bytes:
    """Return a valid file of a few kilobytes that decodes to width times height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * ((width // 8 + 1) * height), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


T2I, I2T = "text_to_image", "image_to_text"
INVALID = "invalid_request"
CASES = {
    "an unknown field": Bad(T2I, image_request(wdith=64), INVALID, "wdith: there is no such field"),
    "a wrong type": Bad(
        T2I, image_request(width="64"), INVALID, "width: input should be a valid integer"
    ),
    "no prompt": Bad(T2I, {"steps": 2}, INVALID, "prompt: field required"),
    "a width of 100000": Bad(
        T2I, image_request(width=100_000), INVALID, "less than or equal to 4096"
    ),
    "no images": Bad(I2T, question(), INVALID, "images: tuple should have at least 1 item"),
    "a text over the limit": Bad(T2I, {"prompt": "x" * 8_001}, INVALID, "at most 8000"),
    "a reply subject of the JetStream API": Bad(
        T2I,
        image_request(reply_to="$JS.API.STREAM.DELETE.GENERATION_REQUESTS_TEXT_TO_IMAGE"),
        INVALID,
        "reply_to",
    ),
    "a reply subject of the JetStream API in the header": Bad(
        T2I,
        image_request(),
        INVALID,
        "reply_to",
        headers={"Reply-To": "$JS.API.STREAM.DELETE.GENERATION_REQUESTS_TEXT_TO_IMAGE"},
    ),
    "a reply subject of 5,000 characters": Bad(
        T2I, image_request(reply_to="_INBOX." + "x" * 5_000), INVALID, "reply_to"
    ),
    "a reply subject that is a request subject": Bad(
        T2I, image_request(reply_to="generation.request.text_to_image"), INVALID, "reply_to"
    ),
    "a reply subject under no allowed prefix": Bad(
        T2I, image_request(reply_to="accounts.delete"), INVALID, "reply_to"
    ),
    "a file URL": Bad(I2T, question("file:///etc/passwd"), INVALID, "images.0: must be"),
    "an image in another bucket": Bad(
        I2T,
        question({"bucket": "other-bucket", "key": "a.png"}),
        "input_unavailable",
        "images.0",
        dead_letter=False,
    ),
    "an http URL": Bad(
        I2T,
        question("http://127.0.0.1:1/a.png"),
        "input_unavailable",
        "images.0: http inputs are not enabled",
        dead_letter=False,
    ),
    "an object that does not exist": Bad(
        I2T,
        question({"bucket": "generation", "key": "text_to_image/none/0.png"}),
        "input_unavailable",
        "images.0",
        dead_letter=False,
    ),
    "a truncated PNG": Bad(
        I2T, question(inline(truncated_png())), "input_unavailable", "images.0", dead_letter=False
    ),
    "a decompression bomb": Bad(
        I2T,
        question(inline(png_claiming(30_000, 30_000))),
        "input_unavailable",
        "images.0",
        dead_letter=False,
    ),
    "an adapter that the worker does not have": Bad(
        T2I,
        image_request(adapters={"ink": 1}),
        "unsupported_parameter",
        "adapters",
        dead_letter=False,
    ),
    "a width that the model cannot draw": Bad(
        T2I, image_request(width=65), "unsupported_parameter", "width", dead_letter=False
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_bad_input_leads_to_a_failed_event(name: str, sender: Client, log_of: LogOf) -> None:
    bad, request_id = CASES[name], new_id()
    body = json.dumps({**bad.fields, "request_id": request_id}).encode()
    event = await publish_and_wait(
        sender,
        f"generation.request.{bad.task}",
        body,
        result=f"generation.result.{bad.task}.{request_id}",
        headers=bad.headers or None,
    )
    assert event["type"] == "generation.v1.failed"
    assert event["failure"]["code"] == bad.code
    assert bad.message in event["failure"]["message"]
    assert SECRET_PROMPT not in json.dumps(event)
    if bad.dead_letter:
        letter = await dead_letter_of(sender, bad.task, request_id)
        assert letter.data == body
        assert letter.headers["Dead-Letter-Code"] == bad.code
    await assert_still_serving(sender, bad.task)
    assert SECRET_PROMPT not in log_of(bad.task)


async def assert_still_serving(sender: Client, task: str) -> None:
    good = inline(png_claiming(32, 32))
    fields = image_request() if task == T2I else question(good)
    event = await run_request(sender, task, **fields)
    assert event["type"] == "generation.v1.succeeded", event
    await wait_until_settled(sender)


async def test_a_body_without_json_fails_under_the_message_id(sender: Client) -> None:
    request_id = new_id()
    event = await publish_and_wait(
        sender,
        "generation.request.text_to_image",
        b"\x00\xffno json",
        result=f"generation.result.text_to_image.{request_id}",
        headers={"Nats-Msg-Id": request_id},
    )
    assert event["failure"]["code"] == "invalid_request"
    assert event["failure"]["message"] == "the body is not JSON"
    letter = await dead_letter_of(sender, T2I, request_id)
    assert letter.data == b"\x00\xffno json"
    assert letter.headers["Original-Nats-Msg-Id"] == request_id
    await assert_still_serving(sender, T2I)


async def test_an_invalid_id_fails_on_the_reply_subject(sender: Client) -> None:
    reply_to = sender.new_inbox()
    body = json.dumps(image_request(request_id="a.b", reply_to=reply_to)).encode()
    event = await publish_and_wait(
        sender, "generation.request.text_to_image", body, result=reply_to
    )
    assert event["failure"]["code"] == "invalid_request"
    assert event["failure"]["message"].startswith("request_id: ")
    assert event["request_id"].startswith("GENERATION_REQUESTS_TEXT_TO_IMAGE-")  # derived
    letter = await dead_letter_of(sender, T2I, event["request_id"])
    assert letter.data == body
    await assert_still_serving(sender, T2I)


@pytest.mark.parametrize("location", ["body", "header"])
async def test_an_invalid_id_in_the_subject_fails_on_the_reply_subject(
    sender: Client, location: str
) -> None:
    reply_to = sender.new_inbox()
    in_body = {"reply_to": reply_to} if location == "body" else {}
    event = await publish_and_wait(
        sender,
        "generation.request.text_to_image.img@42",
        json.dumps(image_request(**in_body)).encode(),
        result=reply_to,
        headers={"Reply-To": reply_to} if location == "header" else None,
    )
    message = event["failure"]["message"]
    assert message.startswith("the subject's last token is not a request id: 1-64")
    assert event["request_id"].startswith("GENERATION_REQUESTS_TEXT_TO_IMAGE-")  # derived


async def test_a_wildcard_as_id_does_not_reach_other_results(sender: Client) -> None:
    results = await sender.subscribe("generation.result.text_to_image.>")
    await sender.jetstream().publish(
        "generation.request.text_to_image", json.dumps(image_request(request_id=">")).encode()
    )
    message = await results.next_msg(timeout=WITHIN)
    assert message.subject.startswith(
        "generation.result.text_to_image.GENERATION_REQUESTS_TEXT_TO_IMAGE-"
    )
    assert json.loads(message.data)["failure"]["code"] == "invalid_request"


async def test_no_event_is_published_to_a_forbidden_reply_subject(sender: Client) -> None:
    for reply_to in (
        "$JS.API.STREAM.DELETE.GENERATION_RESULTS",
        "generation.request.text_to_image",
        "accounts.delete",
    ):
        replies = await sender.subscribe(reply_to)
        await sender.flush()
        await run_request(sender, T2I, **image_request(reply_to=reply_to))
        published = 1 if reply_to == "generation.request.text_to_image" else 0  # the request itself
        for _ in range(published):
            await replies.next_msg(timeout=WITHIN)
        # The worker would publish the reply before the stored event, on the same connection.
        with pytest.raises(NatsTimeout):
            await replies.next_msg(timeout=0.2)
        await replies.unsubscribe()
    names = {info.config.name for info in await sender.jetstream().streams_info()}
    assert {
        "GENERATION_REQUESTS_TEXT_TO_IMAGE",
        "GENERATION_RESULTS",
        "GENERATION_DEAD_LETTERS",
    } <= names


async def test_an_object_that_is_no_image_is_an_input_error(
    sender: Client, plain_s3: Minio, system: DevStack
) -> None:
    key = f"text_to_image/{new_id()}/0.png"
    plain_s3.put_object(system.store.bucket, key, io.BytesIO(b"hello"), 5, "image/png")
    event = await run_request(sender, I2T, **question({"bucket": system.store.bucket, "key": key}))
    assert event["failure"]["code"] == "input_unavailable"
    assert event["failure"]["message"].startswith("images.0: ")


@pytest.fixture
async def flux(system: DevStack, model_folder: Folder) -> AsyncIterator[Daemon]:
    """A worker with a separate subject root and a model without negative prompts."""
    settings = {
        "MODEL_TYPE": T2I,
        "MODEL_ID": str(model_folder("flux")),
        "CONSUMER_SUBJECT_ROOT": "flux",
        "OMP_NUM_THREADS": "1",
    }
    daemon = system.start_daemon("flux", settings)
    await asyncio.to_thread(daemon.wait_ready)
    yield daemon
    daemon.stop()


@pytest.mark.usefixtures("flux")
async def test_a_parameter_that_the_model_does_not_support_is_refused(sender: Client) -> None:
    request_id = new_id()
    body = json.dumps(image_request(request_id=request_id, negative_prompt="blue")).encode()
    event = await publish_and_wait(
        sender,
        f"flux.request.{T2I}",
        body,
        result=f"flux.result.{T2I}.{request_id}",
    )
    assert event["failure"]["code"] == "unsupported_parameter"
    assert event["failure"]["details"] == {"parameter": "negative_prompt"}
    good = await publish_and_wait(
        sender,
        f"flux.request.{T2I}.{new_id()}",
        json.dumps(image_request(width=64, height=64)).encode(),
        result=f"flux.result.{T2I}.*",
    )
    assert good["type"] == "generation.v1.succeeded", good


# Messages that the server stores but nats-py cannot decode.
UNDECODABLE = {
    "a header block without an end": (b"", b"NATS/1.0"),
    "a header block that is no text": (b"", b"NATS/1.0 \xff\xfe: \xff\r\n\r\n"),
    "a subject that is no text": (b".\xff\xfe", b""),
}


@pytest.mark.parametrize("name", UNDECODABLE)
async def test_bytes_that_nats_py_cannot_decode_do_not_stop_the_queue(
    name: str, system: DevStack, sender: Client
) -> None:
    subject, headers = UNDECODABLE[name]
    body = json.dumps(image_request()).encode()
    results = await sender.subscribe(f"generation.result.{T2I}.>")
    await sender.flush()
    await publish_raw(system, b"generation.request.text_to_image" + subject, headers, body)
    event = json.loads((await results.next_msg(timeout=WITHIN)).data)
    if subject:  # the subject has no valid id; unreadable headers count as no headers
        assert event["failure"]["code"] == "invalid_request"
    else:
        assert event["type"] == "generation.v1.succeeded", event
    await assert_still_serving(sender, T2I)


async def publish_raw(system: DevStack, subject: bytes, headers: bytes, body: bytes) -> None:
    """Publish invalid bytes without a client library, and wait until the server has them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", system.nats.ports["client"])
    await reader.readline()  # INFO
    writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
    if headers:
        sizes = b"%d %d" % (len(headers), len(headers) + len(body))
        writer.write(b"HPUB %s %s\r\n%s%s\r\n" % (subject, sizes, headers, body))
    else:
        writer.write(b"PUB %s %d\r\n%s\r\n" % (subject, len(body), body))
    writer.write(b"PING\r\n")
    assert await reader.readline() == b"PONG\r\n"
    writer.close()
    await writer.wait_closed()
