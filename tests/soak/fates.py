"""The behaviour of the model for a request of a soak, drawn from the seed of the request.

The workload and the model (`tests/faults/causes/soak.py`) both use this module.
"""

import random
from enum import StrEnum

RUNS = "soak-runs"  # `<request id> <time.time()>` of each run, without retries after out of memory
SEEDS = 2**32
UNFATED = "unfated"  # in a prompt: the run succeeds with every seed


class Fate(StrEnum):
    """What the model does with a request; `_ONCE` applies to the first run that gets there."""

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
    """Return the fate of a request with this seed."""
    return random.Random(seed).choice(list(Fate))


def seed_with(expected: Fate, draw: random.Random) -> int:
    """Draw a seed that leads to a fate."""
    while fate(seed := draw.randrange(SEEDS)) is not expected:
        pass
    return seed
