"""The parts of the bus together, while the server is killed repeatedly."""

import asyncio
import random
from collections import Counter

from nats.errors import Error

from consumer.jobs.lease import Lease
from generation_contracts import SucceededEvent
from generation_contracts.examples import EVENTS
from tests.conftest import InstallationOf, StartNats
from tests.integration.bus_installation import (
    REQUESTS,
    RESULTS,
    TASK,
    Installation,
    Worker,
    soon,
    until,
)

JOBS = 80
KILLS = 4
LEASE = 2.0  # seconds


async def test_each_request_has_one_result_after_repeated_server_kills(
    start_nats: StartNats, installation_of: InstallationOf
) -> None:
    installation = await installation_of(start_nats(), ack_wait=LEASE, max_ack_pending=2)
    workers = [await installation.worker() for _ in range(2)]
    runs: Counter[str] = Counter()
    working = [asyncio.create_task(work(installation, worker, runs)) for worker in workers]
    feeding = asyncio.create_task(feed(installation))
    for kill in range(1, KILLS + 1):
        while len(runs) < kill * JOBS // (KILLS + 1):  # noqa: ASYNC110 - spreads the kills
            await asyncio.sleep(0.01)
        await installation.kill_server()
        await installation.start_server()
    await soon(feeding)

    async def all_done() -> bool:
        return await installation.count(REQUESTS) == 0

    await until(all_done)
    for worker in workers:
        worker.loop.stop()
    await soon(asyncio.gather(*working))

    counts = (await installation.api(f"STREAM.INFO.{RESULTS}", {"subjects_filter": ">"}))["state"]
    assert len(counts["subjects"]) == JOBS
    assert set(counts["subjects"].values()) == {1}
    assert set(runs) == {f"r-{n}" for n in range(JOBS)}
    print(f"{sum(runs.values()) - JOBS} of {JOBS} ran more than once")  # noqa: T201 - shown by `pytest -s`


async def work(installation: Installation, worker: Worker, runs: Counter[str]) -> None:
    example = EVENTS["succeeded_image"]
    assert isinstance(example, SucceededEvent)
    generator = random.Random(2)
    events = installation.events_of(worker)
    while (delivered := await worker.loop.next()) is not None:
        request_id = installation.subjects.id_in(delivered.subject, TASK)
        assert request_id is not None
        async with Lease(delivered, ack_wait=LEASE):
            if await events.find_result(TASK, request_id) is None:
                runs[request_id] += 1
                await asyncio.sleep(generator.uniform(0.005, 0.03))  # the model
                event = example.model_copy(
                    update={"request_id": request_id, "attempt": delivered.attempt}
                )
                await events.publish_result(event, trace_parent=None)
            await delivered.ack()


async def feed(installation: Installation) -> None:
    for n in range(JOBS):
        while True:
            try:
                await installation.publish(
                    request_id=f"r-{n}", headers={"Nats-Msg-Id": f"r-{n}"}, timeout=0.3
                )
            except (Error, OSError):
                continue
            break
