"""The progress of a run: one thread writes, another thread reads."""

import threading

from consumer.inference.progress import Progress, Update


def begun_progress() -> Progress:
    progress = Progress()
    progress.begin()
    return progress


def test_unchanged_progress_gives_no_update() -> None:
    progress = begun_progress()
    assert progress.take() == []
    progress.step(1, 9)
    assert [(update.step, update.of) for update in progress.take()] == [(1, 9)]
    assert progress.take() == []


def test_update_has_the_latest_step_and_preview_and_the_complete_text() -> None:
    progress = begun_progress()
    for step in (1, 2, 3):
        progress.step(step, 9)
        progress.text(f"{step} ")
        progress.preview(b"%d" % step)
    (update,) = progress.take()
    assert (update.step, update.text, update.preview) == (3, "1 2 3 ", b"3")


def test_total_grows_if_the_run_takes_more_steps() -> None:
    progress = begun_progress()
    progress.step(12, 10)
    assert progress.take()[0].of == 12


def test_mean_time_of_a_step_is_known_after_the_first() -> None:
    progress = begun_progress()
    progress.text("no step yet")
    assert progress.take()[0].seconds_per_step is None
    progress.step(4, 10)
    seconds = progress.take()[0].seconds_per_step
    assert progress.first_began is not None
    assert seconds == (progress.last_step - progress.first_began) / 4


def test_restarted_run_publishes_step_0_first() -> None:
    progress = begun_progress()
    progress.step(7, 9)
    progress.text("the first attempt")
    progress.take()
    progress.text("discarded text")
    progress.end()
    progress.begin()
    assert progress.take() == [Update(step=0, of=9)]
    progress.step(1, 9)
    assert [(update.step, update.text) for update in progress.take()] == [(1, "")]


def test_restarted_run_without_an_update_publishes_no_step_0() -> None:
    progress = begun_progress()
    progress.step(7, 9)
    progress.begin()
    progress.step(2, 9)
    assert [update.step for update in progress.take()] == [2]


def test_late_reader_gets_step_0_before_the_new_step() -> None:
    progress = begun_progress()
    progress.step(7, 9)
    progress.take()
    progress.begin()
    progress.step(2, 5)
    progress.text("new")
    restart, update = progress.take()
    assert (restart, update.step, update.of, update.text) == (Update(step=0, of=9), 2, 5, "new")


def test_seconds_include_all_runs_and_no_pauses() -> None:
    progress = begun_progress()
    progress.end()
    first = progress.seconds
    progress.begin()
    assert progress.running
    progress.end()
    assert not progress.running
    assert progress.first_began is not None
    assert first <= progress.seconds <= progress.ended - progress.first_began


def test_concurrent_text_is_neither_lost_nor_duplicated() -> None:
    progress = begun_progress()
    pieces = [f"{number} " for number in range(20_000)]
    writing = threading.Thread(target=lambda: [progress.text(piece) for piece in pieces])
    writing.start()
    texts = []
    while writing.is_alive():
        texts += [update.text for update in progress.take()]
    texts += [update.text for update in progress.take()]
    assert "".join(texts) == "".join(pieces)
