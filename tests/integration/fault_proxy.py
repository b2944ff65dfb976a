"""A proxy before the object store that makes it fail, request by request or for all of them."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

HOST = "127.0.0.1"


@dataclass
class Exchange:
    """One request at the proxy, and the way to answer it.

    Attributes:
        head: Request line and headers, with the empty line.
        reader: What the client sends after the head.
        writer: To the client.
        upstream: The real store's port.
    """

    head: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    upstream: int

    @property
    def method(self) -> str:
        return self.head.split(b" ", 1)[0].decode()

    @property
    def length(self) -> int:
        """Bytes of the body."""
        headers = dict(line.split(b": ", 1) for line in self.head.split(b"\r\n")[1:] if line)
        return int(headers.get(b"Content-Length", b"0"))

    async def body(self) -> bytes:
        """The whole body; to be asked for once."""
        return await self.reader.readexactly(self.length)

    async def forward(self, body: bytes | None = None) -> bytes:
        """The real store's whole answer, to another body than the client's where one is given."""
        sent = await self.body() if body is None else body
        reader, writer = await asyncio.open_connection(HOST, self.upstream)
        writer.write(self._head_for_one() + sent)
        answer = await reader.read()
        writer.close()
        return answer

    async def forward_half(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The connection to the real store, which has the head and half of the body by now."""
        reader, writer = await asyncio.open_connection(HOST, self.upstream)
        writer.write(self._head_for_one())
        writer.write(await self.reader.readexactly(self.length // 2))
        await writer.drain()
        return reader, writer

    async def answer(self, status: str, body: bytes = b"", **headers: str) -> None:
        await self.body()  # an answer that comes before it could be lost with the connection
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    def _head_for_one(self) -> bytes:
        first, rest = self.head.split(b"\r\n", 1)
        return first + b"\r\nConnection: close\r\n" + rest


Fault = Callable[[Exchange], Awaitable[None]]


async def passes(exchange: Exchange) -> None:
    exchange.writer.write(await exchange.forward())


async def is_silent(exchange: Exchange) -> None:
    await exchange.reader.read()  # until the client goes


async def hangs_up(exchange: Exchange) -> None:
    await exchange.body()
    exchange.writer.close()


async def cuts_halfway(exchange: Exchange) -> None:
    """The connections break when half of the body has reached the real store."""
    _, writer = await exchange.forward_half()
    writer.transport.abort()
    exchange.writer.transport.abort()


async def drips(exchange: Exchange) -> None:
    """Sends one byte after the other of an endless header, faster than any timeout for reading."""
    exchange.writer.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
    gone = asyncio.ensure_future(exchange.reader.read())
    while not gone.done():
        exchange.writer.write(b"x")
        await asyncio.wait([gone], timeout=0.02)
    await gone  # raises where the client has broken the connection


async def damages_the_body(exchange: Exchange) -> None:
    body = await exchange.body()
    exchange.writer.write(await exchange.forward(b"\xff" + body[1:]))


def says(status: str, body: bytes = b"", **headers: str) -> Fault:
    return lambda exchange: exchange.answer(status, body, **headers)


def refuses(status: str, code: str) -> Fault:
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return says(status, body, Content_Type="application/xml")


def for_writing(fault: Fault) -> Fault:
    """A fault that only uploads meet, as of a store that is full."""

    async def only_uploads(exchange: Exchange) -> None:
        await (fault if exchange.method == "PUT" else passes)(exchange)

    return only_uploads


def for_checksums(fault: Fault) -> Fault:
    """A fault that only requests with a checksum of a newer S3 meet, as at OCI or an older Ceph."""

    async def only_checksums(exchange: Exchange) -> None:
        await (fault if b"x-amz-checksum-" in exchange.head.lower() else passes)(exchange)

    return only_checksums


class HoldsHalfway:
    """A fault: half of an upload has reached the real store, and no more follows until that ends.

    Attributes:
        reached: Set when it has come so far.
    """

    def __init__(self) -> None:
        self.reached = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        reader, writer = await exchange.forward_half()
        self.reached.set()
        try:
            with suppress(ConnectionError):
                await reader.read()
        finally:
            writer.transport.abort()
            exchange.writer.transport.abort()


class FaultProxy:
    """Stands before the store.

    Args:
        upstream: The real store's port.

    Attributes:
        faults: What the next requests meet, one each.
        otherwise: What all others meet.
        methods: Of the requests that have come.
        heads: The same, whole.
        met: One for each request that has come.
        left: One for each client that has gone.
    """

    def __init__(self, upstream: int) -> None:
        self.faults: deque[Fault] = deque()
        self.otherwise: Fault = passes
        self.methods: list[str] = []
        self.heads: list[bytes] = []
        self.met: asyncio.Queue[None] = asyncio.Queue()
        self.left: asyncio.Queue[None] = asyncio.Queue()
        self._upstream = upstream
        self._port = 0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refuse()

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self._port}"

    async def listen(self) -> None:
        """Take connections, always at the same port."""
        self._server = await asyncio.start_server(self._serve, HOST, self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Take no more connections."""
        if self._server is not None:
            self._server.close()

    def heal(self) -> None:
        """Let all requests pass."""
        self.otherwise = passes

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The real store may be away, and both it and the client may break a connection.
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            exchange = Exchange(head, reader, writer, self._upstream)
            self.methods.append(exchange.method)
            self.heads.append(head)
            self.met.put_nowait(None)
            fault = self.faults.popleft() if self.faults else self.otherwise
            await fault(exchange)
        writer.close()
        self.left.put_nowait(None)
