"""The set of cancelled ids is limited in time and size."""

from consumer.jobs.early_cancellations import EarlyCancellations


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_id_expires_after_the_time_since_its_last_addition() -> None:
    clock = Clock()
    early = EarlyCancellations(keep=600.0, clock=clock)
    early.add("a")
    early.add("b")
    clock.now = 599.0
    early.add("b")
    assert ("a" in early, "b" in early, "c" in early) == (True, True, False)
    clock.now = 600.0
    assert ("a" in early, "b" in early) == (False, True)
    clock.now = 1199.0
    assert "b" not in early


def test_oldest_id_is_dropped_at_the_limit() -> None:
    early = EarlyCancellations(max_ids=3)
    for one in ("a", "b", "a", "c", "d"):  # "a" is younger than "b"
        early.add(one)
    assert [one for one in "abcd" if one in early] == ["a", "c", "d"]


def test_expired_ids_are_removed() -> None:
    clock = Clock()
    early = EarlyCancellations(keep=1.0, clock=clock)
    for number in range(100):
        early.add(str(number))
        clock.now += 0.5
    assert len(early._added) <= 2
