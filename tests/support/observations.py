"""Observations of an installation: replies, objects, readiness, metrics and the durable."""

import hashlib
import json
from http import HTTPStatus
from typing import Self

import aiohttp
from nats.aio.subscription import Subscription
from nats.js.api import ConsumerInfo
from prometheus_client.parser import text_string_to_metric_families

from consumer.devstack import Daemon
from tests.support.scene import WITHIN, Event, Scene


class ReplyInbox:
    """The replies in a sender's inbox.

    Attributes:
        subject: The value of `reply_to`.
    """

    def __init__(self, scene: Scene, subscription: Subscription) -> None:
        self.subject = subscription.subject
        self._scene = scene
        self._subscription = subscription

    @classmethod
    async def listen(cls, scene: Scene) -> Self:
        """Subscribe to a new inbox of the sender."""
        return cls(scene, await scene.sender.subscribe(scene.sender.new_inbox()))

    async def next(self) -> Event:
        """Wait for the next reply, and return it."""
        event: Event = json.loads((await self._subscription.next_msg(WITHIN)).data)
        return event

    async def has_no_more(self) -> bool:
        """Return whether no more replies arrive until every request is settled."""
        await self._scene.until_empty()
        # NATS delivers everything that the workers published earlier before this message.
        await self._scene.sender.publish(self.subject, b"{}")
        return await self.next() == {}


def published_digests(event: Event) -> dict[str, str]:
    """Return the sha256 of each output of an event, in hex, by its key."""
    return {output["key"]: output["sha256"] for output in event["outputs"]}


async def stored_digests(scene: Scene) -> dict[str, str]:
    """Return the sha256 of each object of this installation, in hex, by its key."""
    bucket = scene.stack.store.bucket
    return {
        key: hashlib.sha256(await scene.object({"bucket": bucket, "key": key})).hexdigest()
        for key in await scene.keys()
    }


async def readiness(worker: Daemon) -> tuple[int, dict[str, str]]:
    """Return the HTTP status and the conditions of /readyz."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{worker.probes_url}/readyz") as response,
    ):
        conditions: dict[str, str] = await response.json()
        return response.status, conditions


async def failure_counts(worker: Daemon, name: str) -> dict[str, float]:
    """Return the values of a counter of /metrics by failure code."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{worker.probes_url}/metrics") as response,
    ):
        families = text_string_to_metric_families(await response.text())
    return {
        sample.labels["code"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


async def until_in_flight(scene: Scene, worker: Daemon, count: int) -> None:
    """Return once the metrics of a worker report a number of deliveries in flight."""
    line = f'generation_jobs_in_flight{{queue="{scene.task}",task="{scene.task}"}} {float(count)}'

    async def in_flight() -> bool:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{worker.probes_url}/metrics") as response,
        ):
            return line in await response.text()

    await scene.until(in_flight, f"{count} deliveries in flight at {worker.name}")


async def until_not_ready(scene: Scene, worker: Daemon, **conditions: str) -> None:
    """Return once a worker is not ready, for these reasons and no others."""

    async def not_ready() -> bool:
        status, found = await readiness(worker)
        failing = {name: value for name, value in found.items() if value != "ok"}
        return status == HTTPStatus.SERVICE_UNAVAILABLE and failing == conditions

    await scene.until(not_ready, f"{worker.name} not ready because of {conditions}")


async def assert_all_ready(scene: Scene, *workers: Daemon) -> None:
    """Check that no worker has restarted, and wait until every worker is ready again."""
    for worker in workers:

        async def ready(worker: Daemon = worker) -> bool:
            return (await readiness(worker))[0] == HTTPStatus.OK

        await scene.until(ready, f"readiness of {worker.name}")
        assert worker.alive


async def succeeded(scene: Scene, request_id: str) -> Event:
    """Return the terminal event; check that the request succeeded and its object is intact."""
    event = await scene.event(request_id)
    assert event["type"] == "generation.v1.succeeded", event
    (output,) = event["outputs"]
    assert hashlib.sha256(await scene.object(output)).hexdigest() == output["sha256"]
    return event


async def assert_queue_empty(scene: Scene, *request_ids: str) -> None:
    """Check that the queue is empty, and each request has one event, one object, no dead letter."""
    await scene.until_empty()
    for request_id in request_ids:
        assert len(await scene.events(request_id)) == 1
    assert len(await scene.keys()) == len(request_ids)
    letters = await scene.sender.jetstream().stream_info(scene.subjects.dead_letters_stream)
    assert letters.state.messages == 0


async def deliveries(scene: Scene) -> int:
    """Return the number of deliveries that the durable has made."""
    delivered = (await _durable(scene)).delivered
    assert delivered is not None
    return int(delivered.consumer_seq)


async def until_pulls_wait(scene: Scene, count: int, *, in_flight: int = 0) -> None:
    """Return once `count` workers wait for requests and `in_flight` requests are in progress."""

    async def waiting() -> bool:
        durable = await _durable(scene)
        return (durable.num_waiting, durable.num_ack_pending) == (count, in_flight)

    await scene.until(waiting, f"{count} waiting workers")


async def _durable(scene: Scene) -> ConsumerInfo:
    info: ConsumerInfo = await scene.sender.jetstream().consumer_info(
        scene.subjects.requests_stream(scene.task), str(scene.task)
    )
    return info
