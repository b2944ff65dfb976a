"""The job behind FastAPI: `python -m tests.bench.speed.peers.over_http PORT`.

The shape that this daemon replaces: a queue of one in memory, one loop that takes from it, and the
whole job in one call of a thread.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from tests.bench.speed.peers.job import Asked, Done, PeerJob


def make_app(job: PeerJob) -> FastAPI:
    """The server, with its loop in the background."""
    waiting: asyncio.Queue[tuple[Asked, asyncio.Future[Done]]] = asyncio.Queue(maxsize=1)

    async def work() -> None:
        while True:
            asked, answer = await waiting.get()
            try:
                answer.set_result(await asyncio.to_thread(job, asked.request_id))
            except Exception as error:  # noqa: BLE001 - whoever waits gets it
                answer.set_exception(error)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.create_task(work())
        yield
        loop.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/infer")
    async def infer(asked: Asked) -> Done:
        answer = asyncio.get_running_loop().create_future()
        await waiting.put((asked, answer))
        return await answer

    @app.get("/ready")
    async def ready() -> None:
        """The model is loaded before the port is listened on."""

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(PeerJob()), host="127.0.0.1", port=int(sys.argv[1]))
