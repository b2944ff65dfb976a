"""The attacks of a soak and their report."""

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch

from generation_contracts import Task
from tests.hostile.attacker import Attacker, Id
from tests.hostile.attacks import ATTACKS, make
from tests.soak.workload import Sending

PAUSE = 0.5  # seconds between two attacks, at most


def planned(sendings: Iterable[Sending]) -> list[Id]:
    """Return the ids of the honest requests in the order of sending."""
    ids = [one.request_id for one in sendings]
    return [Id(Task.TEXT_TO_IMAGE, request_id) for request_id in dict.fromkeys(ids)]


async def attack(attacker: Attacker, seconds: float, patterns: Sequence[str] = ("*",)) -> None:
    """Run all attacks in turn until the time is over, each at least once."""
    names = [name for name in ATTACKS if any(fnmatch(name, pattern) for pattern in patterns)]
    attacker.draw.shuffle(names)
    pause = min(PAUSE, seconds / len(names))
    until = time.monotonic() + seconds
    missed = await _round(attacker, names, pause)
    # These attacks had no target, or the server was killed: repeat them once.
    await _round(attacker, missed, pause)
    while time.monotonic() < until:
        await _round(attacker, names, pause, until=until)


async def _round(
    attacker: Attacker, names: Sequence[str], pause: float, *, until: float = math.inf
) -> list[str]:
    """Run attacks one after another; return the ones without effect."""
    missed = []
    for name in names:
        if time.monotonic() < until:
            if not await make(name, attacker):
                missed.append(name)
            await asyncio.sleep(pause)
    return missed


def report(attacker: Attacker) -> list[str]:
    """Return one line for each attack."""
    lines = ["attack                                             made  sent  refused  answered"]
    for name, count in sorted(attacker.counts.items()):
        notes = {"without target": count.without_target, "connection lost": count.cut}
        remarks = ", ".join(f"{what} {often} x" for what, often in notes.items() if often)
        lines.append(
            f"{name:<50} {count.made:>4} {count.messages:>5} {count.refused:>8} "
            f"{count.answered:>9}  {remarks}".rstrip()
        )
    return lines
