"""The job behind FastAPI: `python -m tests.bench.speed.peers.over_http PORT`.

A common design: a queue of length one in memory, one loop that reads from it, and the whole job in
one call in a thread.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from tests.bench.speed.peers.job import JobRequest, JobResult, PeerJob


def make_app(job: PeerJob) -> FastAPI:
    """Return the server with its background loop."""
    waiting: asyncio.Queue[tuple[JobRequest, asyncio.Future[JobResult]]] = asyncio.Queue(maxsize=1)

    async def work() -> None:
        while True:
            request, answer = await waiting.get()
            try:
                answer.set_result(await asyncio.to_thread(job, request.request_id))
            except Exception as error:  # noqa: BLE001 - the waiting request raises it
                answer.set_exception(error)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.create_task(work())
        yield
        loop.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/infer")
    async def infer(request: JobRequest) -> JobResult:
        answer = asyncio.get_running_loop().create_future()
        await waiting.put((request, answer))
        return await answer

    @app.get("/ready")
    async def ready() -> None:
        """Respond with 200: the model is loaded before the port is open."""

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(PeerJob()), host="127.0.0.1", port=int(sys.argv[1]))
