"""One running system for the whole folder: servers, a daemon of each task, a gateway."""

import asyncio
import sys
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path

import pytest

from consumer.apply import apply
from consumer.devstack import ChildProcess, DevStack, free_ports
from consumer.devstack.loopback import HOST, http_status
from consumer.settings import Settings
from generation_contracts import Task

_SERVE = """
import os, uvicorn
from consumer.gateway.app import create_app
from consumer.settings import Settings
settings = Settings.load()
uvicorn.run(
    create_app(settings), host=settings.gateway_host, port=settings.gateway_port, access_log=False
)
"""


class GatewayProcess(ChildProcess):
    """A gateway as a child process."""

    def __init__(self, name: str, settings: Mapping[str, str], *, log: Path) -> None:
        port = free_ports(1)[0]
        super().__init__(
            name,
            [sys.executable, "-P", "-c", _SERVE],
            log=log,
            env={**settings, "GATEWAY_PORT": str(port)},
            ports={"http": port},
        )

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.ports['http']}"

    def _is_ready(self) -> bool:
        return http_status(self.ports["http"], "/openapi.json") == HTTPStatus.OK


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevStack]:
    """NATS and S3 with their streams and bucket; no daemon."""
    with DevStack(tmp_path_factory.mktemp("gateway"), persist=False) as running:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in running.environment().items():
                patch.setenv(name, value)
            asyncio.run(apply(Settings.load()))
        yield running


@pytest.fixture(scope="session")
def system(stack: DevStack) -> DevStack:
    """The stack with the demonstration models of both tasks."""
    daemons = [stack.start_daemon(str(task), {"MODEL_TYPE": str(task)}) for task in Task]
    for daemon in daemons:
        daemon.wait_ready()
    return stack


def start_gateway(stack: DevStack, name: str, **settings: str) -> GatewayProcess:
    """Start a gateway on a stack: `with start_gateway(stack, "gateway") as gateway`."""
    environment = {**stack.environment(), **settings}
    return GatewayProcess(name, environment, log=stack.directory / "logs" / f"{name}.log")


@pytest.fixture(scope="session")
def gateway(system: DevStack) -> Iterator[GatewayProcess]:
    """A gateway without keys, in front of both demonstration models."""
    with start_gateway(system, "gateway") as running:
        yield running
        assert running.alive, running.log_since_start()
