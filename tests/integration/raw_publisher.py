"""A publisher that writes raw protocol lines, most of which nats-py would refuse to write."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

OPTIONS = {"verbose": False, "pedantic": False, "headers": True, "protocol": 1}
# Every byte that a subject may contain. The server splits a line at spaces and tabs, and ends it at
# a line feed. A published subject may contain wildcards.
SUBJECT_BYTES = [bytes([byte]) for byte in range(256) if bytes([byte]) not in b" \t\n"]


class RawPublisher:
    """A raw TCP connection to a nats-server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *lines: bytes) -> None:
        """Write lines; return when the server has processed them without an error."""
        self._writer.write(b"".join(line + b"\r\n" for line in lines) + b"PING\r\n")
        answer = await self._reader.readline()
        while answer == b"PING\r\n" or answer.startswith(b"INFO"):
            answer = await self._reader.readline()
        assert answer == b"PONG\r\n", answer

    async def publish(self, subject: bytes, body: bytes = b"", *, reply: bytes = b"") -> None:
        """Publish to a subject that may contain any byte."""
        await self.send(b"PUB %s %s %d" % (subject, reply, len(body)), body)


@asynccontextmanager
async def raw_publisher(port: int, **options: str) -> AsyncIterator[RawPublisher]:
    """Connect with these options in the protocol's CONNECT line."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await reader.readline()  # INFO
    writer.write(b"CONNECT %s\r\n" % json.dumps({**OPTIONS, **options}).encode())
    publisher = RawPublisher(reader, writer)
    await publisher.send()
    try:
        yield publisher
    finally:
        writer.close()
        await writer.wait_closed()
