"""Selection of the previews of a run for a stream."""

from datetime import UTC, datetime

import pytest

from consumer.gateway.openai_images import PreviewChoice
from generation_contracts import ProgressEvent, Task


def progress(step: int, *, of: int = 20, preview: str | None = "AAAA") -> ProgressEvent:
    return ProgressEvent(
        request_id="r",
        task=Task.TEXT_TO_IMAGE,
        sequence=step + 1,
        time=datetime.now(UTC),
        worker="w",
        attempt=1,
        step=step,
        of=of,
        preview=preview,
    )


@pytest.mark.parametrize(("most", "steps"), [(0, []), (1, [10]), (2, [7, 14]), (3, [5, 10, 15])])
def test_previews_are_distributed_over_the_run(most: int, steps: list[int]) -> None:
    choice = PreviewChoice(most)
    assert [step for step in range(21) if choice.select(progress(step))] == steps


def test_late_previews_replace_missing_ones() -> None:
    choice = PreviewChoice(3)
    selected = [choice.select(progress(step)) for step in (18, 19, 20)]
    assert selected == [True, True, True]
    assert choice.selected == 3


def test_a_step_without_a_preview_does_not_count() -> None:
    choice = PreviewChoice(1)
    assert not choice.select(progress(15, preview=None))
    assert choice.select(progress(16))
    assert not choice.select(progress(17))
