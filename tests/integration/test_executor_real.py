"""The behaviour of every worker, on a real bus and a real store."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from functools import partial

import pytest

from consumer.devstack import DevStack
from tests.integration.real_world import RealWorld
from tests.support.behaviour import Behaviour, MakeWorld
from tests.support.plain_s3 import plain_s3_client


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevStack]:
    """Start servers for all tests of this module; each worker has a separate subject root."""
    with DevStack(tmp_path_factory.mktemp("servers"), persist=False) as stack:
        plain_s3_client(stack.store).make_bucket(stack.store.bucket)
        yield stack


@pytest.fixture
async def make_world(servers: DevStack) -> AsyncIterator[MakeWorld]:
    """Return a function that starts workers; close the workers after the test."""
    async with AsyncExitStack() as parts:
        yield partial(RealWorld.make, servers, parts)


class TestExecution(Behaviour):
    """Run the suite with the `make_world` of this module."""
