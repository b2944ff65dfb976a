"""A daemon and gateways on the servers of a trial, and HTTP clients that ask them."""

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

PATIENCE = 300.0  # seconds; only bounds a wait for something that must happen
DAEMON = "daemon"
MAX_ACK_PENDING = 3  # the daemon takes it from the durable


async def make_streams(trial: Trial) -> None:
    """`consumer apply`: a gateway may come before the first daemon."""
    values: dict[str, Any] = {
        **trial.stack.environment(),
        "MODEL_TYPE": str(TASK),
        "CONSUMER_MAX_ACK_PENDING": MAX_ACK_PENDING,
    }
    values["CONSUMER_SUBJECT_ROOT"] = trial.subjects.root
    await apply(Settings(**{name.lower(): value for name, value in values.items()}))


async def start_gateway(trial: Trial, name: str, **settings: str) -> GatewayServer:
    """Start a gateway; it is ready."""
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
    """Start a daemon with the stand-in; it is ready."""
    daemon = trial.start_daemon(DAEMON, MAX_ACK_PENDING)
    await asyncio.to_thread(daemon.wait_ready)
    return daemon


def client(url: str) -> aiohttp.ClientSession:
    """Open a client with as many connections as it likes."""
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=PATIENCE),
    )


class OverGateway(OverHttp):
    """A gateway, asked as OpenAI's clients ask.

    Args:
        process: The gateway.
        session: Of the gateway.
        fields: Of every request.
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
    """Start a gateway in front of the daemon that runs."""
    gateway = await start_gateway(trial, "gateway")
    session = await parts.enter_async_context(client(gateway.url))
    row = trial.row
    fields = {
        "size": f"{row.side}x{row.side}",
        "output_format": row.file_format,
        "response_format": response_format,
    }
    return OverGateway(gateway, session, fields, callers)
