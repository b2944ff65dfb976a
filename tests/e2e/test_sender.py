"""A sender without code of this project: publish, subscribe, download, compare."""

import base64
import hashlib
import io
import json
from datetime import datetime
from typing import Any

import aiohttp
from minio import Minio
from nats.aio.client import Client
from PIL import Image

from consumer.devstack import DevStack
from tests.e2e.senders import WITHIN, new_id, run_request


def png(color: tuple[int, int, int], size: tuple[int, int] = (56, 84)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


async def test_a_result_is_published_on_both_subjects_and_stored(
    sender: Client, plain_s3: Minio
) -> None:
    request_id, reply_to = new_id(), sender.new_inbox()
    stored = await sender.subscribe(f"generation.result.text_to_image.{request_id}")
    replied = await sender.subscribe(reply_to)
    transient = await sender.subscribe(f"generation.progress.text_to_image.{request_id}")
    await sender.flush()
    request = {
        "request_id": request_id,
        "reply_to": reply_to,
        "prompt": "a red circle",
        "width": 64,
        "height": 96,
        "steps": 3,
        "seed": 7,
        "metadata": {"order": "4711"},
    }
    acknowledged = await sender.jetstream().publish(
        "generation.request.text_to_image", json.dumps(request).encode()
    )
    assert acknowledged.stream == "GENERATION_REQUESTS_TEXT_TO_IMAGE"

    message = await stored.next_msg(timeout=WITHIN)
    answer = await replied.next_msg(timeout=WITHIN)
    event = json.loads(message.data)
    assert json.loads(answer.data) == event
    assert event["type"] == "generation.v1.succeeded"
    assert event["metadata"] == {"order": "4711"}
    assert event["attempt"] == 1
    assert_cloud_event(message.headers or {}, event)
    assert "Nats-Msg-Id" not in (answer.headers or {})

    started = json.loads((await transient.next_msg(timeout=WITHIN)).data)
    assert started["type"] == "generation.v1.started"
    assert started["sequence"] < event["sequence"]

    (output,) = event["outputs"]
    assert output["seed"] == 7
    body = plain_s3.get_object(output["bucket"], output["key"]).read()
    name = f"0-{output['sha256'][:8]}.png"
    assert output["key"] == f"text_to_image/{request_id}/{name}"
    assert hashlib.sha256(body).hexdigest() == output["sha256"]
    assert len(body) == output["size"]
    image = Image.open(io.BytesIO(body))
    assert (image.width, image.height) == (64, 96) == (output["width"], output["height"])
    assert image.convert("RGB").getcolors(maxcolors=1) is None  # not blank
    text_chunks = image.text  # type: ignore[attr-defined] # an attribute of PNG images
    assert (text_chunks["request_id"], text_chunks["seed"]) == (request_id, "7")
    assert "prompt" not in text_chunks
    async with aiohttp.ClientSession() as session, session.get(output["url"]) as response:
        assert await response.read() == body
        assert response.headers["Content-Type"] == "image/png"


def assert_cloud_event(headers: dict[str, str], event: dict[str, Any]) -> None:
    assert headers["ce-specversion"] == "1.0"
    assert headers["ce-type"] == event["type"]
    assert headers["ce-subject"] == event["request_id"]
    assert headers["ce-id"] == f"{event['request_id']}.done"
    assert "Nats-Msg-Id" not in headers
    assert headers["ce-source"].endswith(event["worker"])
    assert datetime.fromisoformat(headers["ce-time"]).tzinfo is not None


async def test_two_images_by_reference_and_inline_are_described(
    sender: Client, plain_s3: Minio, system: DevStack
) -> None:
    key = f"text_to_image/{new_id()}/0.png"
    red = png((200, 0, 0))
    plain_s3.put_object(system.store.bucket, key, io.BytesIO(red), len(red), "image/png")
    reply_to = sender.new_inbox()
    replied = await sender.subscribe(reply_to)
    event = await run_request(
        sender,
        "image_to_text",
        reply_to=reply_to,
        prompt="What differs?",
        images=[
            {"bucket": system.store.bucket, "key": key},
            {"base64": base64.b64encode(png((0, 0, 200))).decode()},
        ],
        max_new_tokens=8,
    )
    assert event["type"] == "generation.v1.succeeded", event
    assert json.loads((await replied.next_msg(timeout=WITHIN)).data) == event
    (output,) = event["outputs"]
    assert output["kind"] == "text"
    assert isinstance(output["text"], str)
    assert output["finish_reason"] in {"stop", "length"}
    assert 0 < output["completion_tokens"] <= 8
    # A single image needs fewer prompt tokens, so the model received both images.
    alone = await run_request(
        sender,
        "image_to_text",
        prompt="What differs?",
        images=[f"s3://{system.store.bucket}/{key}"],
        max_new_tokens=8,
    )
    assert alone["outputs"][0]["prompt_tokens"] < output["prompt_tokens"]


async def test_an_output_can_be_described_by_its_reference(sender: Client) -> None:
    drawn = await run_request(sender, "text_to_image", prompt="a green square", steps=2)
    (image,) = drawn["outputs"]
    reference = {"bucket": image["bucket"], "key": image["key"]}
    described = await run_request(
        sender, "image_to_text", prompt="What is it?", images=[reference], max_new_tokens=4
    )
    assert described["type"] == "generation.v1.succeeded", described


async def test_each_image_of_a_request_has_a_seed(sender: Client, plain_s3: Minio) -> None:
    event = await run_request(
        sender, "text_to_image", prompt="dots", steps=2, num_images=2, seed=41, output_format="webp"
    )
    assert [o["seed"] for o in event["outputs"]] == [41, 42]
    bodies = [plain_s3.get_object(o["bucket"], o["key"]).read() for o in event["outputs"]]
    assert bodies[0] != bodies[1]
    assert [Image.open(io.BytesIO(body)).format for body in bodies] == ["WEBP", "WEBP"]


async def test_one_seed_reproduces_an_image(sender: Client, plain_s3: Minio) -> None:
    drawn = []
    for _ in range(2):
        event = await run_request(sender, "text_to_image", prompt="a boat", steps=2, seed=5)
        (output,) = event["outputs"]
        body = plain_s3.get_object(output["bucket"], output["key"]).read()
        drawn.append(Image.open(io.BytesIO(body)).tobytes())  # the metadata of the files differs
    assert drawn[0] == drawn[1]


async def test_a_copy_of_a_request_gets_the_stored_result_without_a_run(
    sender: Client,
) -> None:
    first = await run_request(sender, "text_to_image", prompt="once", steps=2)
    reply_to = sender.new_inbox()
    replied = await sender.subscribe(reply_to)
    await sender.flush()
    again = {"request_id": first["request_id"], "prompt": "once", "steps": 2, "reply_to": reply_to}
    await sender.jetstream().publish("generation.request.text_to_image", json.dumps(again).encode())
    answer = json.loads((await replied.next_msg(timeout=WITHIN)).data)
    assert answer == first


async def test_an_id_with_other_content_is_a_conflict(sender: Client) -> None:
    first = await run_request(sender, "text_to_image", prompt="mine", steps=2)
    reply_to = sender.new_inbox()
    replied = await sender.subscribe(reply_to)
    await sender.flush()
    other = {"request_id": first["request_id"], "prompt": "yours", "steps": 2, "reply_to": reply_to}
    await sender.jetstream().publish("generation.request.text_to_image", json.dumps(other).encode())
    answer = json.loads((await replied.next_msg(timeout=WITHIN)).data)
    assert answer["failure"]["code"] == "request_id_conflict"
    subject = f"generation.result.text_to_image.{first['request_id']}"
    stored = await sender.jetstream().get_last_msg("GENERATION_RESULTS", subject)
    assert json.loads(stored.data or b"") == first
