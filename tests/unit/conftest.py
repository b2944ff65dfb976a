"""Fixtures for the tests without servers."""

from collections.abc import Iterator

import pytest

from tests.support.behaviour import shorten_pauses
from tests.support.memory_world import MemoryWorld, Worlds


@pytest.fixture
def make_world() -> Iterator[Worlds]:
    """Makes workers on in-memory ports, and ends their threads."""
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture
async def world(make_world: Worlds) -> MemoryWorld:
    """A worker that makes pictures."""
    return await make_world()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often and try again soon."""
    shorten_pauses(monkeypatch)
