"""A TCP relay on loopback that can break, refuse or silence connections."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"
CHUNK = 65_536  # bytes


class Relay:
    """Relays connections to a port of 127.0.0.1; an asynchronous context manager.

    Args:
        port: The port that connections are relayed to.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: set[asyncio.Task[None]] = set()
        self._cut = False
        self._dead = 0  # connections up to this number lose all bytes
        self._accepted = 0

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
    def address(self) -> str:
        """The host and port that clients connect to."""
        return f"{HOST}:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Break all connections, and refuse new ones."""
        self._cut = True
        self.break_all()

    def mend(self) -> None:
        """Relay new connections again."""
        self._cut = False

    def break_all(self) -> None:
        """Break the present connections. New connections are relayed."""
        for connection in self._connections:
            connection.cancel()

    def swallow(self) -> None:
        """Drop every byte of the present connections from now on. New connections are relayed."""
        self._dead = self._accepted

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            writer.transport.abort()
            return
        there = await asyncio.open_connection(HOST, self._port)
        self._accepted += 1
        number = self._accepted
        task = asyncio.create_task(
            _relay((reader, writer), there, is_dead=lambda: number <= self._dead)
        )
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)


End = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _relay(here: End, there: End, *, is_dead: Callable[[], bool]) -> None:
    pumps = [
        asyncio.create_task(_pump(here[0], there[1], is_dead)),
        asyncio.create_task(_pump(there[0], here[1], is_dead)),
    ]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        here[1].transport.abort()
        there[1].transport.abort()


async def _pump(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, is_dead: Callable[[], bool]
) -> None:
    with suppress(OSError):
        while data := await source.read(CHUNK):
            if not is_dead():
                sink.write(data)
                await sink.drain()
