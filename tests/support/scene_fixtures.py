"""Fixtures: servers that all tests of a process share, and a separate installation per test."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from consumer.devstack import DevStack
from tests.support.scene import Scene


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevStack]:
    with DevStack(tmp_path_factory.mktemp("faults"), persist=False) as stack:
        yield stack


@pytest.fixture
async def scene(servers: DevStack, tmp_path: Path) -> AsyncIterator[Scene]:
    """An installation on running servers."""
    for server in (servers.nats, servers.store):
        if not server.alive:  # a failed test may not have restarted the server
            server.start()
        server.wait_ready()
    async with AsyncExitStack() as parts:
        scene = Scene(servers, tmp_path, parts)
        await scene.open()
        yield scene
