"""The bench with a crowd of clients, `python -m tests.bench.gateway`, with fewer of them."""

import subprocess
import sys

import pytest

from tests.bench.gateway.crowd import Crowd, Size
from tests.bench.speed.sender import WentWrongError

SIZE = Size(waiting=50, leaving=5, watching=10, kept=5, unread=500)
MEMORY = {"alone": 70.0, "at most": 80.0}


def crowd(*, cancelled: int = 5, memory: dict[str, float] = MEMORY) -> Crowd:
    """A crowd of which nothing was lost."""
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


def test_a_crowd_of_which_nothing_was_lost() -> None:
    crowd().check()


def test_a_client_that_leaves_must_cancel_its_job() -> None:
    with pytest.raises(WentWrongError, match="cancelled 0, not 2"):
        crowd(cancelled=0).check()


def test_a_gateway_must_not_keep_what_nobody_reads() -> None:
    with pytest.raises(WentWrongError, match="RSS grew by 130 MB, not 37"):
        crowd(memory={"alone": 70.0, "at most": 200.0}).check()


def test_a_small_crowd() -> None:
    command = [sys.executable, "-m", "tests.bench.gateway", "--parts", "rates,crowd"]
    done = subprocess.run(
        [*command, "--small", "--requests", "100"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "`POST /v1/jobs`" in done.stdout
    assert "clients of the killed gateway: found their job by its key" in done.stdout
