"""A sender for the systems that receive requests from a stream."""

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

RESULT_TIMEOUT = 60.0  # seconds for the next result; upper bound of a wait for a required event
PROMPT = "a lighthouse on a cliff, at dusk, oil on canvas"


class WentWrongError(Exception):
    """A system gave a wrong result, so its figures are invalid."""


@dataclass(frozen=True)
class Wire:
    """The subjects and fields of a system's messages.

    Attributes:
        request: Returns the subject of a request for an id.
        results: The subject of all results, with wildcards.
        fields: Fields of every request except the id.
    """

    request: Callable[[str], str]
    results: str
    fields: Mapping[str, object] = field(default_factory=dict)

    def body(self, request_id: str, **fields: object) -> bytes:
        """Return the body of one request."""
        content = {"request_id": request_id, "prompt": PROMPT, **self.fields, **fields}
        return json.dumps(content).encode()


class Sender:
    """One connection of a sender.

    Args:
        wire: Subjects and fields of the messages.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.client: Client
        self._results: Subscription

    async def open(self, url: str, parts: AsyncExitStack) -> None:
        """Connect, and subscribe to results."""
        self.client = await nats.connect(url)
        parts.push_async_callback(self.client.close)
        self._results = await self.client.subscribe(self.wire.results)

    async def publish(self, jobs: int) -> set[str]:
        """Publish this number of requests and wait until all are stored; return their ids.

        The publishes overlap, so that the queue fills faster than the workers empty it.
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
        """Return the id of the next succeeded request.

        Raises:
            WentWrongError: The request failed or was cancelled.
        """
        message = await self._results.next_msg(timeout=RESULT_TIMEOUT)
        result = json.loads(message.data)
        if "failure" in result or str(result.get("type", "")).endswith("cancelled"):
            raise WentWrongError(f"a request did not succeed: {result}")
        return str(result["request_id"])

    async def do(self, jobs: int) -> None:
        """Publish this number of requests and wait for all results."""
        ids = await self.publish(jobs)
        while ids:
            ids.remove(await self.result())

    async def one(self, **fields: object) -> float:
        """Return the seconds from a publish to its result."""
        request_id = uuid4().hex
        subject, body = self.wire.request(request_id), self.wire.body(request_id, **fields)
        began = time.perf_counter()
        await self.client.jetstream().publish(subject, body)
        done = await self.result()
        seconds = time.perf_counter() - began
        if done != request_id:
            raise WentWrongError("the result of another request")
        return seconds
