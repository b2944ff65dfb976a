"""Real servers and real daemon processes, as in tests/faults, for what the bus' users do."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import nats
import pytest
from nats.aio.client import Client

from tests.support.scene import WITHIN, Event, Scene


class Caller:
    """Somebody with a plain NATS client who asks and waits: `nats request`."""

    def __init__(self, scene: Scene, client: Client) -> None:
        self._scene = scene
        self.client = client

    async def call(
        self, body: object = None, *, within: float = WITHIN, headers: Any = None, **fields: Any
    ) -> Event:
        """Call the front door; the first answer."""
        sent = body if body is not None else {"prompt": "a", **fields}
        data = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
        subject = self._scene.subjects.call(self._scene.task)
        answer = await self.client.request(subject, data, timeout=within, headers=headers)
        event: Event = json.loads(answer.data)
        return event

    async def cancel(self, request_id: str) -> Event:
        """Cancel a request; the answer."""
        subject = f"{self._scene.subjects.root}.cancel.{request_id}"
        answer = await self.client.request(subject, b"", timeout=WITHIN)
        event: Event = json.loads(answer.data)
        return event

    def asking(self, work: Awaitable[Event]) -> "asyncio.Task[Event]":
        """Ask, and go on."""
        return asyncio.ensure_future(work)  # type: ignore[return-value] # a coroutine becomes a task


NewCaller = Callable[[], Awaitable[Caller]]


@pytest.fixture
async def new_caller(scene: Scene) -> AsyncIterator[NewCaller]:
    """Callers with connections of their own."""
    async with AsyncExitStack() as parts:

        async def make() -> Caller:
            async def quiet(_: Exception) -> None:
                """What a test does to the server is not the caller's concern."""

            client = await nats.connect(
                scene.stack.nats.url,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.05,
                error_cb=quiet,
            )
            parts.push_async_callback(client.close)
            return Caller(scene, client)

        yield make


@pytest.fixture
async def caller(new_caller: NewCaller) -> Caller:
    return await new_caller()
