"""The progress of a run, written by one thread and read by another."""

import threading

from consumer.inference.progress import Progress, Update


def begun() -> Progress:
    progress = Progress()
    progress.begin()
    return progress


def test_nothing_new_is_no_update() -> None:
    progress = begun()
    assert progress.take() == []
    progress.step(1, 9)
    assert [(update.step, update.of) for update in progress.take()] == [(1, 9)]
    assert progress.take() == []


def test_latest_step_and_preview_win_and_no_text_is_lost() -> None:
    progress = begun()
    for step in (1, 2, 3):
        progress.step(step, 9)
        progress.text(f"{step} ")
        progress.preview(b"%d" % step)
    (update,) = progress.take()
    assert (update.step, update.text, update.preview) == (3, "1 2 3 ", b"3")


def test_run_that_makes_more_steps_than_it_said_has_them_all_done() -> None:
    progress = begun()
    progress.step(12, 10)
    assert progress.take()[0].of == 12


def test_mean_time_of_a_step_is_known_after_the_first() -> None:
    progress = begun()
    progress.text("no step yet")
    assert progress.take()[0].seconds_per_step is None
    progress.step(4, 10)
    seconds = progress.take()[0].seconds_per_step
    assert progress.first_began is not None
    assert seconds == (progress.last_step - progress.first_began) / 4


def test_run_that_begins_again_voids_what_was_taken_before() -> None:
    progress = begun()
    progress.step(7, 9)
    progress.text("the first attempt")
    progress.take()
    progress.text("of which nothing is left")
    progress.end()
    progress.begin()
    assert progress.take() == [Update(step=0, of=9)]
    progress.step(1, 9)
    assert [(update.step, update.text) for update in progress.take()] == [(1, "")]


def test_run_that_begins_again_before_anything_was_taken_voids_nothing() -> None:
    progress = begun()
    progress.step(7, 9)
    progress.begin()
    progress.step(2, 9)
    assert [update.step for update in progress.take()] == [2]


def test_reader_that_is_late_gets_the_void_before_the_new_step() -> None:
    progress = begun()
    progress.step(7, 9)
    progress.take()
    progress.begin()
    progress.step(2, 5)
    progress.text("new")
    void, update = progress.take()
    assert (void, update.step, update.of, update.text) == (Update(step=0, of=9), 2, 5, "new")


def test_seconds_are_those_of_all_runs_without_the_time_between_them() -> None:
    progress = begun()
    progress.end()
    first = progress.seconds
    progress.begin()
    assert progress.running
    progress.end()
    assert not progress.running
    assert progress.first_began is not None
    assert first <= progress.seconds <= progress.ended - progress.first_began


def test_nothing_that_a_thread_adds_is_lost_or_taken_twice() -> None:
    progress = begun()
    pieces = [f"{number} " for number in range(20_000)]
    writing = threading.Thread(target=lambda: [progress.text(piece) for piece in pieces])
    writing.start()
    taken = []
    while writing.is_alive():
        taken += [update.text for update in progress.take()]
    taken += [update.text for update in progress.take()]
    assert "".join(taken) == "".join(pieces)
