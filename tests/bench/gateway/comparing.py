"""Cost of HTTP: the gateway compared with the bus alone, FastAPI and LitServe."""

import asyncio
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import aiohttp

from consumer.devstack import ChildProcess, free_ports
from consumer.devstack.loopback import HOST
from tests.bench.gateway.serving import DAEMON, make_streams, over_gateway, start_daemon
from tests.bench.speed.figures import MILLI, Pace, percentile
from tests.bench.speed.measuring import WARM_UP, Plan, one_at_a_time
from tests.bench.speed.processes import at_rest, cpu_seconds, resident
from tests.bench.speed.report import Section, table
from tests.bench.speed.rows import Row
from tests.bench.speed.sender import Sender, WentWrongError
from tests.bench.speed.systems import OverHttp, OverNats, System, wire_of_daemon
from tests.bench.speed.trial import Trial, new_trial

CALLERS = 8  # HTTP requests in flight under load
ROWS = (
    Row("sleeps", 0, 64, "png"),
    Row("sleeps", 50, 64, "png"),
    Row("sleeps", 50, 1024, "png"),
)
BUS = "the bus alone"
FASTAPI = "FastAPI"
LITSERVE = "LitServe"
SYSTEMS = (BUS, "gateway, url", "gateway, b64_json", FASTAPI, LITSERVE)
_MODULES = {
    FASTAPI: "tests.bench.speed.peers.over_http",
    LITSERVE: "tests.bench.speed.peers.over_litserve",
}


@dataclass(frozen=True)
class Figures:
    """The values of one row of the table.

    Attributes:
        jobs_per_second: Under load.
        busy: Share of the time in which the device worked, under load.
        p50: Milliseconds from a request to an idle system to its result.
        p99: The 99th percentile of the same time.
        added: `p50` minus the milliseconds of the device.
        cpu: Milliseconds of CPU for each job, of all processes of the system.
        resident: MB of the process that clients connect to.
    """

    jobs_per_second: float
    busy: float
    p50: float
    p99: float
    added: float
    cpu: float
    resident: float


def installed() -> Sequence[str]:
    """Return the installed systems."""
    return [name for name in SYSTEMS if name != LITSERVE or importlib.util.find_spec("litserve")]


async def measure(name: str, row: Row, plan: Plan) -> Figures:
    """Measure one system, with nothing else running.

    Raises:
        WentWrongError: A response is wrong.
    """
    with new_trial(row) as trial:
        async with AsyncExitStack() as parts:
            system, processes = await _start(name, trial, parts)
            try:
                return await _measured(system, processes, name, trial, plan)
            except Exception as error:
                for process in processes:
                    error.add_note(process.log_since_start()[-3000:])
                raise


async def _start(
    name: str, trial: Trial, parts: AsyncExitStack
) -> tuple[System, Sequence[ChildProcess]]:
    """Start a system; also return its processes, without the servers."""
    if name in _MODULES:
        (port,) = free_ports(1)
        peer = trial.start_peer(name, [_MODULES[name], str(port)], port=port)
        await asyncio.to_thread(peer.wait_ready)
        session = await parts.enter_async_context(aiohttp.ClientSession(f"http://{HOST}:{port}"))
        return OverHttp(peer, session, callers=CALLERS), (peer,)
    await make_streams(trial)
    daemon = await start_daemon(trial)
    if name == BUS:
        sender = Sender(wire_of_daemon(trial))
        await sender.open(trial.stack.nats.url, parts)
        return OverNats(daemon, sender), (daemon,)
    response_format = name.partition(", ")[2]
    system = await over_gateway(trial, parts, response_format=response_format, callers=CALLERS)
    return system, (daemon, system.process)


async def _measured(
    system: System, processes: Sequence[ChildProcess], name: str, trial: Trial, plan: Plan
) -> Figures:
    pids = [process.pid for process in processes]
    await at_rest(*pids)
    await system.do(WARM_UP)
    device = name if name in _MODULES else DAEMON
    jobs = plan.load(Pace.of(trial.runs(device)).period)
    before = cpu_seconds(*pids)
    await system.do(jobs)
    cpu = cpu_seconds(*pids) - before
    memory = resident(system.process.pid)
    pace = Pace.of(trial.runs(device)[WARM_UP:])
    single = await one_at_a_time(system, plan)
    expected = WARM_UP + jobs + len(single) + 1
    if (runs := len(trial.runs(device))) != expected:
        raise WentWrongError(f"{runs} runs for {expected} jobs")
    p50 = percentile(single, 0.5) * MILLI
    return Figures(
        jobs_per_second=1 / pace.period,
        busy=pace.busy,
        p50=p50,
        p99=percentile(single, 0.99) * MILLI,
        added=p50 - trial.row.milliseconds,
        cpu=cpu / jobs * MILLI,
        resident=memory,
    )


_COLUMNS = (
    "",
    "jobs/s",
    "device busy",
    "one job p50, ms",
    "p99, ms",
    "added to the device, ms",
    "CPU, ms/job",
    "RSS, MB",
)
_EXPLAINED = f"""\
One HTTP request for each job, `POST /v1/images/generations` at the gateway; {CALLERS} requests
in flight under load. *The bus alone* is the same daemon (max_ack_pending 3) without the gateway.
FastAPI and LitServe do the job in their own process, keep their queue in memory and answer with a
key of the store, as `url` does; `b64_json` also carries the file. *Added to the device* is the
median of one job at an idle system without the milliseconds of the device. CPU is that of all
processes of a system, RSS that of the one that clients connect to."""


def section(found: Mapping[Row, Mapping[str, Figures]]) -> Section:
    """Make the tables."""
    parts = [_EXPLAINED]
    for row, systems in found.items():
        lines = [
            (
                name,
                figures.jobs_per_second,
                figures.busy if row.milliseconds else None,
                figures.p50,
                figures.p99,
                figures.added,
                figures.cpu,
                figures.resident,
            )
            for name, figures in systems.items()
        ]
        parts.append(f"**{row}**\n\n{table(_COLUMNS, lines)}")
    numbers = {
        row.slug: {
            name: {"jobs_per_second": f.jobs_per_second, "busy": f.busy, "added_ms": f.added}
            for name, f in systems.items()
        }
        for row, systems in found.items()
    }
    return Section("gateway", "\n\n".join(parts), numbers)
