"""Many clients of two gateways: they wait, stream, read slowly or leave. One gateway is killed.

All requests are queued before the daemon starts, so all clients wait at the same time. Afterwards
every job must have one result, and each client that stayed must have received it once.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
import nats

from consumer.devstack import GatewayServer
from generation_contracts import ProgressEvent, encode
from tests.bench.gateway.serving import (
    DAEMON,
    MAX_ACK_PENDING,
    TIMEOUT,
    client,
    make_streams,
    start_daemon,
    start_gateway,
)
from tests.bench.speed.figures import MILLI, Pace, percentile
from tests.bench.speed.processes import at_rest, resident
from tests.bench.speed.report import Section, table
from tests.bench.speed.rows import Row
from tests.bench.speed.sender import PROMPT, WentWrongError
from tests.bench.speed.trial import TASK, Trial, new_trial

ROW = Row("sleeps", 50, 64, "png")
KEPT_BYTES = 16 * 2**20  # GATEWAY_EVENTS_BYTES
CLIENT_MB = 0.05  # what a client that waits or watches may add to the gateway's RSS
PREVIEW = "A" * 20_000  # characters of an event that the slow reader does not read
AFTER_RESULTS = 10  # results after which clients leave and a gateway is killed
POLL_INTERVAL = 0.2  # seconds
FIELDS = {"size": f"{ROW.side}x{ROW.side}", "response_format": "url"}


@dataclass(frozen=True)
class Size:
    """The numbers of clients.

    Attributes:
        waiting: Clients that wait for images.
        leaving: Waiting clients that disconnect before their result.
        watching: Streams of events.
        kept: Clients with an idempotency key at the gateway that is killed.
        unread: Events that are sent to the slow reader.
    """

    waiting: int = 500
    leaving: int = 50
    watching: int = 100
    kept: int = 50
    unread: int = 2_000

    @property
    def jobs(self) -> int:
        """Return the number of all jobs, with the slow reader's."""
        return self.waiting + self.watching + self.kept + 1

    @property
    def cancelled(self) -> int:
        """Return the minimum of cancelled jobs: a worker may have received some before."""
        return self.leaving - MAX_ACK_PENDING

    @property
    def growth(self) -> float:
        """Return the maximum growth of the RSS in MB: twice the events, plus the clients."""
        return 2 * KEPT_BYTES / 1e6 + CLIENT_MB * (self.waiting + self.watching)


@dataclass
class Crowd:
    """The results of the clients.

    Attributes:
        answered: Waiting clients that received their images.
        watched: Streams that ended with the terminal event.
        found: Clients that found their job at the other gateway.
        slow: Whether the slow reader's stream ended with the terminal event.
        read: Events that the slow reader received, with the terminal event.
        delays: Seconds from the time in a result to its arrival at the client.
        seconds: From the start of the daemon to the last result.
        results: Terminal events, by type.
        runs: Runs of the device.
        busy: Share of the time in which the device worked.
        memory: RSS of the gateway in MB, by moment.
    """

    size: Size
    answered: int = 0
    watched: int = 0
    found: int = 0
    slow: bool = False
    read: int = 0
    delays: list[float] = field(default_factory=list)
    seconds: float = 0.0
    results: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    busy: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def growth(self) -> float:
        """Return the growth of the gateway's RSS in MB."""
        return self.memory["at most"] - self.memory["alone"]

    def check(self) -> None:
        """Check that no job was lost or run twice, the cancellations, and the growth of the RSS.

        Raises:
            WentWrongError: With the numbers.
        """
        size, succeeded = self.size, self.results.get("succeeded", 0)
        cancelled = self.results.get("cancelled", 0)
        if cancelled < size.cancelled:
            raise WentWrongError(f"cancelled {cancelled}, not {size.cancelled}: {self}")
        if self.growth > size.growth:
            raise WentWrongError(f"RSS grew by {self.growth:.0f} MB, not {size.growth:.0f}: {self}")
        right = (
            self.answered == size.waiting - size.leaving
            and self.watched == size.watching
            and self.found == size.kept
            and self.slow
            and sum(self.results.values()) == size.jobs
            and self.runs <= succeeded + cancelled
            and self.runs >= succeeded >= size.jobs - size.leaving
        )
        if not right:
            raise WentWrongError(f"lost or doubled: {self}")


async def measure(size: Size) -> Crowd:
    """Run all clients and check their results."""
    with new_trial(ROW) as trial:
        async with AsyncExitStack() as parts:
            await make_streams(trial)
            limits = {"GATEWAY_EVENTS_BYTES": str(KEPT_BYTES)}
            gateways = [await start_gateway(trial, f"gateway-{n}", **limits) for n in range(2)]
            await at_rest(*(gateway.pid for gateway in gateways))
            scene = _Scene(trial, gateways, size)
            await scene.open(parts)
            try:
                await scene.play()
            except Exception as error:
                for gateway in gateways:
                    error.add_note(gateway.log_since_start()[-2000:])
                raise
            scene.crowd.check()
            return scene.crowd


