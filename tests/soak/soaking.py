"""One soak: servers and workers of its own, a sender, the chaos, and what is left afterwards."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from consumer.devstack import DevStack
from consumer.turns import STAGES
from tests.faults.scene import POLL, Scene
from tests.soak.chaos import Blow, Chaos, Supervised
from tests.soak.figures import figures
from tests.soak.records import Records, processes_of, read
from tests.soak.sender import Sender
from tests.soak.verdict import problems
from tests.soak.workload import Sending, Workload

CAUSE = "soak"
MAX_ATTEMPTS = 5  # so many that the chaos hardly ever makes a request `worker_lost`
DRAIN_GRACE = 2.0  # seconds; shorter than a slow run
STALL_TIMEOUT = 6.0  # seconds; longer than the GIL is held
STUCK_AFTER = 60.0  # seconds without any progress when all is healed
ENDED_WITHIN = 10.0  # seconds for what a worker has started to end after it
COSTLY_FROM = 60.0  # seconds; a shorter soak has no time for what takes a worker for long


@dataclass(frozen=True)
class Options:
    """What a soak is made of.

    Attributes:
        requests: Distinct request ids, good and bad.
        workers: Daemon processes.
        seconds: Over which requests are sent and processes killed.
        seed: Decides both.
    """

    requests: int
    workers: int
    seconds: float
    seed: int


@dataclass(frozen=True)
class Soaked:
    """A soak that is over.

    Attributes:
        taken: When the stream confirmed each message, by message id; seconds since the epoch.
        tries_again: Publishes that had no answer.
        unfinished: Why it was not waited for any longer; empty where it has come to its end.
    """

    scene: Scene
    sendings: list[Sending]
    records: Records
    blows: list[Blow]
    taken: dict[str, float]
    tries_again: int
    unfinished: str

    def problems(self) -> list[str]:
        """Every promise that was not kept, one line each."""
        found = problems(self.sendings, self.records)
        return [self.unfinished, *found] if self.unfinished else found

    def figures(self) -> list[str]:
        """For people."""
        told = figures(self.sendings, self.records, self.blows, self.taken).lines()
        return [*told, f"published again   {self.tries_again}"]

    def keep(self) -> None:
        """Write what was sent, done and found beside the logs."""
        with (self.scene.folder / "soaked.json").open("w") as file:
            json.dump([self.sendings, self.blows, self.records], file, indent=1, default=_plain)


class SoakScene(Scene):
    """An installation for several workers.

    Args:
        options: Of the soak.
    """

    def __init__(
        self, stack: DevStack, folder: Path, parts: AsyncExitStack, options: Options
    ) -> None:
        super().__init__(stack, folder, parts)
        self._options = options

    def settings(self) -> dict[str, str]:
        """The environment of a worker."""
        return {
            **super().settings(),
            "CONSUMER_MAX_ACK_PENDING": str(STAGES * self._options.workers),
            "CONSUMER_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "CONSUMER_DRAIN_GRACE": str(DRAIN_GRACE),
            "CONSUMER_STALL_TIMEOUT": str(STALL_TIMEOUT),
        }


@asynccontextmanager
async def soak(options: Options, folder: Path) -> AsyncIterator[Soaked]:
    """Run a soak; its servers are there as long as the block lasts.

    Args:
        options: What it is made of.
        folder: Where its data and logs go.
    """
    with DevStack(folder / "servers", persist=False) as stack:
        async with AsyncExitStack() as parts:
            scene = SoakScene(stack, folder, parts, options)
            await scene.open()
            yield await _run(options, scene)


async def _run(options: Options, scene: Scene) -> Soaked:
    workload = Workload(
        scene.subjects,
        options.seed,
        seconds=options.seconds,
        costly=options.seconds >= COSTLY_FROM,
    )
    for worker in [scene.launch(CAUSE) for _ in range(options.workers)]:
        await asyncio.to_thread(worker.wait_ready)
    workers = [Supervised(worker) for worker in scene.workers]
    sender = Sender(scene.sender, scene.subjects, scene.task)
    await sender.listen()
    sendings = workload.sendings(options.requests)
    chaos = Chaos(
        scene.stack.nats,
        scene.stack.store,
        workers,
        seed=options.seed,
        seconds=options.seconds,
    )
    async with _supervision(workers):
        await asyncio.gather(sender.send_all(sendings), chaos.run())
        unfinished = await _drained(scene)
    ends = await _stop(workers, scene.folder)
    return Soaked(
        scene=scene,
        sendings=sendings,
        records=await read(scene, ends=ends, replies=sender.replies),
        blows=chaos.blows,
        taken=sender.taken,
        tries_again=sender.tries_again,
        unfinished=unfinished,
    )


@asynccontextmanager
async def _supervision(workers: list[Supervised]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(worker.run()) for worker in workers]
        yield
        for task in running:
            task.cancel()


async def _drained(scene: Scene) -> str:
    left = await scene.left()
    while left:

        async def fewer(than: int = left) -> bool:
            return await scene.left() < than

        try:
            await scene.until(fewer, "progress", STUCK_AFTER)
        except AssertionError:
            return f"stuck with {left} requests in the queue"
        left = await scene.left()
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
