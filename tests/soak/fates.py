"""What happens to a request of a soak inside the model: drawn from its seed.

The workload and the model's side (`tests/faults/causes/soak.py`) both read it here.
"""

import random
from enum import StrEnum

RUNS = "soak-runs"  # `<request id> <time.time()>` of every run, without second tries for memory
SEEDS = 2**32
UNFATED = "unfated"  # in a prompt: to succeed, whatever its seed is


class Fate(StrEnum):
    """What the model does with a request; `_ONCE` is the first time that it comes so far."""

    PLAIN = "plain"
    SLOW = "slow"
    HOLDS_THE_GIL = "holds the GIL"
    RAISES_ONCE = "raises once"
    RAISES = "raises"
    OUT_OF_MEMORY_ONCE = "out of memory once"
    OUT_OF_MEMORY = "out of memory"
    DEVICE_LOST_ONCE = "device lost once"
    KILLED_ONCE = "killed once"
    KILLED = "killed"
    HANGS_ONCE = "hangs once"


def fate(seed: int) -> Fate:
    """The fate of a request that has this seed."""
    return random.Random(seed).choice(list(Fate))


def seed_with(wanted: Fate, draw: random.Random) -> int:
    """A seed for a fate."""
    while fate(seed := draw.randrange(SEEDS)) is not wanted:
        pass
    return seed
