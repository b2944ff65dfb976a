"""The rate of progress events for several numbers of steps."""

import itertools
import json
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from nats.aio.msg import Msg

from tests.bench.speed.figures import MILLI
from tests.bench.speed.report import Section, table
from tests.bench.speed.rows import Row
from tests.bench.speed.sender import Sender
from tests.bench.speed.systems import wire_of_daemon
from tests.bench.speed.trial import new_trial


@dataclass(frozen=True)
class Rate:
    """The progress events of one request.

    Attributes:
        steps: Requested steps of the run in each second.
        events: Number of progress events.
        per_second: Events divided by the duration of the run.
        shortest: Shortest time between two events, in milliseconds.
        longest: Longest time between two events, in milliseconds.
    """

    steps: int
    events: int
    per_second: float
    shortest: float
    longest: float


async def measure(steps_per_second: Sequence[int], milliseconds: int) -> list[Rate]:
    """Measure runs of one duration with different numbers of steps."""
    row = Row("sleeps", milliseconds, 64, "png")
    with new_trial(row) as trial:
        async with AsyncExitStack() as parts:
            trial.start_daemon("daemon", 1).wait_ready()
            sender = Sender(wire_of_daemon(trial))
            await sender.open(trial.stack.nats.url, parts)
            times: list[float] = []

            async def on_event(message: Msg) -> None:
                if json.loads(message.data)["type"].endswith("progress"):
                    times.append(time.monotonic())

            await sender.client.subscribe(f"{trial.subjects.root}.progress.>", cb=on_event)
            rates = []
            for each_second in steps_per_second:
                steps = max(1, round(each_second * row.seconds))
                await sender.one(num_inference_steps=steps)
                await sender.client.flush()  # all events before the result have arrived
                run = trial.runs("daemon")[-1]
                rates.append(rate(times, each_second, run.ended - run.began))
                times.clear()
            return rates


def rate(times: Sequence[float], steps: int, seconds: float) -> Rate:
    """Compute the rate of one run."""
    gaps = [(late - early) * MILLI for early, late in itertools.pairwise(times)]
    return Rate(
        steps=steps,
        events=len(times),
        per_second=len(times) / seconds,
        shortest=min(gaps, default=0.0),
        longest=max(gaps, default=0.0),
    )


def section(milliseconds: int, found: Sequence[Rate]) -> Section:
    """Return the table by steps a second."""
    lines = [
        (str(rate.steps), rate.events, rate.per_second, rate.shortest, rate.longest)
        for rate in found
    ]
    columns = ("steps/s", "progress events", "events/s", "shortest gap, ms", "longest gap, ms")
    text = (
        f"Progress events of runs of {milliseconds / MILLI:g} s, by number of steps.\n\n"
        f"{table(columns, lines)}"
    )
    numbers = {str(rate.steps): {"per_second": rate.per_second} for rate in found}
    return Section("progress", text, numbers)
