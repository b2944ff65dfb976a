"""A gateway in the process of the test, so that a test can patch its constants."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn

from consumer.gateway.app import create_app
from consumer.settings import Settings
from tests.support.scene import WITHIN


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[str]:
    """Run a gateway in this process; yield its URL."""
    config = uvicorn.Config(create_app(settings), port=0, log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    # serve() would install signal handlers, so call the inner function.
    running = asyncio.ensure_future(server._serve())
    async with asyncio.timeout(WITHIN):
        while not server.started and not running.done():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running
