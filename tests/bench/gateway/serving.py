"""A daemon, gateways and HTTP clients on the servers of a trial."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp

from consumer.app.apply import apply
from consumer.devstack import ChildProcess, Daemon, GatewayServer
from consumer.settings import Settings
from tests.bench.speed.sender import PROMPT, WentWrongError
from tests.bench.speed.systems import OverHttp
from tests.bench.speed.trial import TASK, Trial

TIMEOUT = 300.0  # seconds; upper bound of a wait for a required event
DAEMON = "daemon"
MAX_ACK_PENDING = 3  # the daemon reads it from the durable


async def make_streams(trial: Trial) -> None:
    """Run `consumer apply`: a gateway may start before the first daemon."""
    values: dict[str, Any] = {
        **trial.stack.environment(),
        "MODEL_TYPE": str(TASK),
        "CONSUMER_MAX_ACK_PENDING": MAX_ACK_PENDING,
    }
    values["CONSUMER_SUBJECT_ROOT"] = trial.subjects.root
    await apply(Settings(**{name.lower(): value for name, value in values.items()}))


async def start_gateway(trial: Trial, name: str, **settings: str) -> GatewayServer:
    """Start a gateway and wait until it is ready."""
    environment = {
        **trial.stack.environment(),
        "CONSUMER_SUBJECT_ROOT": trial.subjects.root,
        "LOG_LEVEL": "WARNING",
        **settings,
    }
    gateway = GatewayServer(name, environment, log=trial.folder / f"{name}.log")
    trial.parts.callback(gateway.kill)
    gateway.start()
    await asyncio.to_thread(gateway.wait_ready)
    return gateway


async def start_daemon(trial: Trial) -> Daemon:
    """Start a daemon with the stand-in and wait until it is ready."""
    daemon = trial.start_daemon(DAEMON, MAX_ACK_PENDING)
    await asyncio.to_thread(daemon.wait_ready)
    return daemon


def client(url: str) -> aiohttp.ClientSession:
    """Open a client without a limit of connections."""
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT),
    )


class OverGateway(OverHttp):
    """A gateway with requests of the OpenAI API.

    Args:
        process: The gateway.
        session: A session with the URL of the gateway.
        fields: Fields of every request.
        callers: Requests in flight under load.
    """

    def __init__(
        self,
        process: ChildProcess,
        session: aiohttp.ClientSession,
        fields: dict[str, Any],
        callers: int,
    ) -> None:
        super().__init__(process, session, callers)
        self._fields = {"prompt": PROMPT, **fields}

    async def _call(self, left: Iterator[int]) -> None:
        for _ in left:
            async with self._session.post("/v1/images/generations", json=self._fields) as answer:
                body = await answer.json()
                if answer.status != 200 or len(body["data"]) != 1:
                    raise WentWrongError(f"{answer.status}: {str(body)[:300]}")


async def over_gateway(
    trial: Trial, parts: AsyncExitStack, *, response_format: str, callers: int
) -> OverGateway:
    """Start a gateway for the running daemon."""
    gateway = await start_gateway(trial, "gateway")
    session = await parts.enter_async_context(client(gateway.url))
    row = trial.row
    fields = {
        "size": f"{row.side}x{row.side}",
        "output_format": row.file_format,
        "response_format": response_format,
    }
    return OverGateway(gateway, session, fields, callers)
