"""The compared systems: how to start each, put it under load, and send one job.

Each system is a separate process. All other parts of a measurement are in common modules.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Literal, Protocol
from uuid import uuid4

import aiohttp
from nats.js.api import RetentionPolicy

from consumer.devstack import ChildProcess, free_ports
from consumer.devstack.loopback import HOST
from tests.bench.speed.peers import subjects
from tests.bench.speed.peers.job import FAIR
from tests.bench.speed.sender import PROMPT, Sender, WentWrongError, Wire
from tests.bench.speed.trial import TASK, Trial

_CALLERS = 4  # HTTP requests in flight: one runs, one is queued, and no gap follows


@dataclass(frozen=True)
class Which:
    """One system of the table.

    Attributes:
        kind: The program.
        at_once: The daemon's CONSUMER_MAX_ACK_PENDING.
        fair: Whether a peer uses the daemon's encoder.
    """

    kind: Literal["device", "serial", "fastapi", "faststream", "consumer"]
    at_once: int = 1
    fair: bool = False

    @property
    def slug(self) -> str:
        """Return the name for the command line and for files."""
        if self.kind == "consumer":
            return f"consumer-{self.at_once}"
        return f"{self.kind}-fair" if self.fair else self.kind

    def __str__(self) -> str:
        if self.kind == "consumer":
            return f"this daemon, max_ack_pending {self.at_once}"
        names = {
            "device": "the device alone",
            "serial": "serial loop",
            "fastapi": "FastAPI",
            "faststream": "FastStream",
        }
        return f"{names[self.kind]}, with this encoder" if self.fair else names[self.kind]


_PEERS: tuple[Literal["serial", "fastapi", "faststream"], ...] = ("serial", "fastapi", "faststream")
SYSTEMS = {
    one.slug: one
    for one in (
        Which("device"),
        *(Which(kind, fair=fair) for kind in _PEERS for fair in (False, True)),
        *(Which("consumer", at_once) for at_once in (1, 2, 3)),
    )
}


class System(Protocol):
    """A running system.

    Attributes:
        process: The process whose CPU time and memory are measured.
    """

    process: ChildProcess

    async def do(self, jobs: int) -> None:
        """Run this number of jobs under load; return when all results have arrived."""

    async def one(self) -> float:
        """Return the seconds from a request for one job to its result."""


async def start(which: Which, trial: Trial, parts: AsyncExitStack) -> System:
    """Start a system, and connect to it."""
    match which.kind:
        case "device" | "serial":
            return await _start_alone(which, trial, parts)
        case "fastapi":
            return await _start_http(which, trial, parts)
        case "faststream":
            return await _start_faststream(which, trial, parts)
        case "consumer":
            return await _start_daemon(which, trial, parts)


class Alone:
    """A loop without a server; it receives the number of jobs over a socket."""

    def __init__(
        self,
        process: ChildProcess,
        answers: asyncio.StreamReader,
        commands: asyncio.StreamWriter,
    ) -> None:
        self.process = process
        self._answers = answers
        self._commands = commands

    async def do(self, jobs: int) -> None:
        self._commands.write(f"{jobs}\n".encode())
        if await self._answers.readline() != b"done\n":
            raise WentWrongError("the loop has ended")

    async def one(self) -> float:
        began = time.perf_counter()
        await self.do(1)
        return time.perf_counter() - began


class OverHttp:
    """An HTTP server that responds when the job is done, with a few callers in parallel."""

    def __init__(
        self, process: ChildProcess, session: aiohttp.ClientSession, callers: int = _CALLERS
    ) -> None:
        self.process = process
        self._session = session
        self._callers = callers

    async def do(self, jobs: int) -> None:
        left = iter(range(jobs))
        async with asyncio.TaskGroup() as callers:
            for _ in range(self._callers):
                callers.create_task(self._call(left))

    async def one(self) -> float:
        began = time.perf_counter()
        await self._call(iter(range(1)))
        return time.perf_counter() - began

    async def _call(self, left: Iterator[int]) -> None:
        for _ in left:
            request_id = uuid4().hex
            body = {"request_id": request_id, "prompt": PROMPT}
            async with self._session.post("/infer", json=body) as answer:
                answer.raise_for_status()
                if (await answer.json())["request_id"] != request_id:
                    raise WentWrongError("the answer to another request")


class OverNats:
    """A process that receives requests from a stream."""

    def __init__(self, process: ChildProcess, sender: Sender) -> None:
        self.process = process
        self._sender = sender

    async def do(self, jobs: int) -> None:
        await self._sender.do(jobs)

    async def one(self) -> float:
        return await self._sender.one()


def wire_of_daemon(trial: Trial) -> Wire:
    """Return the daemon's subjects, and the fields for the images of a row."""
    row, root = trial.row, trial.subjects
    return Wire(
        request=lambda request_id: root.request(TASK, request_id),
        results=f"{root.root}.result.>",
        fields={"width": row.side, "height": row.side, "output_format": row.file_format},
    )


def _encoder(which: Which) -> dict[str, str]:
    return {FAIR: "1"} if which.fair else {}


async def _start_alone(which: Which, trial: Trial, parts: AsyncExitStack) -> Alone:
    address = trial.folder / "commands"
    argv = ["tests.bench.speed.peers.alone", which.kind, str(address)]
    process = trial.start_peer(which.slug, argv, **_encoder(which))
    process.wait_ready()
    answers, commands = await asyncio.open_unix_connection(address)
    parts.callback(commands.close)
    return Alone(process, answers, commands)


async def _start_http(which: Which, trial: Trial, parts: AsyncExitStack) -> OverHttp:
    (port,) = free_ports(1)
    argv = ["tests.bench.speed.peers.over_http", str(port)]
    process = trial.start_peer(which.slug, argv, port=port, **_encoder(which))
    process.wait_ready()
    session = aiohttp.ClientSession(f"http://{HOST}:{port}")
    return OverHttp(process, await parts.enter_async_context(session))


async def _start_faststream(which: Which, trial: Trial, parts: AsyncExitStack) -> OverNats:
    sender = Sender(Wire(request=lambda _: subjects.REQUEST, results=subjects.RESULTS))
    await sender.open(trial.stack.nats.url, parts)
    jetstream = sender.client.jetstream()
    await jetstream.add_stream(
        name=subjects.REQUESTS_STREAM,
        subjects=[subjects.REQUEST],
        retention=RetentionPolicy.WORK_QUEUE,
    )
    await jetstream.add_stream(name=subjects.RESULTS_STREAM, subjects=[subjects.RESULTS])
    argv = ["tests.bench.speed.peers.over_nats"]
    process = trial.start_peer(which.slug, argv, **_encoder(which))
    process.wait_ready()
    return OverNats(process, sender)


async def _start_daemon(which: Which, trial: Trial, parts: AsyncExitStack) -> OverNats:
    process = trial.start_daemon(which.slug, which.at_once)
    process.wait_ready()
    sender = Sender(wire_of_daemon(trial))
    await sender.open(trial.stack.nats.url, parts)
    return OverNats(process, sender)
