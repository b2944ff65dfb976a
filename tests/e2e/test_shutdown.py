"""SIGTERM with a real model, during its steps and during its loading.

tests/faults covers the other states of a daemon, with a model that loads instantly.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator

import nats
import pytest
from nats.aio.client import Client

from consumer.app.apply import apply
from consumer.devstack import Daemon, DevStack
from consumer.settings import Settings
from tests.e2e.senders import WITHIN, new_id
from tests.support.forked import ForkedStack

LONG = {"prompt": "a", "steps": 60}  # a run of some seconds


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevStack]:
    with ForkedStack(tmp_path_factory.mktemp("shutdown"), persist=False) as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in stack.environment().items():
                patch.setenv(name, value)
            asyncio.run(apply(Settings.load()))
        yield stack


@pytest.fixture
async def sender(servers: DevStack) -> AsyncIterator[Client]:
    connection = await nats.connect(servers.nats.url)
    yield connection
    await connection.close()


async def start(servers: DevStack, name: str, **settings: str) -> Daemon:
    daemon = servers.start_daemon(name, {"MODEL_TYPE": "text_to_image", **settings})
    await asyncio.to_thread(daemon.wait_ready)
    return daemon


async def ended(daemon: Daemon) -> int | None:
    """Wait for the end of a daemon after a signal; return its exit code."""
    for _ in range(int(WITHIN / 0.05)):
        if not daemon.alive:
            return daemon.returncode
        await asyncio.sleep(0.05)  # the event loop does not report the end of this process
    raise AssertionError(f"{daemon.name} does not stop:\n{daemon.log_since_start()}")


async def test_a_job_longer_than_the_drain_grace_is_requeued_at_once(
    servers: DevStack, sender: Client
) -> None:
    first = await start(servers, "first", CONSUMER_DRAIN_GRACE="0.1")
    request_id = new_id()
    results = await sender.subscribe(f"generation.result.text_to_image.{request_id}")
    await running(sender, request_id)
    first.signal(signal.SIGTERM)
    assert await ended(first) == 0, first.log_since_start()
    assert "requeued" in first.log_since_start()

    second = await start(servers, "second")
    # ack_wait is 60 s, so only a requeued message is delivered again within this time.
    event = json.loads((await results.next_msg(timeout=WITHIN / 2)).data)
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 2)
    second.signal(signal.SIGTERM)
    assert await ended(second) == 0


async def test_sigterm_during_the_loading_of_the_model_stops_the_daemon(servers: DevStack) -> None:
    daemon = servers.start_daemon("loading", {"MODEL_TYPE": "text_to_image"})
    async with asyncio.timeout(WITHIN):
        while "daemon_starting" not in daemon.log_since_start():
            assert daemon.alive, daemon.log_since_start()
            await asyncio.sleep(0.02)
    daemon.signal(signal.SIGTERM)
    assert await ended(daemon) == 0, daemon.log_since_start()
    assert "daemon_ready" not in daemon.log_since_start()


async def running(sender: Client, request_id: str) -> None:
    """Publish a long request and wait until the model runs it."""
    steps = await sender.subscribe(f"generation.progress.text_to_image.{request_id}")
    await sender.flush()
    body = json.dumps({**LONG, "request_id": request_id}).encode()
    await sender.jetstream().publish("generation.request.text_to_image", body)
    while json.loads((await steps.next_msg(timeout=WITHIN)).data)["type"] != (
        "generation.v1.progress"
    ):
        pass
