"""Estimated starts, from recent results and the progress of the current run."""

from datetime import UTC, datetime
from typing import Any

import pytest

from consumer.gateway.pace import Pace
from generation_contracts import CancelledEvent, ProgressEvent, SucceededEvent, Task
from generation_contracts.examples import EVENTS

TASK = Task.TEXT_TO_IMAGE
COMMON: dict[str, Any] = {
    "request_id": "a",
    "task": TASK,
    "sequence": 1,
    "time": datetime.now(UTC),
    "worker": "w",
    "attempt": 1,
}


def succeeded(inference: float) -> SucceededEvent:
    event = next(e for e in EVENTS.values() if isinstance(e, SucceededEvent) and e.task is TASK)
    timings = event.timings.model_copy(
        update={"inference": inference, "encode": 0.0, "upload": 0.0}
    )
    return event.model_copy(update={"timings": timings})


def progress(eta: float) -> ProgressEvent:
    return ProgressEvent(**COMMON, step=1, of=9, eta=eta)


def test_there_is_no_estimate_before_the_first_result() -> None:
    pace = Pace()
    pace.add(progress(30.0))
    assert pace.until_start(TASK, 0) is None


def test_each_request_ahead_adds_the_mean_duration() -> None:
    pace = Pace()
    pace.add(succeeded(2.0))
    assert pace.until_start(TASK, 0) == pytest.approx(2.0, abs=0.1)
    assert pace.until_start(TASK, 3) == pytest.approx(8.0, abs=0.1)


def test_the_remaining_time_of_a_run_delays_waiting_requests() -> None:
    pace = Pace()
    pace.add(succeeded(2.0))
    pace.add(progress(60.0))
    assert pace.until_start(TASK, 1) == pytest.approx(62.0, abs=0.5)
    assert pace.until_start(Task.IMAGE_TO_TEXT, 1) is None
    digest = "sha256:" + "0" * 64
    pace.add(CancelledEvent(**COMMON, request_digest=digest))
    assert pace.until_start(TASK, 1) == pytest.approx(4.0, abs=0.1)
