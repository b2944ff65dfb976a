"""A running system for all tests in this folder: servers, streams, bucket, a daemon of each task.

A single test process runs the whole folder, because each daemon loads torch and a model.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import nats
import pytest
from minio import Minio
from nats.aio.client import Client

from consumer.app.apply import apply
from consumer.devstack import DevStack
from consumer.settings import Settings
from generation_contracts.base import DEFAULT_QUEUES
from tests.support.forked import ForkedStack
from tests.support.plain_s3 import plain_s3_client


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevStack]:
    """The stack that `consumer up` runs, with short leases and forked workers."""
    with ForkedStack(tmp_path_factory.mktemp("system"), persist=False) as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**stack.environment(), "CONSUMER_ACK_WAIT": "5"}.items():
                patch.setenv(name, value)
            asyncio.run(apply(Settings.load()))
        daemons = [
            stack.start_daemon(str(task), {"MODEL_TYPE": str(task), "CONSUMER_ACK_WAIT": "5"})
            for task in DEFAULT_QUEUES
        ]
        for daemon in daemons:
            daemon.wait_ready()
        yield stack
        for daemon in daemons:
            assert daemon.alive, daemon.log_since_start()


@pytest.fixture
async def sender(system: DevStack) -> AsyncIterator[Client]:
    """A plain nats-py connection, for a sender without code of this project."""
    connection = await nats.connect(system.nats.url)
    yield connection
    await connection.close()


@pytest.fixture
def plain_s3(system: DevStack) -> Minio:
    """A plain S3 client."""
    return plain_s3_client(system.store)


@pytest.fixture
def log_of(system: DevStack) -> "LogOf":
    return LogOf(system)


class LogOf:
    """Reads the log of a daemon."""

    def __init__(self, system: DevStack) -> None:
        self._system = system

    def __call__(self, task: str) -> str:
        log: Path = self._system.directory / "logs" / f"{task}.log"
        return log.read_text()
