"""Messages of a publisher with arbitrary bytes in subject and reply subject."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from nats.aio.client import Client

from generation_contracts import Task
from tests.services.test_permissions import Installation, installed, start_worker
from tests.support.scene import POLL, WITHIN

PROMPT = b'{"prompt": "a"}'
# Vertical tab and form feed (spaces for nats-py), carriage return, invalid UTF-8.
BAD_BYTES = (b"\x0b", b"\x0c", b"\r", b"\x1c", b"\xff", b"\xc2\x85")
REQUEST = b"generation.request.text_to_image"
STORED = "GENERATION_REQUESTS_TEXT_TO_IMAGE"


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    # The lease is longer than the test, so that no redelivery hides an unhandled message.
    with installed(tmp_path_factory.mktemp("hostile"), ack_wait="120") as servers:
        yield servers


def hostile_lines(bad: bytes) -> list[bytes]:
    """Return every kind of message that a publisher may send, with invalid bytes."""
    subjects = [b"generation.cancel.a%sb", b"generation.call.a%sb", REQUEST + b".a%sb"]
    with_reply = [b"generation.cancel.a", b"generation.call.text_to_image", REQUEST + b".%d"]
    with_reply += [b"$SRV.PING.generation", b"$SRV.INFO.generation"]
    reply = b"_INBOX_sender.a" + bad + b"b"
    lines = [line.replace(b"%s", bad) + b" " for line in subjects]
    lines += [line.replace(b"%d", b"r%d" % bad[0]) + b" " + reply + b" " for line in with_reply]
    return [b"PUB %s%d\r\n%s\r\n" % (line, len(PROMPT), PROMPT) for line in lines]


async def finished(client: Client, request_id: str) -> dict[str, object]:
    """Wait for the terminal event of a request."""
    subject = f"generation.result.text_to_image.{request_id}"
    subscription = await client.jetstream().subscribe(subject, ordered_consumer=True)
    event: dict[str, object] = json.loads((await subscription.next_msg(timeout=WITHIN)).data)
    await subscription.unsubscribe()
    return event


async def test_a_message_with_invalid_bytes_affects_no_other_message(
    installation: Installation, tmp_path: Path
) -> None:
    worker = start_worker(installation, Task.TEXT_TO_IMAGE, tmp_path)
    try:
        await asyncio.to_thread(worker.wait_ready)
        async with (
            asyncio.timeout(2 * WITHIN),
            installation.client("publisher") as (sender, _),
            installation.client("admin") as (admin, _),
        ):
            for bad in BAD_BYTES:
                for line in hostile_lines(bad):
                    sender._transport.write(line)  # type: ignore[union-attr] # nats-py would refuse it
                await sender.flush()
                good = f"good-{bad.hex()}"
                await sender.publish(f"generation.request.text_to_image.{good}", PROMPT)
                assert (await finished(admin, good))["type"] == "generation.v1.succeeded"
            jetstream = admin.jetstream()
            while (await jetstream.stream_info(STORED)).state.messages:  # noqa: ASYNC110 - the last ack
                await asyncio.sleep(POLL)
            letters = [
                await jetstream.get_msg("GENERATION_DEAD_LETTERS", sequence)
                for sequence in range(1, len(BAD_BYTES) + 1)
            ]
            for letter in letters:
                assert letter.data == PROMPT
                headers = letter.headers or {}
                assert headers["Dead-Letter-Code"] == "invalid_request"
                assert headers["Dead-Letter-Subject"].startswith(f"{REQUEST.decode()}.a")
            found = await jetstream.stream_info("GENERATION_DEAD_LETTERS")
            assert found.state.messages == len(BAD_BYTES)
        log = worker.log_since_start()
        assert "bus_disconnected" not in log
        assert "settlement_unconfirmed" not in log
        assert "Traceback" not in log
    finally:
        worker.kill()
