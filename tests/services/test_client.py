"""The client library on real servers and a real daemon process with a quick model."""

import asyncio
import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from typing import Any

import nats
import pytest
from nats.aio.msg import Msg
from PIL import Image

from consumer.devstack import NatsServer, free_ports
from generation_client import (
    DownloadFailed,
    GenerationClient,
    GenerationError,
    NoWorker,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    RequestIdTaken,
    RequestInvalid,
    RequestTooLarge,
    ServiceUnavailable,
    UnsupportedMessage,
    lookup,
    submitting,
)
from generation_client import client as client_module
from generation_contracts import (
    CancelledEvent,
    ImageArtifact,
    InlineImage,
    ProgressEvent,
    StartedEvent,
    SucceededEvent,
    Task,
    TextOutput,
    TextToImageRequest,
    TextToImageStep,
)
from tests.conftest import StartNats
from tests.support.scene import WITHIN, Scene


def png_base64() -> str:
    """Return a small PNG as base64."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def client_of(scene: Scene) -> GenerationClient:
    return GenerationClient(scene.stack.nats.url, root=scene.subjects.root)


async def test_an_image_request_reports_progress_and_can_be_downloaded(scene: Scene) -> None:
    await scene.start("slow_steps")
    events = []
    async with client_of(scene) as client:
        result = await client.text_to_image(
            "a red circle", num_inference_steps=3, on_event=events.append
        )
        (image,) = result.outputs
        assert isinstance(image, ImageArtifact)
        data = await client.download(image)
    assert hashlib.sha256(data).hexdigest() == image.sha256
    assert isinstance(events[0], StartedEvent)
    steps = [event.step for event in events if isinstance(event, ProgressEvent)]
    assert steps
    assert steps == sorted(steps)
    assert events[-1] == result


async def test_a_text_request_returns_a_text(scene: Scene) -> None:
    scene.task = Task.IMAGE_TO_TEXT
    await scene.apply()
    await scene.start("none")
    async with client_of(scene) as client:
        result = await client.image_to_text("What is it?", [InlineImage(base64=png_base64())])
    (output,) = result.outputs
    assert isinstance(output, TextOutput)
    assert output.text == "1 images"


async def test_another_client_can_fetch_the_result_of_a_submitted_request(scene: Scene) -> None:
    async with client_of(scene) as client:
        request_id = await client.submit(TextToImageRequest(prompt="a"))
        assert await client.submit(TextToImageRequest(prompt="a", request_id=request_id))
    async with client_of(scene) as client:
        with pytest.raises(TimeoutError):
            await client.result(Task.TEXT_TO_IMAGE, request_id, within=0)
        waiting = asyncio.ensure_future(client.result("text_to_image", request_id))
        await scene.start()
        event = await waiting
        assert isinstance(event, SucceededEvent)
        await scene.event(request_id)  # subscribers receive the event shortly before it is stored
        assert await client.result(Task.TEXT_TO_IMAGE, request_id, within=0) == event
    assert scene.runs() == [request_id]


async def test_waiting_for_a_cancelled_request_raises_an_error(scene: Scene) -> None:
    await scene.start("slow_steps")
    async with client_of(scene) as client:
        request = TextToImageRequest(prompt="a", num_inference_steps=200, request_id="long")
        running = asyncio.ensure_future(client.run(request))
        await scene.until_noted("steps", 1)
        assert (await client.cancel("long")).status == "stopping"
        with pytest.raises(RequestCancelled) as cancelled:
            await running
        assert isinstance(cancelled.value.event, CancelledEvent)
        assert await client.ended("long") == "generation.v1.cancelled"


async def test_a_failed_request_raises_an_error_with_its_event(scene: Scene) -> None:
    await scene.start("raising")
    async with client_of(scene) as client:
        with pytest.raises(RequestFailed) as failed:
            await client.text_to_image("a")
    assert failed.value.event.failure.code == "model_error"
    assert "model_error" in str(failed.value)


async def test_each_failed_submission_raises_its_error(scene: Scene) -> None:
    async with client_of(scene) as client:
        for invalid in (
            client.text_to_image(""),
            client.text_to_image("a", seed=-3),
            client.text_to_image("a", widht=64),
            client.image_to_text("a", "no-uri"),
            client.image_to_text("a", []),
            client.text_to_image("a", then=[TextToImageStep(task="text_to_image", prompt="$text")]),
        ):
            with pytest.raises(RequestInvalid) as caught:
                await invalid
            assert isinstance(caught.value, GenerationError)
            assert isinstance(caught.value, ValueError)
            assert caught.value.problems
        with pytest.raises(RequestTooLarge, match="too large for NATS: upload its images"):
            await client.image_to_text("a", [InlineImage(base64="A" * 2**20)])
        with pytest.raises(NoWorker):
            await client.cancel("unknown")
        jetstream = scene.sender.jetstream()
        config = (await jetstream.stream_info(scene.subjects.requests_stream(scene.task))).config
        await jetstream.update_stream(config.evolve(max_msgs=1))
        await client.submit(TextToImageRequest(prompt="a"))
        with pytest.raises(QueueFull):
            await client.submit(TextToImageRequest(prompt="a"))
    with pytest.raises(ServiceUnavailable):
        await client_of(scene).submit(TextToImageRequest(prompt="a"))
    with pytest.raises(ServiceUnavailable):
        async with GenerationClient(scene.stack.nats.url, root="nowhere") as client:
            await client.submit(TextToImageRequest(prompt="a"))


async def test_a_refused_connection_is_reported_with_its_address() -> None:
    (port,) = free_ports(1)
    async with asyncio.timeout(WITHIN):
        with pytest.raises(ServiceUnavailable) as caught:
            async with GenerationClient(f"nats://me:secret@127.0.0.1:{port}"):
                raise AssertionError("it must not connect")
    assert f"NATS: cannot connect to nats://127.0.0.1:{port}: " in str(caught.value)
    assert "Connect call failed" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_an_id_of_another_request_raises_an_error(scene: Scene) -> None:
    await scene.start()
    async with client_of(scene) as client:
        first = await client.text_to_image("a", request_id="taken")
        assert await client.text_to_image("a", request_id="taken") == first
        with pytest.raises(RequestIdTaken):
            await client.text_to_image("b", request_id="taken")


async def test_a_download_that_differs_from_the_event_is_refused(scene: Scene) -> None:
    await scene.start()
    async with client_of(scene) as client:
        (image,) = (await client.text_to_image("a")).outputs
        assert isinstance(image, ImageArtifact)
        with pytest.raises(DownloadFailed, match="differ from the stored"):
            await client.download(image.model_copy(update={"sha256": "0" * 64}))
        missing = image.model_copy(update={"url": image.url.replace(image.key, "gone.png")})
        with pytest.raises(DownloadFailed) as failed:
            await client.download(missing)
    assert "Signature" not in str(failed.value)


async def test_a_result_arrives_after_a_restart_of_the_server(scene: Scene) -> None:
    await scene.start("held_in_run")
    async with client_of(scene) as client:
        running = asyncio.ensure_future(client.text_to_image("a"))
        await scene.until_noted("run")
        scene.stack.nats.kill()
        scene.stack.nats.start()
        await asyncio.to_thread(scene.stack.nats.wait_ready)
        (scene.folder / "run.go").touch()
        assert (await running).outputs


def test_the_client_imports_no_library_of_the_daemon() -> None:
    code = (
        "import sys, generation_client; print(sorted({'torch', 'consumer'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- unreadable and foreign messages --------------------------------------------------------------


def event_of(request_id: str, **fields: Any) -> dict[str, Any]:
    """Return a failed event, as a worker publishes it."""
    return {
        "type": "generation.v1.failed",
        "request_id": request_id,
        "task": "text_to_image",
        "sequence": 1,
        "time": "2026-01-02T03:04:05Z",
        "worker": "w",
        "attempt": 1,
        "request_digest": f"sha256:{'0' * 64}",
        "failure": {"code": "internal", "message": "no", "retryable": True},
        **fields,
    }


NEWER = {
    "type": ({"type": "generation.v2.failed"}, r"generation\.v2\.failed"),
    "code": (
        {"failure": {"code": "new", "message": "", "retryable": False}},
        r"generation\.v1\.failed \(failure\.code\)",
    ),
    "form": ({"type": "generation.v2.done", "task": None}, r"generation\.v2\.done"),
}


@pytest.mark.parametrize(("fields", "message"), NEWER.values(), ids=NEWER.keys())
async def test_a_result_of_a_later_version_raises_unsupported_message(
    scene: Scene, fields: dict[str, Any], message: str
) -> None:
    """The error is raised while waiting and afterwards. Unknown transient events are skipped."""
    event = {name: value for name, value in event_of("a", **fields).items() if value is not None}
    body = json.dumps(event).encode()
    async with client_of(scene) as client:
        waiting = asyncio.ensure_future(client.text_to_image("a", request_id="a"))
        await queued(scene, 1)
        newer = json.dumps({**event, "type": "generation.v2.progress"}).encode()
        await scene.sender.publish(scene.subjects.progress(scene.task, "a"), newer)
        await scene.sender.jetstream().publish(scene.subjects.result(scene.task, "a"), body)
        with pytest.raises(UnsupportedMessage, match=message) as raised:
            await asyncio.wait_for(waiting, WITHIN)
        assert (raised.value.type, raised.value.body) == (event["type"], body)
        for within in (0, WITHIN):
            with pytest.raises(UnsupportedMessage, match=message):
                await client.result(scene.task, "a", within=within)


async def queued(scene: Scene, count: int) -> None:
    """Wait until the queue stores a number of requests."""

    async def there() -> bool:
        return await scene.pending() == count

    await scene.until(there, f"{count} requests")


async def test_the_request_command_reports_a_result_of_a_later_version(scene: Scene) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "consumer", "request", "text-to-image", "a", "--id", "a"),
        env={**os.environ, **scene.settings()},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await queued(scene, 1)
    body = json.dumps(event_of("a", type="generation.v2.failed")).encode()
    await scene.sender.jetstream().publish(scene.subjects.result(scene.task, "a"), body)
    _, errors = await asyncio.wait_for(process.communicate(), WITHIN)
    assert process.returncode == 1
    line = errors.decode().splitlines()[-1]
    assert "cannot read generation.v2.failed" in line


async def test_other_messages_under_the_result_subject_are_ignored(scene: Scene) -> None:
    """Server replies, events of other requests and junk under the result subject."""
    subject = scene.subjects.result(scene.task, "a")
    junk = [
        b"",
        b"\xff",
        b'{"stream":"S","seq":1}',
        b'["generation.v1.failed"]',
        b'{"type":"generation.v2.failed","request_id":"b"}',
        json.dumps(event_of("b")).encode(),
        json.dumps(event_of("a", task="image_to_text")).encode(),
        json.dumps({**event_of("a"), "type": "generation.v1.started"}).encode(),
    ]
    jetstream = scene.sender.jetstream()
    stream = scene.subjects.results_stream
    async with client_of(scene) as client:
        waiting = asyncio.ensure_future(client.result(scene.task, "a", within=WITHIN))
        for body in junk:
            stored = await jetstream.publish(subject, body)
            with pytest.raises(TimeoutError):
                await client.result(scene.task, "a", within=0)
            await jetstream.delete_msg(stream, stored.seq)
        assert not waiting.done()
        await jetstream.publish(subject, json.dumps(event_of("a")).encode())
        assert (await waiting).type == "generation.v1.failed"


async def test_the_message_id_of_a_request_cannot_be_guessed(scene: Scene) -> None:
    """A sender that knows a request id cannot cause the request to be dropped as a duplicate."""
    async with client_of(scene) as client, client_of(scene) as other:
        subject = scene.subjects.request(scene.task, "a")
        for guess in ("a", "text_to_image.a", "text_to_image.a.", "image_to_text.a"):
            await scene.sender.jetstream().publish(subject, b"{}", headers={"Nats-Msg-Id": guess})
        request = TextToImageRequest(prompt="a", request_id="a")
        before = await scene.pending()
        for _ in range(2):
            await client.submit(request)
        assert await scene.pending() == before + 1, (
            "the second submission of one client is a duplicate"
        )
        await other.submit(request)
        await client.submit(TextToImageRequest(prompt="b", request_id="a"))
        assert await scene.pending() == before + 3, (
            "other clients and other requests are no duplicates"
        )


# -- missing permissions, streams and connections -------------------------------------------------

INBOX = "_INBOX_sender"
RESULTS = "generation.result.>"
LOOKUP = "$JS.API.STREAM.MSG.GET.GENERATION_RESULTS"
REQUEST = "generation.request.*.*"
CANCEL = "generation.cancel.*"


def restricted(publish: list[str], subscribe: list[str]) -> str:
    """Return a server configuration with a restricted sender and an administrator."""
    permissions = json.dumps({"publish": publish, "subscribe": subscribe})
    return (
        "accounts { A { jetstream: enabled, users: [{user: admin, password: x}, "
        f"{{user: sender, password: x, permissions: {permissions}}}] }} }}"
    )


@pytest.mark.parametrize(
    ("publish", "subscribe", "subject"),
    [
        ([REQUEST], [f"{INBOX}.>", RESULTS], LOOKUP),
        ([REQUEST, LOOKUP], [f"{INBOX}.>"], "generation.result.text_to_image.a"),
        ([REQUEST, LOOKUP], [RESULTS], f"{INBOX}.>"),
        ([LOOKUP], [f"{INBOX}.>", RESULTS], "generation.request.text_to_image.a"),
    ],
)
async def test_a_missing_permission_is_named_in_the_error(
    start_nats: StartNats,
    monkeypatch: pytest.MonkeyPatch,
    publish: list[str],
    subscribe: list[str],
    subject: str,
) -> None:
    monkeypatch.setattr(lookup, "LOOKUP_TIMEOUT", 0.5)
    monkeypatch.setattr(submitting, "PUBLISH_TIMEOUT", 0.5)
    monkeypatch.setattr(client_module, "ENDPOINT_TIMEOUT", 0.5)
    server = start_nats(restricted(publish, subscribe))
    await make_streams(server.url, "GENERATION_RESULTS", "GENERATION_REQUESTS_TEXT_TO_IMAGE")
    options = {"user": "sender", "password": "x", "inbox_prefix": INBOX}
    async with GenerationClient(server.url, **options) as client:
        with pytest.raises(ServiceUnavailable, match=re.escape(f"to {subject}")) as raised:
            await asyncio.wait_for(client.text_to_image("a", request_id="a"), WITHIN)
        assert "\n" not in str(raised.value)
        with pytest.raises(ServiceUnavailable, match=r"not publish to generation\.cancel\.a"):
            await client.cancel("a")


async def make_streams(url: str, *names: str) -> None:
    """Create streams as the administrator."""
    client = await nats.connect(url, user="admin", password="x")
    subjects = {"GENERATION_RESULTS": "generation.result.>"}
    for name in names:
        await client.jetstream().add_stream(
            name=name, subjects=[subjects.get(name, "generation.request.>")]
        )
    await client.close()


async def test_a_missing_stream_is_named_in_the_error(scene: Scene) -> None:
    async with GenerationClient(scene.stack.nats.url, root="nowhere") as client:
        for within in (0, WITHIN):
            with pytest.raises(ServiceUnavailable, match="NOWHERE_RESULTS; run `consumer apply`"):
                await client.result(scene.task, "a", within=within)


async def test_a_long_outage_ends_the_wait_for_a_result(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "LOOKUP_TIMEOUT", 0.2)
    monkeypatch.setattr(client_module, "LOOKUP_INTERVAL", 0.1)
    setup = await nats.connect(nats_server.url)
    await setup.jetstream().add_stream(name="GENERATION_RESULTS", subjects=[RESULTS])
    await setup.close()
    async with GenerationClient(nats_server.url, max_outage=0.5) as client:
        waiting = asyncio.ensure_future(client.result("text_to_image", "a"))
        await asyncio.wait({waiting}, timeout=1.0)
        assert not waiting.done(), "a reply without a result is no outage"
        nats_server.kill()
        with pytest.raises(ServiceUnavailable, match="no answer from the results stream"):
            await asyncio.wait_for(waiting, WITHIN)
        with pytest.raises(ServiceUnavailable, match="no answer from the results stream"):
            await client.result("text_to_image", "a", within=0)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (b'{"error":{"code":"503","description":"no way"}}', ServiceUnavailable, "no way"),
        (b'{"request_id":"a","status":"paused"}', UnsupportedMessage, r"CancelReply \(status\)"),
        (b"hello", ServiceUnavailable, "not from a worker"),
    ],
)
async def test_an_invalid_reply_to_a_cancellation_raises_an_error(
    scene: Scene, answer: bytes, error: type[Exception], message: str
) -> None:
    async def respond(message: Msg) -> None:
        await message.respond(answer)

    await scene.sender.subscribe(scene.subjects.cancels, cb=respond)
    await scene.sender.flush()
    async with client_of(scene) as client:
        with pytest.raises(error, match=message):
            await client.cancel("a")


async def test_the_message_id_of_a_call_cannot_be_guessed(scene: Scene) -> None:
    """A caller with a known inbox and a known id still gets its reply."""
    await scene.start()
    inbox, request = "_INBOX.known", {"prompt": "a", "request_id": "known"}
    for guess in (f"{scene.task}.known.{inbox}", f"{scene.task}.known", f"known.{inbox}", "known"):
        await scene.publish({**request, "request_id": "other"}, {"Nats-Msg-Id": guess})
    answers = await scene.sender.subscribe(inbox)
    subject = scene.subjects.call(scene.task)
    await scene.sender.publish(subject, json.dumps(request).encode(), reply=inbox)
    answer = json.loads((await answers.next_msg(WITHIN)).data)
    assert (answer["type"], answer["request_id"]) == ("generation.v1.succeeded", "known")


async def test_a_cancellation_that_a_library_drops_ends_the_wait(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11's asyncio.wait_for does so if its result arrives at the same time."""
    reading = asyncio.Event()

    async def drops_the_cancellation(*_: object) -> None:
        reading.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    monkeypatch.setattr(client_module, "stored_result", drops_the_cancellation)
    async with GenerationClient(nats_server.url) as client:
        waiting = asyncio.ensure_future(client.result(Task.TEXT_TO_IMAGE, "one"))
        await reading.wait()
        waiting.cancel()
        await asyncio.wait({waiting}, timeout=WITHIN)
        assert waiting.cancelled()
        reading.clear()
        with pytest.raises(TimeoutError):
            await client.result(Task.TEXT_TO_IMAGE, "one", within=0.05)
