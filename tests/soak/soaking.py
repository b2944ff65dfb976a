"""One soak: servers and workers of its own, a sender, the chaos, and what is left afterwards."""

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
from tests.soak.chaos import Blow, Chaos, Supervised
from tests.soak.figures import Figures, figures
from tests.soak.hostile import attack, planned, report
from tests.soak.records import Records, processes_of, read
from tests.soak.scenes import CAUSE, HostileScene, Options, SoakScene
from tests.soak.sender import Sender
from tests.soak.verdict import problems
from tests.soak.workload import Sending, Workload
from tests.support.scene import POLL, Scene

STOPPED_FOR = 90.0  # seconds; the injected kills stop a queue for a few, on a busy machine for 35
ENDED_WITHIN = 10.0  # seconds for what a worker has started to end after it
COSTLY_FROM = 60.0  # seconds; a shorter soak has no time for what takes a worker for long


@dataclass(frozen=True)
class Soaked:
    """A soak that is over.

    Attributes:
        taken: When the stream confirmed each message, by message id; seconds since the epoch.
        tries_again: Publishes that had no answer.
        unfinished: Why it was not waited for any longer; empty where it has come to its end.
        attacker: The one among the senders, if there was one.
    """

    scene: Scene
    sendings: list[Sending]
    records: Records
    blows: list[Blow]
    taken: dict[str, float]
    tries_again: int
    unfinished: str
    attacker: Attacker | None = None

    def problems(self) -> list[str]:
        """Every promise that was not kept, one line each."""
        found = problems(self.sendings, self.records, hostile=self.attacker is not None)
        if self.attacker is not None and self._figures.stall > STOPPED_FOR:
            found.append(f"the queue stopped for {self._figures.stall:.0f} s")
        return [self.unfinished, *found] if self.unfinished else found

    def figures(self) -> list[str]:
        """For people."""
        attacks = [] if self.attacker is None else report(self.attacker)
        return [*self._figures.lines(), f"published again   {self.tries_again}", *attacks]

    @property
    def _figures(self) -> Figures:
        return figures(self.sendings, self.records, self.blows, self.taken)

    def keep(self) -> None:
        """Write what was sent, done and found beside the logs."""
        with (self.scene.folder / "soaked.json").open("w") as file:
            json.dump([self.sendings, self.blows, self.records], file, indent=1, default=_plain)


@asynccontextmanager
async def soak(options: Options, folder: Path) -> AsyncIterator[Soaked]:
    """Run a soak; its servers are there as long as the block lasts.

    Args:
        options: What it is made of.
        folder: Where its data and logs go.
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
        sender = Sender(client, scene.subjects, scene.task, patience=options.patience)
        await sender.listen()
        async with _supervision(workers):
            doing = [sender.send_all(sendings)]
            if options.chaos:
                doing.append(chaos.run())
            if attacker is not None:
                doing.append(attack(attacker, options.seconds, options.attacks))
            await asyncio.gather(*doing)
            unfinished = await _drained(scene, options.patience)
        ends = await _stop(workers, scene.folder)
    return Soaked(
        scene=scene,
        sendings=sendings,
        records=await _read(scene, sender, ends, hostile=options.hostile),
        blows=chaos.blows,
        taken=sender.taken,
        tries_again=sender.tries_again,
        unfinished=unfinished,
        attacker=attacker,
    )


async def _read(scene: SoakScene, sender: Sender, ends: list[int], *, hostile: bool) -> Records:
    def ours(request_id: str) -> bool:
        return not (hostile and is_attackers(request_id, scene.subjects))

    try:
        records = await read(scene, ends=ends, replies=sender.replies, ours=ours)
    except NotFoundError:
        return Records(ends=ends, cries=["a stream, or a durable, is gone"])
    return replace(records, cancellations=sender.cancellations, given_up=sender.given_up)


@asynccontextmanager
async def _supervision(workers: list[Supervised]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(worker.run()) for worker in workers]
        yield
        for task in running:
            task.cancel()


async def _drained(scene: Scene, patience: float) -> str:
    try:
        left = await scene.pending()
        while left:

            async def fewer(than: int = left) -> bool:
                return await scene.pending() < than

            try:
                await scene.until(fewer, "progress", patience)
            except AssertionError:
                return f"stuck with {left} requests in the queue\n{await scene.describe_pending()}"
            left = await scene.pending()
    except NotFoundError:
        return "a stream of requests is gone"
    return ""


async def _stop(workers: list[Supervised], folder: Path) -> list[int]:
    """Stop all workers as one does; every exit code that there has been."""
    for worker in workers:
        await asyncio.to_thread(worker.daemon.stop)
    # What a killed worker leaves behind has to end by itself.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ENDED_WITHIN):
            while processes_of(folder):  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(POLL)
    codes = [code for worker in workers for code in worker.ends]
    return codes + [code for worker in workers if (code := worker.daemon.returncode) is not None]


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return sorted(value) if isinstance(value, frozenset) else str(value)
