"""Whoever publishes requests and waits for results: for all that takes its work from a stream."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from uuid import uuid4

import nats
from nats.aio.client import Client
from nats.aio.subscription import Subscription

PATIENCE = 60.0  # seconds for the next result; only bounds a wait for something that must happen
PROMPT = "a lighthouse on a cliff, at dusk, oil on canvas"


class WentWrongError(Exception):
    """A system did not do what it was asked: its numbers would be worth nothing."""


@dataclass(frozen=True)
class Wire:
    """How requests and results look.

    Attributes:
        request: The subject of a request, by its id.
        results: Where every result is seen.
        fields: Fields of every request except the id.
    """

    request: Callable[[str], str]
    results: str
    fields: Mapping[str, object] = field(default_factory=dict)

    def body(self, request_id: str, **fields: object) -> bytes:
        """One request."""
        asked = {"request_id": request_id, "prompt": PROMPT, **self.fields, **fields}
        return json.dumps(asked).encode()


class Sender:
    """One connection of a sender.

    Args:
        wire: What is spoken.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.client: Client
        self._results: Subscription

    async def open(self, url: str, parts: AsyncExitStack) -> None:
        """Connect, and listen for results."""
        self.client = await nats.connect(url)
        parts.push_async_callback(self.client.close)
        self._results = await self.client.subscribe(self.wire.results)

    async def publish(self, jobs: int) -> set[str]:
        """Publish so many requests, all stored; returns their ids.

        Not one after the other: a queue that fills more slowly than it empties would be measured.
        """
        jetstream = self.client.jetstream()
        ids = {uuid4().hex for _ in range(jobs)}
        stored = [
            await jetstream.publish_async(self.wire.request(one), self.wire.body(one))
            for one in ids
        ]
        await asyncio.gather(*stored)
        return ids

    async def result(self) -> str:
        """The id of the next request that is done.

        Raises:
            WentWrongError: It is not done but failed.
        """
        message = await self._results.next_msg(timeout=PATIENCE)
        result = json.loads(message.data)
        if "failure" in result or str(result.get("type", "")).endswith("cancelled"):
            raise WentWrongError(f"a request came to nothing: {result}")
        return str(result["request_id"])

    async def do(self, jobs: int) -> None:
        """Publish so many requests; return when each has its result."""
        ids = await self.publish(jobs)
        while ids:
            ids.remove(await self.result())

    async def one(self, **fields: object) -> float:
        """Seconds from a publish to its result."""
        request_id = uuid4().hex
        subject, body = self.wire.request(request_id), self.wire.body(request_id, **fields)
        began = time.perf_counter()
        await self.client.jetstream().publish(subject, body)
        done = await self.result()
        seconds = time.perf_counter() - began
        if done != request_id:
            raise WentWrongError("the result of another request")
        return seconds
