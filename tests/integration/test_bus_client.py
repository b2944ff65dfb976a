"""The client with raw protocol bytes: no message, file or cancellation breaks the connection."""

import asyncio
import random
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import nkeys
import pytest
from nats.aio.msg import Msg
from nats.errors import Error
from structlog.testing import capture_logs

from consumer.bus.connection import Bus, BusUnavailable, connect
from consumer.bus.nats_internals import require_usable_credentials, require_usable_seed
from consumer.devstack import NatsServer
from tests.integration.bus_installation import (
    bus_settings,
    frozen,
    open_bus,
    soon,
    until,
    until_connected,
    until_lost,
)
from tests.integration.raw_publisher import SUBJECT_BYTES, RawPublisher, raw_publisher

SEED = 20261129
ROUNDS = 300  # messages of random bytes
LONG_SUBJECT = 3900  # bytes; with the rest of the line just below the server's limit of 4096


class Listener:
    """Records all messages of one connection, in order."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.messages: list[Msg] = []

    async def start(self) -> None:
        await self.bus.client.subscribe("t.>", cb=self._on_message)
        await self.bus.client.flush()

    async def _on_message(self, message: Msg) -> None:
        self.messages.append(message)

    async def received(self, count: int) -> list[Msg]:
        """Return all messages when at least `count` have arrived."""

        async def enough() -> bool:
            return len(self.messages) >= count

        await until(enough)
        return self.messages


@pytest.fixture
async def listening(nats_server: NatsServer) -> Any:
    async with AsyncExitStack() as parts:
        listener = Listener(await open_bus(nats_server.url, parts))
        await listener.start()
        publisher = await parts.enter_async_context(raw_publisher(nats_server.ports["client"]))
        yield listener, publisher
        assert listener.bus.connection == 0, "the connection was lost"


async def test_every_byte_in_a_subject_or_a_reply_subject_reaches_the_callback(
    listening: tuple[Listener, RawPublisher],
) -> None:
    listener, publisher = listening
    for byte in SUBJECT_BYTES:
        await publisher.publish(b"t.a" + byte + b"b", b"subject")
        await publisher.publish(b"t.plain", b"reply", reply=b"r.a" + byte + b"b")
        await publisher.publish(b"t.plain", b"after")

    messages = await listener.received(3 * len(SUBJECT_BYTES))
    assert [message.data for message in messages] == [b"subject", b"reply", b"after"] * len(
        SUBJECT_BYTES
    )
    for byte, number in zip(SUBJECT_BYTES, range(0, len(messages), 3), strict=True):
        assert messages[number].subject == b"t.a%sb".replace(b"%s", byte).decode(errors="replace")
        readable = byte[0] < 0x80
        assert messages[number + 1].reply == (f"r.a{byte.decode()}b" if readable else "")


async def test_messages_of_random_bytes_all_arrive(
    listening: tuple[Listener, RawPublisher],
) -> None:
    listener, publisher = listening
    generator = random.Random(SEED)

    def token() -> bytes:
        length = generator.choice([1, 2, 8, 200, LONG_SUBJECT if generator.random() < 0.1 else 1])
        return b"x" + b"".join(generator.choices(SUBJECT_BYTES, k=length)).replace(b".", b"")

    for number in range(ROUNDS):
        subject, reply = b"t." + token(), b""
        if len(subject) < 300 and generator.random() < 0.5:
            reply = token()
        body = b"%d " % number + generator.randbytes(generator.choice([0, 3, 5000]))
        if generator.random() < 0.5:
            await publisher.publish(subject, body, reply=reply)
            continue
        headers = b"NATS/1.0" + generator.choice([b"", b" 100", b"\r\n" + generator.randbytes(20)])
        headers += b"\r\n\r\n"
        sizes = len(headers), len(headers) + len(body)
        await publisher.send(b"HPUB %s %s %d %d" % (subject, reply, *sizes), headers + body)

    messages = await listener.received(ROUNDS)
    assert [int(message.data.split(b" ")[0]) for message in messages] == list(range(ROUNDS))


async def test_an_exception_in_one_message_loses_only_that_message(
    listening: tuple[Listener, RawPublisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, publisher = listening
    build = listener.bus.client._build_message

    def fail_on_bad(sid: int, subject: bytes, *rest: Any) -> Msg:
        if subject == b"t.bad":
            raise KeyError(subject)
        return build(sid, subject, *rest)

    monkeypatch.setattr(listener.bus.client, "_build_message", fail_on_bad)
    with capture_logs() as logs:
        await publisher.publish(b"t.bad")
        await publisher.publish(b"t.good")
        assert [message.subject for message in await listener.received(1)] == ["t.good"]
    assert [line["event"] for line in logs] == ["message_not_processed"]


@pytest.mark.parametrize("line", [b"HELLO", b"MSG a", b"INFO {", b"MSG t.a one 1"])
async def test_a_line_that_violates_the_protocol_causes_a_reconnect(line: bytes) -> None:
    """nats-py stays connected after such a line and receives nothing."""
    connections = 0

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.write(b'INFO {"max_payload": 1000}\r\n')
        while b"PING" not in await reader.readline():
            pass
        writer.write(b"PONG\r\n" if connections > 1 else b"PONG\r\n" + line + b"\r\n")
        while received := await reader.readline():
            if b"PING" in received:
                writer.write(b"PONG\r\n")
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server, AsyncExitStack() as p:
        bus = await open_bus(f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}", p)
        reconnected = asyncio.Event()
        bus.on_reconnect(reconnected.set)
        await soon(reconnected.wait())
        await bus.close()


# -- cancellation ---------------------------------------------------------------------------------


async def test_a_publish_that_waits_for_buffer_space_can_be_cancelled(
    nats_server: NatsServer,
) -> None:
    async with AsyncExitStack() as parts:
        bus = await open_bus(nats_server.url, parts)

        async def fill() -> None:
            while True:
                await bus.client.publish("anything", bytes(1_000_000))

        with frozen(nats_server):
            publishing = [asyncio.create_task(fill()) for _ in range(2)]
            await asyncio.wait(publishing, timeout=0.3)
            for task in publishing:
                task.cancel()
            await soon(asyncio.wait(publishing))
            assert all(task.cancelled() for task in publishing)


# -- reconnecting ---------------------------------------------------------------------------------


async def test_an_unexpected_exception_during_a_reconnect_is_followed_by_another_attempt(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncExitStack() as parts:
        bus = await open_bus(nats_server.url, parts)
        initialise = bus.client._process_connect_init
        failures = 2

        async def fail_at_first() -> None:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise TypeError
            await initialise()

        monkeypatch.setattr(bus.client, "_process_connect_init", fail_at_first)
        await bus.client.force_reconnect()
        await until_lost(bus)
        await until_connected(bus)
        await soon(bus.client.flush())


@pytest.mark.parametrize(
    ("setting", "content"),
    [
        ("nats_creds", b""),
        ("nats_creds", b"-----BEGIN NATS USER JWT-----\na.b.c\n------END NATS USER JWT------\n"),
        ("nats_nkey_seed", b"not a seed"),
        ("nats_nkey_seed", b"\xff\xfe"),
    ],
    ids=["empty credentials", "no seed in credentials", "text", "bytes"],
)
async def test_unusable_credentials_stop_the_start_immediately(
    nats_server: NatsServer, tmp_path: Path, setting: str, content: bytes
) -> None:
    """nats-py reads a file without a JWT in an endless loop that blocks the event loop."""
    file = tmp_path / "secret"
    file.write_bytes(content)
    settings = bus_settings(nats_server.url).model_copy(update={setting: file})
    with pytest.raises(BusUnavailable, match="credentials cannot be read") as caught:
        await soon(connect(settings, name="test", within=1_000.0))
    assert "not a seed" not in str(caught.value).replace("not an nkey seed", "")


@pytest.mark.parametrize(
    ("line_end", "last"),
    [("\n", "\n"), ("\r\n", "\r\n"), (" \r\n", ""), ("\n", "")],
    ids=["lf", "crlf", "space and crlf", "no last line end"],
)
@pytest.mark.parametrize("title", ["NKEY SEED", "PRIVATE KEY"])
def test_credentials_files_may_have_the_line_ends_of_any_editor(
    tmp_path: Path, line_end: str, last: str, title: str
) -> None:
    """nats-py reads a seed with its carriage return, or without its last character."""
    seed = nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_USER).decode()
    jwt_part = ["-----BEGIN NATS USER JWT-----", "a.b.c", "", "------END NATS USER JWT------", ""]
    seed_part = [f"-----BEGIN USER {title}-----", "", seed]
    (creds := tmp_path / "creds").write_bytes(
        f"\ufeff{line_end.join(jwt_part + seed_part)}{last}".encode()
    )
    (alone := tmp_path / "seed").write_bytes(f"\ufeff{seed}{last}".encode())
    client = Bus().client
    require_usable_credentials(creds)
    assert client._read_creds_user_jwt(str(creds)) == b"a.b.c"
    assert client._read_creds_user_nkey(str(creds)) == seed.encode()
    assert require_usable_seed(alone) == seed


def test_a_credentials_file_that_is_empty_at_a_reconnect_raises_a_nats_error(
    tmp_path: Path,
) -> None:
    """nats-py retries a reconnect only after its own errors."""
    file = tmp_path / "creds"
    file.write_bytes(b"")
    client = Bus().client
    with pytest.raises(Error):
        client._read_creds_user_jwt(str(file))