class _Scene:
    """The two gateways and all clients.

    Args:
        trial: The servers.
        gateways: The second one is killed.
        size: The numbers of clients.
    """

    def __init__(self, trial: Trial, gateways: Sequence[GatewayServer], size: Size) -> None:
        self.crowd = Crowd(size)
        self._trial = trial
        self._staying, self._doomed = gateways
        self._size = size
        self._ended: dict[str, str] = {}  # the type of each terminal event
        self._some_ended = asyncio.Event()
        self._http: aiohttp.ClientSession
        self._nats: Any

    async def open(self, parts: AsyncExitStack) -> None:
        """Connect to the gateway and to NATS."""
        self._http = await parts.enter_async_context(client(self._staying.url))
        self._nats = await nats.connect(self._trial.stack.nats.url)
        parts.push_async_callback(self._nats.close)

        async def ended(message: Any) -> None:
            event = json.loads(message.data)
            self._ended[event["request_id"]] = event["type"].rpartition(".")[2]
            if len(self._ended) >= AFTER_RESULTS:
                self._some_ended.set()

        await self._nats.subscribe(f"{self._trial.subjects.root}.result.>", cb=ended)

    async def play(self) -> None:
        """Start all clients, then the daemon, and wait until all clients have their results."""
        size, crowd = self._size, self.crowd
        self._note_memory("alone")
        async with asyncio.timeout(TIMEOUT), asyncio.TaskGroup() as clients:
            memory_watcher = asyncio.create_task(self._watch_memory())
            for _ in range(size.waiting - size.leaving):
                clients.create_task(self._wait())
            for _ in range(size.watching):
                clients.create_task(self._telemetry())
            for number in range(size.kept):
                clients.create_task(self._reconnect(str(number)))
            clients.create_task(self._read_slowly())
            await self._queued(size.jobs - size.leaving)
            # Last in the queue: their jobs must be cancelled before the device runs them.
            leaving = [clients.create_task(self._leave()) for _ in range(size.leaving)]
            await self._queued(size.jobs)
            self._note_memory("all clients wait")
            daemon = await start_daemon(self._trial)
            began = time.monotonic()
            await self._some_ended.wait()
            for client_of_one in leaving:
                client_of_one.cancel()
            await asyncio.to_thread(self._doomed.kill)
            await self._all_ended()
            crowd.seconds = time.monotonic() - began
        memory_watcher.cancel()
        await at_rest(self._staying.pid, daemon.pid)
        self._note_memory("afterwards")
        for kind in self._ended.values():
            crowd.results[kind] = crowd.results.get(kind, 0) + 1
        runs = self._trial.runs(DAEMON)
        crowd.runs, crowd.busy = len(runs), Pace.of(runs).busy

    # -- clients ----------------------------------------------------------------------------------

    async def _wait(self) -> None:
        await self._images(self._http)
        self.crowd.answered += 1

    async def _leave(self) -> None:
        with suppress(asyncio.CancelledError):
            await self._images(self._http)

    async def _reconnect(self, key: str) -> None:
        """Wait at the gateway that is killed, then repeat the request at the other gateway."""
        with suppress(aiohttp.ClientError):
            async with client(self._doomed.url) as http:
                await self._images(http, key)
        await self._images(self._http, key)
        self.crowd.found += 1

    async def _images(self, http: aiohttp.ClientSession, key: str = "") -> None:
        headers = {"idempotency-key": key} if key else {}
        body = {"prompt": PROMPT, **FIELDS}
        async with http.post("/v1/images/generations", json=body, headers=headers) as answer:
            document = await answer.json()
            if answer.status != 200 or len(document["data"]) != 1:
                raise WentWrongError(f"{answer.status}: {str(document)[:300]}")

    async def _telemetry(self) -> None:
        job = await self._job()
        ids: list[str] = []
        async with self._http.get(job["events_url"]) as answer:
            async for line in answer.content:
                text = line.decode().strip()
                if text.startswith("id:"):
                    ids.append(text)
                if text.startswith("data:"):
                    last = json.loads(text.removeprefix("data:"))
        if len(set(ids)) < len(ids):
            raise WentWrongError(f"a duplicate event: {ids}")
        if last.get("type") == "generation.v1.succeeded":
            ended = datetime.fromisoformat(last["time"])
            self.crowd.delays.append((datetime.now(UTC) - ended).total_seconds())
            self.crowd.watched += 1

    async def _read_slowly(self) -> None:
        """Do not read while megabytes of events arrive; read everything when the job has ended."""
        job = await self._job()
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self._staying.ports["http"], limit=2**16
        )
        address, host = job["events_url"], self._staying.url.rpartition("/")[2]
        lines = (f"GET {address} HTTP/1.1", f"host: {host}", "connection: close", "", "")
        writer.write("\r\n".join(lines).encode())
        await self._send_unread(job["id"])
        while job["id"] not in self._ended:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(POLL_INTERVAL)
        ids = []
        while line := await _line(reader):
            if line.startswith("id:"):
                ids.append(line.removeprefix("id:").strip())
        writer.close()
        self.crowd.read = len(ids)
        # The gateway may have disconnected it, so reconnect with the last received id.
        headers = {"last-event-id": ids[-1]}
        async with self._http.get(address, headers=headers) as answer:
            self.crowd.slow = answer.status == 204 or "succeeded" in await answer.text()

    async def _send_unread(self, request_id: str) -> None:
        subject = self._trial.subjects.progress(TASK, request_id)
        for number in range(self._size.unread):
            event = ProgressEvent(
                request_id=request_id,
                task=TASK,
                sequence=number,
                time=datetime.now(UTC),
                worker="bench",
                attempt=1,
                step=number,
                of=self._size.unread,
                preview=PREVIEW,
            )
            await self._nats.publish(subject, encode(event))
            if number % 50 == 0:
                await self._nats.flush()

    async def _job(self) -> dict[str, str]:
        async with self._http.post("/v1/jobs", json={"task": TASK, "prompt": PROMPT}) as answer:
            job: dict[str, str] = await answer.json()
            if answer.status != 202:
                raise WentWrongError(f"{answer.status}: {str(job)[:300]}")
            return job

    # -- observations -----------------------------------------------------------------------------

    async def _queued(self, jobs: int) -> None:
        stream = self._trial.subjects.requests_stream(TASK)
        jetstream = self._nats.jetstream()
        # There is no event to wait for.
        while (await jetstream.stream_info(stream)).state.messages < jobs:  # noqa: ASYNC110
            await asyncio.sleep(POLL_INTERVAL)

    async def _all_ended(self) -> None:
        while len(self._ended) < self._size.jobs:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(POLL_INTERVAL)

    async def _watch_memory(self) -> None:
        while True:
            self._note_memory("at most")
            await asyncio.sleep(POLL_INTERVAL)

    def _note_memory(self, moment: str) -> None:
        now = resident(self._staying.pid)
        self.crowd.memory[moment] = max(self.crowd.memory.get(moment, 0.0), now)


