"""A TCP relay on loopback whose connections can go dead without being closed."""

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

CHUNK = 65_536  # bytes


class Blackhole:
    """Relays connections to a port of 127.0.0.1.

    Args:
        port: Where connections are relayed to.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._pumps: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._generation = 0  # connections of an earlier one are dead

    async def __aenter__(self) -> Self:
        self._listening = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listening.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for writer in self._writers:
            writer.close()

    @property
    def url(self) -> str:
        """Where clients connect."""
        port = self._listening.sockets[0].getsockname()[1]
        return f"nats://127.0.0.1:{port}"

    def swallow(self) -> None:
        """From now on lose every byte of the present connections; new ones are relayed."""
        self._generation += 1

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, server_writer]
        for source, sink in ((reader, server_writer), (server_reader, writer)):
            pump = asyncio.create_task(self._pump(source, sink, self._generation))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, generation: int
    ) -> None:
        with suppress(ConnectionError):
            while data := await source.read(CHUNK):
                if generation == self._generation:
                    sink.write(data)
                    await sink.drain()
        if generation == self._generation:
            sink.close()
