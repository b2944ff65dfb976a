"""Fixtures for the tests without servers."""

from collections.abc import Iterator

import pytest

from tests.support.behaviour import shorten_pauses
from tests.support.memory_world import MemoryWorld, Worlds


@pytest.fixture
def make_world() -> Iterator[Worlds]:
    """Create workers on in-memory ports, and end their threads after the test."""
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture
async def world(make_world: Worlds) -> MemoryWorld:
    """A text-to-image worker."""
    return await make_world()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the polling and retry intervals."""
    shorten_pauses(monkeypatch)
