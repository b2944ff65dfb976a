"""A connection to NATS that sends any bytes, also those that client libraries refuse to send."""

import asyncio
import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

import nkeys

LONGEST_LINE = 2**20  # bytes
CONNECT_WITHIN = 5.0  # seconds
ANSWER_WITHIN = 5.0  # seconds

OnMessage = Callable[[str, bytes], None]


@dataclass(frozen=True)
class Message:
    """What is published; bytes go out as they are.

    Attributes:
        headers: The whole header block, or empty.
    """

    subject: bytes
    body: bytes = b""
    reply: bytes = b""
    headers: bytes = b""

    def encode(self) -> bytes:
        """The protocol line and the payload."""
        words = [self.subject, self.reply] if self.reply else [self.subject]
        size = str(len(self.headers) + len(self.body)).encode()
        if self.headers:
            line = b" ".join([b"HPUB", *words, str(len(self.headers)).encode(), size])
        else:
            line = b" ".join([b"PUB", *words, size])
        return line + b"\r\n" + self.headers + self.body + b"\r\n"


def header_block(headers: dict[str, str]) -> bytes:
    """Headers as they are written on the wire; nothing is checked."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return b"NATS/1.0\r\n" + lines.encode(errors="surrogateescape") + b"\r\n"


class Wire:
    """One connection, by nkey. It ends with the server; `closed` is set then.

    Attributes:
        closed: Whether the connection has ended.
        errors: What the server has refused since `settled` was last called.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._listeners: dict[bytes, OnMessage] = {}
        self._pongs: list[asyncio.Future[None]] = []
        self._reading: asyncio.Task[None] | None = None
        self.closed = asyncio.Event()
        self.errors: list[str] = []

    @classmethod
    async def connect(cls, url: str, seed: bytes) -> Self:
        """Connect and prove the key.

        Raises:
            OSError: No server, or it refuses the key.
        """
        address = urlsplit(url)
        async with asyncio.timeout(CONNECT_WITHIN):
            reader, writer = await asyncio.open_connection(
                address.hostname, address.port, limit=LONGEST_LINE
            )
            line = await reader.readline()
            if not line.startswith(b"INFO "):  # the server ended in this moment
                writer.close()
                raise ConnectionResetError
            info = json.loads(line.removeprefix(b"INFO "))
            pair = nkeys.from_seed(bytearray(seed))
            options = {
                "verbose": False,
                "pedantic": False,
                "headers": True,
                "no_responders": True,
                "nkey": pair.public_key.decode(),
                "sig": base64.b64encode(pair.sign(info["nonce"].encode())).decode(),
            }
            writer.write(b"CONNECT " + json.dumps(options).encode() + b"\r\n")
            wire = cls(reader, writer)
            wire._reading = asyncio.create_task(wire._read(), name="wire")
            await wire.settled()
        return wire

    def subscribe(self, subject: str, listener: OnMessage) -> None:
        """Call a function with the subject and the body of each message."""
        sid = str(len(self._listeners) + 1).encode()
        self._listeners[sid] = listener
        self._writer.write(b"SUB " + subject.encode() + b" " + sid + b"\r\n")

    def write(self, message: Message) -> None:
        """Publish."""
        self._writer.write(message.encode())

    async def settled(self) -> list[str]:
        """Wait until the server has read everything that was written; what it has refused.

        Raises:
            OSError: The connection has ended.
        """
        pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pongs.append(pong)
        self._writer.write(b"PING\r\n")
        await self._writer.drain()
        async with asyncio.timeout(ANSWER_WITHIN):
            await pong
        errors, self.errors = self.errors, []
        return errors

    async def close(self) -> None:
        """Close the connection."""
        self._writer.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                await self._take(line.removesuffix(b"\r\n"))
        except (OSError, ValueError, asyncio.IncompleteReadError):
            pass  # the server has ended, or has cut this connection off
        finally:
            self.closed.set()
            self._writer.close()
            for pong in self._pongs:
                if not pong.done():
                    pong.set_exception(ConnectionResetError())

    async def _take(self, line: bytes) -> None:
        match line.split(b" "):
            case [b"MSG", subject, sid, *_, size]:
                body = (await self._reader.readexactly(int(size) + 2))[:-2]
                self._listeners[sid](subject.decode(errors="replace"), body)
            case [b"HMSG", subject, sid, *_, headers, size]:
                whole = await self._reader.readexactly(int(size) + 2)
                body = whole[int(headers) : -2]
                self._listeners[sid](subject.decode(errors="replace"), body)
            case [b"PING"]:
                self._writer.write(b"PONG\r\n")
            case [b"PONG"]:
                if not (pong := self._pongs.pop(0)).done():
                    pong.set_result(None)
            case [b"-ERR", *words]:
                self.errors.append(b" ".join(words).decode(errors="replace"))
            case _:
                pass  # +OK, INFO
