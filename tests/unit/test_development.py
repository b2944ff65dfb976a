"""What `consumer up` and `consumer demo` print, and when their work ends."""

import asyncio
import io
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumer.app import supervision, terminal_image
from consumer.app.development import job_line
from consumer.app.supervision import supervised
from consumer.devstack import ChildEndedError, DevStack
from generation_client import AnyEvent
from generation_contracts import FailedEvent, StartedEvent, decode_event

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