async def _line(reader: asyncio.StreamReader) -> str:
    """Return the next line, cut where it is long; empty at the end."""
    try:
        return (await reader.readuntil(b"\n")).decode(errors="replace")
    except asyncio.LimitOverrunError as error:
        return (await reader.read(error.consumed)).decode(errors="replace")
    except asyncio.IncompleteReadError as error:
        return error.partial.decode(errors="replace")


def section(crowd: Crowd) -> Section:
    """Make the table."""
    size, delays = crowd.size, crowd.delays
    lines: list[tuple[str, object, object]] = [
        ("clients that wait for images: answered", size.waiting - size.leaving, crowd.answered),
        (
            "clients that disconnect: their jobs cancelled",
            f"{size.cancelled} to {size.leaving}",
            crowd.results.get("cancelled", 0),
        ),
        ("streams of events: ended with the terminal event", size.watching, crowd.watched),
        ("clients of the killed gateway: found their job by its key", size.kept, crowd.found),
        ("a reader that does not read: its terminal event", 1, int(crowd.slow)),
        ("its events, the rest of which was dropped", f"at most {size.unread + 1}", crowd.read),
        ("results", size.jobs, sum(crowd.results.values())),
        ("runs of the device", f"at most {size.jobs - size.cancelled}", crowd.runs),
        ("device busy", None, crowd.busy),
        ("from a result to the client of its stream, p50, ms", None, _ms(delays, 0.5)),
        ("from a result to the client of its stream, p99, ms", None, _ms(delays, 0.99)),
        ("growth of the gateway's RSS, MB", f"at most {size.growth:.0f}", crowd.growth),
        *((f"RSS of the gateway, MB: {moment}", None, mb) for moment, mb in crowd.memory.items()),
    ]
    text = (
        f"A crowd: {size.waiting} clients wait, {size.watching} watch, {size.kept} wait with an "
        f"idempotency key at a second gateway, all at the same time, before the daemon starts "
        f"({ROW}). Then {size.leaving} waiting clients, the last in the queue, disconnect, and "
        f"the second gateway is killed. One reader does not read "
        f"{size.unread * len(PREVIEW) / 1e6:.0f} MB of events; `GATEWAY_EVENTS_BYTES` is "
        f"{KEPT_BYTES // 2**20} MiB.\n\n"
        f"{table(('', 'expected', 'found'), lines)}"
    )
    numbers = {"busy": crowd.busy, "rss_mb": crowd.memory, "p99_ms": _ms(delays, 0.99)}
    return Section("gateway-crowd", text, numbers)


def _ms(seconds: Sequence[float], part: float) -> float:
    return percentile(seconds, part) * MILLI
