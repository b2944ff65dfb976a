"""Throughput of a gateway without a worker and without a device."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

import aiohttp

from tests.bench.gateway.serving import client, make_streams, start_gateway
from tests.bench.speed.figures import MILLI, percentile
from tests.bench.speed.processes import at_rest, cpu_seconds
from tests.bench.speed.report import Section, table
from tests.bench.speed.rows import Row
from tests.bench.speed.sender import PROMPT, WentWrongError
from tests.bench.speed.trial import TASK, new_trial

CALLERS = 32
ROW = Row("sleeps", 0, 64, "png")

Call = Callable[[int], Awaitable[None]]


@dataclass(frozen=True)
class Rate:
    """One kind of request.

    Attributes:
        per_second: Responses in each second.
        p50: Milliseconds of one request under this load.
        p99: The 99th percentile of the same time.
        cpu: Milliseconds of CPU of the gateway for each request.
    """

    per_second: float
    p50: float
    p99: float
    cpu: float


async def measure(requests: int) -> Mapping[str, Rate]:
    """Send this number of requests of each kind to a gateway."""
    with new_trial(ROW) as trial:
        async with AsyncExitStack() as parts:
            await make_streams(trial)
            gateway = await start_gateway(trial, "gateway")
            await at_rest(gateway.pid)
            session = await parts.enter_async_context(client(gateway.url))
            jobs: list[str] = []

            async def submit(_: int) -> None:
                body = {"task": TASK, "prompt": PROMPT}
                async with session.post("/v1/jobs", json=body) as answer:
                    jobs.append((await _document(answer))["status_url"])

            async def get_job(number: int) -> None:
                async with session.get(jobs[number % len(jobs)]) as answer:
                    await _document(answer)

            async def list_jobs(_: int) -> None:
                async with session.get("/v1/jobs") as answer:
                    await _document(answer)

            calls: dict[str, Call] = {
                "`POST /v1/jobs`": submit,
                "`GET /v1/jobs/{id}`": get_job,
                "`GET /v1/jobs`, 20 of them": list_jobs,
            }
            return {name: await _rate(send, requests, gateway.pid) for name, send in calls.items()}


async def _document(answer: aiohttp.ClientResponse) -> dict[str, str]:
    body: dict[str, str] = await answer.json()
    if answer.status not in {200, 202}:
        raise WentWrongError(f"{answer.status}: {str(body)[:300]}")
    return body


async def _rate(send: Call, requests: int, pid: int) -> Rate:
    left = iter(range(requests))
    seconds: list[float] = []

    async def call() -> None:
        for number in left:
            began = time.perf_counter()
            await send(number)
            seconds.append(time.perf_counter() - began)

    cpu, began = cpu_seconds(pid), time.perf_counter()
    async with asyncio.TaskGroup() as callers:
        for _ in range(CALLERS):
            callers.create_task(call())
    took = time.perf_counter() - began
    return Rate(
        per_second=requests / took,
        p50=percentile(seconds, 0.5) * MILLI,
        p99=percentile(seconds, 0.99) * MILLI,
        cpu=(cpu_seconds(pid) - cpu) / requests * MILLI,
    )


def section(found: Mapping[str, Rate]) -> Section:
    """Make the table."""
    columns = ("", "requests/s", "p50, ms", "p99, ms", "CPU of the gateway, ms/request")
    lines = [(name, rate.per_second, rate.p50, rate.p99, rate.cpu) for name, rate in found.items()]
    text = (
        f"Requests that one gateway answers, with {CALLERS} in flight; the client has the other "
        f"core. No worker runs: all jobs wait.\n\n{table(columns, lines)}"
    )
    numbers = {name: {"per_second": rate.per_second} for name, rate in found.items()}
    return Section("gateway-requests", text, numbers)
