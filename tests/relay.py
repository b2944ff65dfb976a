"""A TCP relay on loopback that can be cut and mended, as a network is."""

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"
CHUNK = 65_536  # bytes


class Relay:
    """Relays connections to a port of 127.0.0.1; an asynchronous context manager.

    Args:
        port: Where connections are relayed to.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: set[asyncio.Task[None]] = set()
        self._cut = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, HOST, 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://{HOST}:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Break all connections, and refuse new ones."""
        self._cut = True
        self.break_all()

    def mend(self) -> None:
        """Relay new connections again."""
        self._cut = False

    def break_all(self) -> None:
        """Break the present connections; new ones are relayed."""
        for connection in self._connections:
            connection.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            writer.transport.abort()
            return
        there = await asyncio.open_connection(HOST, self._port)
        task = asyncio.create_task(_relay((reader, writer), there))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)


End = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _relay(here: End, there: End) -> None:
    pumps = [
        asyncio.create_task(_pump(here[0], there[1])),
        asyncio.create_task(_pump(there[0], here[1])),
    ]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        here[1].transport.abort()
        there[1].transport.abort()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(CHUNK):
            sink.write(data)
            await sink.drain()
