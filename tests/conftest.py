"""Fixtures for all tests: real servers, each test with its own."""

import importlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from xdist.scheduler import LoadScopeScheduling

from consumer.devstack import NatsServer
from tests.integration.bus_installation import Installation

pytest_plugins = ["tests.support.tiny_models", "tests.support.scene_fixtures"]
pytest.register_assert_rewrite("tests.support.behaviour")

# What the tests of a lot have in common takes seconds to start: daemons with models, or servers
# with users. Each test that is not named here is a separate lot.
LOTS = {
    "the system of tests/e2e": ("tests/e2e/",),
    "the system of tests/gateway, for pages": ("tests/gateway/test_page",),
    "the system of tests/gateway, for clients": tuple(
        f"tests/gateway/test_{name}.py"
        for name in (
            "docs",
            "infer",
            "litellm",
            "open_webui",
            "openai_chat",
            "openai_edits",
            "openai_images",
            "openai_node",
            "operations",
        )
    ),
    "gateways for schemathesis": ("tests/gateway/test_schemathesis.py",),
    "the servers of tests/services/test_accounts.py": ("tests/services/test_accounts.py",),
    "the servers of tests/services/test_permissions.py": ("tests/services/test_permissions.py",),
    "the models of tests/integration/test_demonstration.py": (
        "tests/integration/test_demonstration.py",
    ),
}

# Where no bytecode is stored, as some container images ask for, each of the hundreds of processes
# that the tests start would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Three processes share the cores, with the daemons that they start: threads of torch that wait for
# each other would take the time of those that work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# structlog's own default shows every variable of every frame, which takes seconds for each line.
structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)


class OneProcessForModels(LoadScopeScheduling):
    """Hands out single tests, but those of a lot together; the largest lot first."""

    def _split_scope(self, nodeid: str) -> str:
        return next((lot for lot, starts in LOTS.items() if nodeid.startswith(starts)), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneProcessForModels:
    """A hook of pytest-xdist, whose own groups do not work with pytest 9."""
    return OneProcessForModels(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test with the marker `gpu` where there is no CUDA device."""
    if item.get_closest_marker("gpu") and not importlib.import_module("torch").cuda.is_available():
        pytest.skip("torch finds no CUDA device")


StartNats = Callable[..., NatsServer]
InstallationOf = Callable[..., Awaitable[Installation]]


@pytest.fixture
def start_nats(tmp_path: Path) -> Iterator[StartNats]:
    """Starts servers with more configuration: `start_nats("max_payload: 2048")`."""
    with ExitStack() as running:

        def start(config: str = "") -> NatsServer:
            directory = tmp_path / f"nats-{len(list(tmp_path.glob('nats-*')))}"
            return running.enter_context(NatsServer(directory, config=config))

        yield start


@pytest.fixture
def nats_server(start_nats: StartNats) -> NatsServer:
    """A nats-server that the test may kill and start again; ready in 30 ms."""
    return start_nats()


@pytest.fixture
async def installation_of() -> AsyncIterator[InstallationOf]:
    """Makes the streams and the durable of text_to_image on a server."""
    async with AsyncExitStack() as parts:
        yield partial(Installation.make, parts=parts)


@pytest.fixture
async def installation(nats_server: NatsServer, installation_of: InstallationOf) -> Installation:
    """Streams and the durable of text_to_image on a separate server."""
    return await installation_of(nats_server)
