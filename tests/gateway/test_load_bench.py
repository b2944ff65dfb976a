"""The load bench `python -m tests.bench.gateway`, with few clients."""

import subprocess
import sys

import pytest

from tests.bench.gateway.crowd import Crowd, Size
from tests.bench.speed.sender import WentWrongError

SIZE = Size(waiting=50, leaving=5, watching=10, kept=5, unread=500)
MEMORY = {"alone": 70.0, "at most": 80.0}


def crowd(*, cancelled: int = 5, memory: dict[str, float] = MEMORY) -> Crowd:
    """Return the results of a crowd without losses."""
    succeeded = SIZE.jobs - cancelled
    results = {"succeeded": succeeded, "cancelled": cancelled}
    return Crowd(
        SIZE,
        answered=45,
        watched=10,
        found=5,
        slow=True,
        results=results,
        runs=succeeded,
        memory=memory,
    )


def test_a_crowd_without_losses_passes() -> None:
    crowd().check()


def test_a_missing_cancellation_fails_the_check() -> None:
    with pytest.raises(WentWrongError, match="cancelled 0, not 2"):
        crowd(cancelled=0).check()


def test_a_growing_gateway_fails_the_check() -> None:
    with pytest.raises(WentWrongError, match="RSS grew by 130 MB, not 37"):
        crowd(memory={"alone": 70.0, "at most": 200.0}).check()


def test_the_bench_runs_with_a_small_crowd() -> None:
    command = [sys.executable, "-m", "tests.bench.gateway", "--parts", "rates,crowd"]
    done = subprocess.run(
        [*command, "--small", "--requests", "100"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "`POST /v1/jobs`" in done.stdout
    assert "clients of the killed gateway: found their job by its key" in done.stdout
