"""One soak: start servers and workers, send requests, inject faults, read the state afterwards."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from nats.js.errors import NotFoundError

from consumer.devstack import DevStack
from generation_contracts import Task
from tests.hostile.attacker import Attacker, is_attackers
from tests.hostile.users import Users
from tests.soak.chaos import Chaos, Fault, Supervised
from tests.soak.figures import Figures, figures
from tests.soak.hostile import attack, planned, report
from tests.soak.records import Records, processes_of, read
from tests.soak.scenes import CAUSE, HostileScene, Options, SoakScene
from tests.soak.sender import Sender
from tests.soak.verdict import problems
from tests.soak.workload import Sending, Workload
from tests.support.scene import POLL, Scene

MAX_STALL = 90.0  # seconds; injected faults stop a queue for a few, on a busy machine for 35
CHILDREN_TIMEOUT = 10.0  # seconds for the children of a stopped worker to exit
COSTLY_FROM = 60.0  # seconds; a shorter soak has no time for requests that occupy a worker for long


@dataclass(frozen=True)
class Soaked:
    """A finished soak.

    Attributes:
        confirmed_at: Time of each publish acknowledgement by message id; seconds since the epoch.
        retries: Number of publishes without an acknowledgement.
        unfinished: Why the soak stopped early; empty when it finished.
        attacker: The attacker, if there was one.
    """

    scene: Scene
    sendings: list[Sending]
    records: Records
    faults: list[Fault]
    confirmed_at: dict[str, float]
    retries: int
    unfinished: str
    attacker: Attacker | None = None

    def problems(self) -> list[str]:
        """Return every violated guarantee, one line each."""
        found = problems(self.sendings, self.records, hostile=self.attacker is not None)
        if self.attacker is not None and self._figures.stall > MAX_STALL:
            found.append(f"the queue stopped for {self._figures.stall:.0f} s")
        return [self.unfinished, *found] if self.unfinished else found

    def figures(self) -> list[str]:
        """Return the lines of the report."""
        attacks = [] if self.attacker is None else report(self.attacker)
        return [*self._figures.lines(), f"published again   {self.retries}", *attacks]

    @property
    def _figures(self) -> Figures:
        return figures(self.sendings, self.records, self.faults, self.confirmed_at)

    def save(self) -> None:
        """Write the sendings, the faults and the records to the folder of the logs."""
        with (self.scene.folder / "soaked.json").open("w") as file:
            json.dump([self.sendings, self.faults, self.records], file, indent=1, default=_plain)


@asynccontextmanager
async def soak(options: Options, folder: Path) -> AsyncIterator[Soaked]:
    """Run a soak; its servers run until the block ends.

    Args:
        options: Options of the soak.
        folder: Folder for data and logs.
    """
    users = Users(folder) if options.hostile else None
    config = users.config if users else ""
    with DevStack(folder / "servers", persist=False, nats_config=config) as stack:
        async with AsyncExitStack() as parts:
            scene = (
                HostileScene(stack, folder, parts, options, users)
                if users
                else SoakScene(stack, folder, parts, options)
            )
            await scene.open()
            yield await _run(options, scene)


async def _run(options: Options, scene: SoakScene) -> Soaked:
    workload = Workload(
        scene.subjects,
        options.seed,
        seconds=options.seconds,
        costly=options.seconds >= COSTLY_FROM,
        hostile=options.hostile,
    )
    tasks = [Task.TEXT_TO_IMAGE] * options.workers + [Task.IMAGE_TO_TEXT] * options.hostile
    for worker in [scene.launch(CAUSE, MODEL_TYPE=str(task)) for task in tasks]:
        await asyncio.to_thread(worker.wait_ready)
    workers = [Supervised(worker) for worker in scene.workers]
    sendings = workload.sendings(options.requests)
    chaos = Chaos(
        scene.stack.nats,
        scene.stack.store,
        workers,
        seed=options.seed,
        seconds=options.seconds,
    )
    async with AsyncExitStack() as parts:
        client = scene.sender
        attacker: Attacker | None = None
        if isinstance(scene, HostileScene):
            client = await scene.connect("publisher")
            parts.push_async_callback(client.close)
            attacker = scene.attacker(options.seed, planned(sendings))
            parts.push_async_callback(attacker.close)
        sender = Sender(client, scene.subjects, scene.task, send_timeout=options.progress_timeout)
        await sender.listen()
        async with _supervision(workers):
            activities = [sender.send_all(sendings)]
            if options.chaos:
                activities.append(chaos.run())
            if attacker is not None:
                activities.append(attack(attacker, options.seconds, options.attacks))
            await asyncio.gather(*activities)
            unfinished = await _drained(scene, options.progress_timeout)
        exit_codes = await _stop(workers, scene.folder)
    return Soaked(
        scene=scene,
        sendings=sendings,
        records=await _read(scene, sender, exit_codes, hostile=options.hostile),
        faults=chaos.faults,
        confirmed_at=sender.confirmed_at,
        retries=sender.retries,
        unfinished=unfinished,
        attacker=attacker,
    )


async def _read(
    scene: SoakScene, sender: Sender, exit_codes: list[int], *, hostile: bool
) -> Records:
    def is_honest(request_id: str) -> bool:
        return not (hostile and is_attackers(request_id, scene.subjects))

    try:
        records = await read(
            scene, exit_codes=exit_codes, replies=sender.replies, is_honest=is_honest
        )
    except NotFoundError:
        return Records(exit_codes=exit_codes, forbidden_lines=["a stream or a durable is missing"])
    return replace(records, cancellations=sender.cancellations, unsent=sender.unsent)


@asynccontextmanager
async def _supervision(workers: list[Supervised]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(worker.run()) for worker in workers]
        yield
        for task in running:
            task.cancel()


async def _drained(scene: Scene, progress_timeout: float) -> str:
    try:
        pending = await scene.pending()
        while pending:

            async def decreased(previous: int = pending) -> bool:
                return await scene.pending() < previous

            try:
                await scene.until(decreased, "progress", progress_timeout)
            except AssertionError:
                return (
                    f"stuck with {pending} requests in the queue\n{await scene.describe_pending()}"
                )
            pending = await scene.pending()
    except NotFoundError:
        return "a stream of requests is missing"
    return ""


async def _stop(workers: list[Supervised], folder: Path) -> list[int]:
    """Stop all workers with SIGTERM; return all exit codes."""
    for worker in workers:
        await asyncio.to_thread(worker.daemon.stop)
    # The children of a killed worker must exit by themselves.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CHILDREN_TIMEOUT):
            while processes_of(folder):  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(POLL)
    codes = [code for worker in workers for code in worker.exit_codes]
    return codes + [code for worker in workers if (code := worker.daemon.returncode) is not None]


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return sorted(value) if isinstance(value, frozenset) else str(value)
