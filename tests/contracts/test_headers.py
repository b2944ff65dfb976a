"""Headers: CloudEvents in binary mode, and the message size as NATS computes it."""

import asyncio
from pathlib import Path
from urllib.parse import unquote

import nats
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.client import Client

from consumer.devstack import NatsServer
from generation_contracts.events import VERSION
from generation_contracts.examples import EVENTS, TRACE_PARENT
from generation_contracts.headers import (
    earlier_attempts,
    earlier_deliveries,
    event_headers,
    event_id,
    event_type,
    wire_size,
)

by_name = pytest.mark.parametrize("name", EVENTS)
header_names = st.text("abcXYZ-", min_size=1, max_size=12)
header_values = st.text(max_size=20)


async def hpub(body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """The total that nats-py itself announces for a message, and the bytes that follow it."""
    commands: list[bytes] = []

    class Unconnected(Client):
        async def _send_command(self, cmd: bytes, priority: bool = False) -> None:  # noqa: FBT002
            commands.append(bytes(cmd))

    client = Unconnected()
    await client._send_publish("s", "", body, len(body), headers or None)
    announced, _, rest = commands[0].partition(b"\r\n")
    return int(announced.split()[-1]), rest.removesuffix(b"\r\n")


@by_name
async def test_size_of_an_event_equals_the_hpub_size(name: str) -> None:
    headers = event_headers(EVENTS[name], trace_parent=TRACE_PARENT)
    announced, sent = await hpub(b"x" * 1000, headers)
    assert wire_size(b"x" * 1000, headers) == announced == len(sent)


async def test_size_without_headers_is_the_body_alone() -> None:
    announced, sent = await hpub(b"abc", {})
    assert wire_size(b"abc", {}) == announced == len(sent) == 3


@settings(deadline=None)
@given(st.binary(max_size=50), st.dictionaries(header_names, header_values, min_size=1, max_size=5))
def test_size_is_at_least_the_hpub_size(body: bytes, headers: dict[str, str]) -> None:
    """The client strips values, so that it may be less by the white space at their ends."""
    announced, _ = asyncio.run(hpub(body, headers))
    stripped = sum(len(v.encode()) - len(v.strip().encode()) for v in headers.values())
    assert wire_size(body, headers) == announced + stripped


async def test_server_accepts_the_largest_size_and_refuses_one_more_byte(
    tmp_path: Path,
) -> None:
    headers = event_headers(EVENTS["cancelled"], trace_parent=TRACE_PARENT)
    closed = asyncio.Event()

    async def on_close() -> None:
        closed.set()

    async def on_error(_: Exception) -> None:
        """Ignore errors: the test checks the closed connection."""

    with NatsServer(tmp_path, config="max_payload: 2048") as server:
        client = await nats.connect(
            server.url, closed_cb=on_close, error_cb=on_error, allow_reconnect=False
        )
        messages = await client.subscribe("s")
        largest = b"x" * (client.max_payload - wire_size(b"", headers))
        await client.publish("s", largest, headers=headers)
        assert (await messages.next_msg(timeout=10)).data == largest
        await client.publish("s", largest + b"x", headers=headers)
        await asyncio.wait_for(closed.wait(), 10)


@by_name
def test_headers_are_cloudevents_in_binary_mode(name: str) -> None:
    event = EVENTS[name]
    headers = event_headers(event)
    assert headers["ce-specversion"] == "1.0"
    assert headers["ce-type"] == event_type(event) == event.type
    assert headers["ce-type"].startswith(f"{VERSION}.")
    assert headers["ce-id"] == event_id(event)
    assert headers["ce-subject"] == event.request_id
    assert headers["ce-time"] == "2026-01-02T03:04:05.678000Z"
    assert headers["ce-source"].endswith(event.worker)
    assert headers["ce-datacontenttype"] == "application/json"


@by_name
def test_results_of_a_model_are_marked_in_the_headers(name: str) -> None:
    generated = getattr(EVENTS[name], "ai_generated", None)
    assert (generated is True) == name.endswith("_marked")
    header = event_headers(EVENTS[name]).get("Generation-AI-Generated")
    assert header == ("true" if generated else None)


@by_name
def test_no_event_has_a_message_id_that_a_sender_can_use(name: str) -> None:
    assert "Nats-Msg-Id" not in event_headers(EVENTS[name])


@pytest.mark.parametrize(
    ("header", "attempts"),
    [
        ("0", 0),
        ("2", 2),
        ("99", 99),
        ("100", 99),
        ("10000", 0),
        ("-1", 0),
        ("1.5", 0),
        ("", 0),
        ("\u0663", 0),
    ],
)
def test_invalid_attempts_header_counts_as_0(header: str, attempts: int) -> None:
    assert earlier_attempts({"Generation-Attempts": header}) == attempts
    assert earlier_attempts({}) == earlier_deliveries({}) == 0
    deliveries = earlier_deliveries({"Generation-Attempts": header, "Generation-Deliveries": "1"})
    assert deliveries == max(attempts, 1)


def test_ids_of_all_events_of_a_request_differ() -> None:
    event = EVENTS["progress_image"]
    events = [
        event.model_copy(update={"attempt": attempt, "sequence": sequence})
        for attempt in (1, 2, 11)
        for sequence in (0, 1, 2, 11)
    ]
    assert len({event_id(event) for event in [*events, EVENTS["cancelled"]]}) == len(events) + 1


def test_terminal_events_of_a_request_have_one_id() -> None:
    first, second = EVENTS["cancelled"], EVENTS["failed_internal"]
    assert event_id(first.model_copy(update={"attempt": 2})) == event_id(second)


def test_trace_parent_is_optional() -> None:
    event = EVENTS["started"]
    assert event_headers(event, trace_parent=TRACE_PARENT)["traceparent"] == TRACE_PARENT
    assert "traceparent" not in event_headers(event)


def test_worker_name_is_percent_encoded() -> None:
    worker = 'Büro 7 "b"\r\nNats-Msg-Id: x'
    source = event_headers(EVENTS["started"].model_copy(update={"worker": worker}))["ce-source"]
    assert source.isascii()
    assert source.isprintable()
    assert " " not in source
    assert unquote(source).endswith(worker)
