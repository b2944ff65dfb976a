"""Real servers and daemon processes, for tests of senders and operators on the bus."""

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
    """A caller with a plain NATS client, such as `nats request`."""

    def __init__(self, scene: Scene, client: Client) -> None:
        self._scene = scene
        self.client = client

    async def call(
        self, body: object = None, *, within: float = WITHIN, headers: Any = None, **fields: Any
    ) -> Event:
        """Send a request to the request-reply endpoint; return the first reply."""
        value = body if body is not None else {"prompt": "a", **fields}
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        subject = self._scene.subjects.call(self._scene.task)
        answer = await self.client.request(subject, data, timeout=within, headers=headers)
        event: Event = json.loads(answer.data)
        return event

    async def cancel(self, request_id: str) -> Event:
        """Cancel a request; return the reply."""
        subject = f"{self._scene.subjects.root}.cancel.{request_id}"
        answer = await self.client.request(subject, b"", timeout=WITHIN)
        event: Event = json.loads(answer.data)
        return event

    def start(self, operation: Awaitable[Event]) -> "asyncio.Task[Event]":
        """Start an operation in a task."""
        return asyncio.ensure_future(operation)  # type: ignore[return-value] # a coroutine becomes a task


NewCaller = Callable[[], Awaitable[Caller]]


@pytest.fixture
async def new_caller(scene: Scene) -> AsyncIterator[NewCaller]:
    """Return a function that creates callers with separate connections."""
    async with AsyncExitStack() as parts:

        async def connect() -> Caller:
            async def ignore(_: Exception) -> None:
                """Ignore connection errors, which the tests cause on purpose."""

            client = await nats.connect(
                scene.stack.nats.url,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.05,
                error_cb=ignore,
            )
            parts.push_async_callback(client.close)
            return Caller(scene, client)

        yield connect


@pytest.fixture
async def caller(new_caller: NewCaller) -> Caller:
    return await new_caller()
