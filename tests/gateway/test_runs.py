"""Running requests, tracked by their events."""

import pytest

from consumer.gateway import runs as runs_module
from consumer.gateway.runs import FRESH, Runs
from generation_contracts import Task

TASK = Task.TEXT_TO_IMAGE


def test_a_run_counts_from_its_first_event_to_its_end() -> None:
    runs = Runs()
    assert (runs.count(TASK), runs.has(TASK, "a")) == (0, False)
    for request_id in ("a", "b", "a"):
        runs.add(TASK, request_id)
    assert (runs.count(TASK), runs.has(TASK, "a")) == (2, True)
    assert (runs.count(Task.IMAGE_TO_TEXT), runs.has(Task.IMAGE_TO_TEXT, "a")) == (0, False)
    runs.remove(TASK, "a")
    assert (runs.count(TASK), runs.has(TASK, "a")) == (1, False)


def test_progress_after_the_result_does_not_count() -> None:
    runs = Runs()
    runs.remove(TASK, "a")
    runs.add(TASK, "a")
    assert (runs.count(TASK), runs.has(TASK, "a")) == (0, False)


def test_a_run_without_recent_events_is_running_but_not_counted() -> None:
    """The worker may have crashed. A position is an upper bound."""
    clock = [0.0]
    runs = Runs(lambda: clock[0])
    runs.add(TASK, "a")
    clock[0] = FRESH + 1
    runs.add(TASK, "b")
    assert (runs.count(TASK), runs.has(TASK, "a")) == (1, True)
    runs.add(TASK, "a")
    assert runs.count(TASK) == 2


def test_the_number_of_tracked_runs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "MOST", 2)
    runs = Runs()
    for request_id in "abc":
        runs.add(TASK, request_id)
    assert [runs.has(TASK, request_id) for request_id in "abc"] == [False, True, True]
