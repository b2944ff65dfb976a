"""What `consumer up` and `consumer demo` print, and when their work ends."""

import asyncio
import contextlib
import io
import json
import os
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from consumer.app import supervision, terminal_image, viewer
from consumer.app.job_lines import SHOWN, JobLines, job_line, running_line
from consumer.app.supervision import supervised
from consumer.devstack import ChildEndedError, DevStack
from generation_client import AnyEvent
from generation_contracts import (
    FailedEvent,
    ProgressEvent,
    StartedEvent,
    SucceededEvent,
    Task,
    decode_event,
)

GOLDEN = Path(__file__).parents[1] / "contracts" / "golden"


def golden(name: str) -> AnyEvent:
    """Return an event of the golden files."""
    body = json.loads((GOLDEN / f"{name}.json").read_text())["body"]
    return decode_event(json.dumps(body).encode())


def test_a_job_line_has_state_seconds_worker_and_id() -> None:
    started = golden("started")
    failed = golden("failed_model_error")
    assert isinstance(started, StartedEvent)
    assert isinstance(failed, FailedEvent)
    later = failed.model_copy(update={"time": started.time + timedelta(seconds=12.34)})
    words = job_line(later, started).split()
    assert words[1:] == [
        "failed",
        "12.3",
        "s",
        failed.task,
        failed.worker,
        failed.request_id,
        failed.failure.code,
    ]
    assert datetime.strptime(words[0], "%H:%M:%S").replace(tzinfo=UTC)


def test_the_line_of_a_job_that_never_started_has_no_seconds() -> None:
    failed = golden("failed_model_error")
    assert isinstance(failed, FailedEvent)
    assert job_line(failed, None).split()[1:3] == ["failed", failed.task]


def running_job() -> tuple[StartedEvent, ProgressEvent, SucceededEvent]:
    """Return the start, one step and the end of one job."""
    started, step, ended = golden("started"), golden("progress_image"), golden("succeeded_image")
    assert isinstance(started, StartedEvent)
    assert isinstance(step, ProgressEvent)
    assert isinstance(ended, SucceededEvent)
    same = {"request_id": started.request_id, "task": started.task}
    return started, step.model_copy(update=same), ended.model_copy(update=same)


def test_a_running_job_has_a_line_with_its_seconds_and_steps() -> None:
    started, step, _ = running_job()
    now = started.time + timedelta(seconds=12.34)
    start = running_line(started, None, now).split()
    assert start[1:] == ["running", "12.3", "s", started.task, started.worker, started.request_id]
    line = running_line(started, step, now)
    assert line.endswith(f"{started.request_id}  {step.step}/{step.of} steps")
    text = step.model_copy(update={"task": Task.IMAGE_TO_TEXT})
    assert running_line(started, text, now).endswith(f"  {step.step} tokens")


def test_a_terminal_shows_running_jobs_until_they_end() -> None:
    started, step, ended = running_job()
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=200, _environ={})
    with JobLines(console) as lines:
        lines.show(started)
        lines.show(step)
        lines.refresh()
        assert "running" in terminal.getvalue()
        lines.show(ended)
        lines.show(started)  # late
        terminal.truncate(0)
        lines.refresh()
        assert "running" not in terminal.getvalue()
    assert "succeeded" not in terminal.getvalue()


def test_many_running_jobs_do_not_fill_the_terminal() -> None:
    started, _, _ = running_job()
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=200, _environ={})
    with JobLines(console) as lines:
        for number in range(SHOWN + 3):
            lines.show(started.model_copy(update={"request_id": f"job-{number}"}))
        terminal.truncate(0)
        lines.refresh()
        assert terminal.getvalue().count("running  ") == SHOWN
        assert "and 3 more running jobs" in terminal.getvalue()


def test_without_a_terminal_each_job_is_one_line() -> None:
    started, step, ended = running_job()
    output = io.StringIO()
    with JobLines(Console(file=output, soft_wrap=True, width=200)) as lines:
        for event in (started, step, ended, started.model_copy(update={"request_id": "runs"})):
            lines.show(event)
    (line,) = output.getvalue().splitlines()
    assert line == job_line(ended, started)


class FakeStack:
    """A stack with one child, which ends when the test says so."""

    def __init__(self) -> None:
        self.children = [SimpleNamespace(alive=True)]

    def require_alive(self) -> None:
        if not self.children[0].alive:
            raise ChildEndedError("the child ended")


async def supervise(stack: FakeStack, work: Any) -> Any:
    return await supervised(cast("DevStack", stack), work)


async def test_supervised_work_returns_its_value() -> None:
    async def work() -> int:
        return 3

    assert await supervise(FakeStack(), work()) == 3


async def test_the_end_of_a_child_cancels_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "CHECK_INTERVAL", 0.0)
    stack = FakeStack()
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            stack.children[0].alive = False
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(ChildEndedError):
        await supervise(stack, work())
    assert cancelled.is_set()


@pytest.mark.parametrize(
    ("alive", "raised"), [(True, OSError), (False, ChildEndedError)], ids=["alive", "ended"]
)
async def test_an_error_of_the_work_is_replaced_if_a_child_has_ended(
    alive: bool, raised: type[Exception]
) -> None:
    stack = FakeStack()

    async def work() -> None:
        stack.children[0].alive = alive
        raise OSError("connection refused")

    with pytest.raises(raised):
        await supervise(stack, work())


@pytest.mark.parametrize("term", ["dumb", "xterm"], ids=["dumb terminal", "no terminal"])
def test_no_image_is_written_where_it_cannot_be_displayed(
    monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    written = io.StringIO()
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", written)
    assert not terminal_image.show_image(Path("image.png"))
    assert written.getvalue() == ""


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("exit 0", None),
        ("echo 'www-browser: not found' >&2; exit 3", "xdg-open ended with exit code 3"),
        ("exec sleep 60", None),
    ],
    ids=["opened", "no viewer", "viewer in the foreground"],
)
def test_a_file_is_opened_or_the_reason_is_returned(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    script: str,
    fault: str | None,
) -> None:
    program = tmp_path / "xdg-open"
    program.write_text(f'#!/bin/sh\necho "$$ $1" > {tmp_path}/called\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(viewer, "_PROGRAM", "xdg-open")
    monkeypatch.setattr(viewer, "START_WITHIN", 0.3 if "sleep" in script else 30.0)
    assert viewer.open_file(tmp_path / "image.png") == fault
    pid, file = (tmp_path / "called").read_text().split()
    assert file == str(tmp_path / "image.png")
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGKILL)
    assert capfd.readouterr() == ("", "")


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(viewer, "_PROGRAM", "no-such-program")
    fault = viewer.open_file(tmp_path / "image.png")
    assert fault == "no-such-program: No such file or directory"
