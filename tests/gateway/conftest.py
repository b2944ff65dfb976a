"""A running system for all tests in this folder: servers, a daemon of each task, gateways."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import httpx2
import nats
import pytest
from openai import AsyncOpenAI

from consumer.app.apply import apply
from consumer.devstack import DevStack, GatewayServer
from consumer.gateway.keys import KeyFile
from consumer.gateway.tenants import Bounds
from consumer.settings import Settings
from generation_client import GenerationClient
from generation_contracts import Task
from generation_contracts.base import DEFAULT_QUEUES
from tests.support.forked import ForkedStack

WITHIN = 60.0  # seconds for an HTTP response


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevStack]:
    """NATS and S3 with their streams and bucket, without a daemon."""
    with ForkedStack(tmp_path_factory.mktemp("gateway"), persist=False) as running:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in running.environment().items():
                patch.setenv(name, value)
            asyncio.run(apply(Settings.load()))
        yield running


@pytest.fixture(scope="session")
def system(stack: DevStack) -> DevStack:
    """The stack with the demonstration models of both tasks."""
    few_steps = {"MODEL_DEFAULTS": '{"num_inference_steps": 4}'}  # a quarter of the device time
    settings = {Task.TEXT_TO_IMAGE: few_steps, Task.IMAGE_TO_TEXT: {}}
    daemons = [
        stack.start_daemon(str(task), {"MODEL_TYPE": str(task), **settings[task]})
        for task in DEFAULT_QUEUES
    ]
    for daemon in daemons:
        daemon.wait_ready()
    return stack


def start_gateway(stack: DevStack, name: str, **settings: str) -> GatewayServer:
    """Start a gateway on a stack, and wait until it is ready."""
    server = stack.start_gateway(name, settings)
    server.wait_ready()
    return server


@pytest.fixture(scope="session")
def gateway(system: DevStack) -> Iterator[GatewayServer]:
    """A gateway without keys, in front of both demonstration models."""
    running = start_gateway(system, "gateway")
    yield running
    assert running.alive, running.log_since_start()


@dataclass(frozen=True)
class KeyedGateway:
    """A gateway with two tenants."""

    server: GatewayServer
    alice: str
    bob: str

    @property
    def url(self) -> str:
        """URL of the gateway."""
        return self.server.url


@pytest.fixture(scope="session")
def keyed_gateway(system: DevStack) -> KeyedGateway:
    """A gateway with keys, in front of both demonstration models."""
    file = KeyFile(system.directory / "keys.json")
    alice, bob = file.add("alice", Bounds()), file.add("bob", Bounds())
    server = start_gateway(system, "keyed-gateway", GATEWAY_KEYS=str(file.path))
    return KeyedGateway(server, alice.text, bob.text)


@pytest.fixture
async def http(gateway: GatewayServer) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client of the gateway without keys."""
    async with httpx2.AsyncClient(base_url=gateway.url, timeout=WITHIN) as client:
        yield client


@pytest.fixture
async def openai(gateway: GatewayServer) -> AsyncIterator[AsyncOpenAI]:
    """An OpenAI client of the gateway without keys."""
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        yield client


@pytest.fixture
async def behind(system: DevStack) -> AsyncIterator[GenerationClient]:
    """A client on a separate NATS connection, to observe the jobs behind the gateway."""
    connection = await nats.connect(system.nats.url)
    async with GenerationClient(connection) as client:
        yield client
    await connection.close()
