"""Texts from progress events that are lost, repeated or restarted."""

from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.gateway.errors import ApiError
from consumer.gateway.text_stream import TextStream
from generation_client import AnyEvent
from generation_contracts import ModelInfo, ProgressEvent, StartedEvent, Task

TEXT = "A red circle on a blue background."


def _common(sequence: int, attempt: int) -> dict[str, object]:
    return {
        "request_id": "r",
        "task": Task.IMAGE_TO_TEXT,
        "sequence": sequence,
        "time": datetime.now(UTC),
        "worker": "w",
        "attempt": attempt,
    }


def started(attempt: int = 1) -> StartedEvent:
    model = ModelInfo(id="m", family="f", dtype="float32", device="cpu")
    return StartedEvent.model_validate({**_common(0, attempt), "queued": 0.0, "model": model})


def progress(sequence: int, text: str | None, *, step: int = 1, attempt: int = 1) -> ProgressEvent:
    return ProgressEvent.model_validate(
        {**_common(sequence, attempt), "step": step, "of": 100, "text": text}
    )


def attempt_of(parts: list[str], attempt: int) -> list[AnyEvent]:
    return [
        started(attempt),
        *(
            progress(number, part, step=number, attempt=attempt)
            for number, part in enumerate(parts, start=1)
        ),
    ]


def test_parts_are_sent_without_delay() -> None:
    stream = TextStream()
    events = attempt_of(["A red", " circle"], 1)
    assert [stream.add(event) for event in events] == ["", "A red", " circle"]
    assert stream.end(TEXT) == " on a blue background."


def test_a_gap_delays_the_remaining_text_until_the_end() -> None:
    stream = TextStream()
    stream.add(started())
    assert stream.add(progress(1, "A")) == "A"
    assert stream.add(progress(3, " circle")) == ""
    assert stream.add(progress(4, " on")) == ""
    assert stream.end(TEXT) == TEXT[1:]


def test_a_stream_that_starts_in_the_middle_sends_the_text_at_the_end() -> None:
    stream = TextStream()
    assert stream.add(progress(5, " circle", step=5)) == ""
    assert stream.end(TEXT) == TEXT


def test_a_new_attempt_repeats_no_text() -> None:
    stream = TextStream()
    first = [stream.add(event) for event in attempt_of(["A red", " circle"], 1)]
    second = [stream.add(event) for event in attempt_of(["A", " red circle on", " a"], 2)]
    assert first == ["", "A red", " circle"]
    assert second == ["", "", " on", " a"]


def test_a_restarted_run_repeats_no_text() -> None:
    stream = TextStream()
    stream.add(started())
    assert stream.add(progress(1, "A red")) == "A red"
    assert stream.add(progress(3, None, step=0)) == ""
    assert stream.add(progress(4, "A red circle")) == " circle"


def test_a_changed_text_is_an_error() -> None:
    stream = TextStream()
    for event in attempt_of(["A red"], 1):
        stream.add(event)
    stream.add(started(2))
    with pytest.raises(ApiError) as raised:
        stream.add(progress(1, "A blue", attempt=2))
    assert raised.value.code == "text_changed"
    with pytest.raises(ApiError):
        stream.end("The shape is a circle.")


@given(
    cuts=st.lists(st.lists(st.integers(0, len(TEXT)), max_size=5), min_size=1, max_size=4),
    lost=st.sets(st.integers(0, 30)),
)
def test_lost_events_do_not_change_the_complete_text(cuts: list[list[int]], lost: set[int]) -> None:
    stream, sent, number = TextStream(), "", 0
    for attempt, positions in enumerate(cuts, start=1):
        ends = [0, *sorted(positions)]
        parts = [TEXT[begin:end] for begin, end in pairwise(ends)]
        for event in attempt_of(parts, attempt):
            number += 1
            if number not in lost:
                sent += stream.add(event)
            assert TEXT.startswith(sent)
    assert sent + stream.end(TEXT) == TEXT
