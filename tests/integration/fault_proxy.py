"""A proxy in front of the object store that makes single requests or all requests fail."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

HOST = "127.0.0.1"


@dataclass
class Exchange:
    """One request at the proxy, and its connection.

    Attributes:
        head: The request line and the headers, with the empty line.
        reader: Reads the body from the client.
        writer: Writes to the client.
        upstream: The port of the real store.
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
        """The size of the body in bytes."""
        headers = dict(line.split(b": ", 1) for line in self.head.split(b"\r\n")[1:] if line)
        return int(headers.get(b"Content-Length", b"0"))

    async def body(self) -> bytes:
        """Read the whole body; call this once."""
        return await self.reader.readexactly(self.length)

    async def forward(self, body: bytes | None = None) -> bytes:
        """Send the request to the real store, optionally with another body; return the answer."""
        sent = await self.body() if body is None else body
        reader, writer = await asyncio.open_connection(HOST, self.upstream)
        writer.write(self._head_for_one() + sent)
        answer = await reader.read()
        writer.close()
        return answer

    async def forward_half(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send the head and half of the body to the real store; return the connection to it."""
        reader, writer = await asyncio.open_connection(HOST, self.upstream)
        writer.write(self._head_for_one())
        writer.write(await self.reader.readexactly(self.length // 2))
        await writer.drain()
        return reader, writer

    async def answer(self, status: str, body: bytes = b"", **headers: str) -> None:
        await self.body()  # a client could lose an answer that arrives before the end of its body
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
    await exchange.reader.read()  # until the client disconnects


async def hangs_up(exchange: Exchange) -> None:
    await exchange.body()
    exchange.writer.close()


async def cuts_halfway(exchange: Exchange) -> None:
    """Break both connections when half of the body has reached the real store."""
    _, writer = await exchange.forward_half()
    writer.transport.abort()
    exchange.writer.transport.abort()


async def drips(exchange: Exchange) -> None:
    """Send an endless header byte by byte, faster than any read timeout."""
    exchange.writer.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
    closed = asyncio.ensure_future(exchange.reader.read())
    while not closed.done():
        exchange.writer.write(b"x")
        await asyncio.wait([closed], timeout=0.02)
    await closed  # raises if the client has broken the connection


async def damages_the_body(exchange: Exchange) -> None:
    body = await exchange.body()
    exchange.writer.write(await exchange.forward(b"\xff" + body[1:]))


def says(status: str, body: bytes = b"", **headers: str) -> Fault:
    return lambda exchange: exchange.answer(status, body, **headers)


def refuses(status: str, code: str) -> Fault:
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return says(status, body, Content_Type="application/xml")


def for_writing(fault: Fault) -> Fault:
    """Apply a fault to uploads only, as a full store does."""

    async def only_uploads(exchange: Exchange) -> None:
        await (fault if exchange.method == "PUT" else passes)(exchange)

    return only_uploads


def for_checksums(fault: Fault) -> Fault:
    """Apply a fault to requests with an S3 checksum header only, as OCI and older Ceph do."""

    async def only_checksums(exchange: Exchange) -> None:
        await (fault if b"x-amz-checksum-" in exchange.head.lower() else passes)(exchange)

    return only_checksums


class HoldsHalfway:
    """A fault that sends half of an upload to the real store and then stalls.

    Attributes:
        reached: Set when half of the body has been sent.
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
    """Forwards requests to the store, and applies faults to them.

    Args:
        upstream: The port of the real store.

    Attributes:
        faults: The faults of the next requests, one each.
        otherwise: The fault of all other requests.
        methods: The methods of the received requests.
        heads: The heads of the received requests.
        met: One item for each received request.
        left: One item for each closed connection of a client.
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
        """Accept connections, always on the same port."""
        self._server = await asyncio.start_server(self._serve, HOST, self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Stop accepting connections."""
        if self._server is not None:
            self._server.close()

    def heal(self) -> None:
        """Forward all requests without a fault."""
        self.otherwise = passes

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The real store may be down, and the store or the client may break a connection.
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
