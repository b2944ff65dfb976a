"""Who has the device, who waits, and whether there is room: without a model, a bus or a store."""

import asyncio
from typing import Any

import pytest

from consumer.ports.model import BatchMember
from consumer.turns import Bounds, Place, Turn, Turns
from generation_contracts import TextToImageRequest

LONG = 3_600.0  # seconds


def member() -> BatchMember:
    return BatchMember(TextToImageRequest(prompt="a"), (), lambda *_: None, lambda: False)


def waiting(place: Place, key: object = None) -> "asyncio.Future[Turn]":
    return place.its_turn(member(), key)


async def settle_down() -> None:
    """Let everything that can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_first_one_has_its_turn_at_once() -> None:
    turn = await Turns().join().its_turn(member(), None)
    assert len(turn.members) == 1


async def test_turns_are_in_the_order_of_delivery_not_of_getting_ready() -> None:
    turns = Turns(Bounds(in_flight=3))
    first, second, third = (turns.join() for _ in range(3))
    late, later = waiting(third), waiting(second)
    await settle_down()
    assert not late.done()
    assert not later.done()
    assert await first.its_turn(member(), None)
    first.off_the_device()
    await settle_down()
    assert later.done()
    assert not late.done()
    second.off_the_device()
    await settle_down()
    assert late.done()


async def test_device_is_not_free_while_a_run_goes_on_that_nobody_waits_for() -> None:
    turns = Turns(Bounds(in_flight=2))
    first, second = turns.join(), turns.join()
    turn = await first.its_turn(member(), None)
    run: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    turns.begun(turn, run)
    first.off_the_device()
    next_one = waiting(second)
    await settle_down()
    assert not next_one.done()
    run.set_result(None)
    await settle_down()
    assert next_one.done()


async def test_who_leaves_the_line_makes_way() -> None:
    turns = Turns(Bounds(in_flight=3))
    first, second, third = (turns.join() for _ in range(3))
    await first.its_turn(member(), None)
    given_up, last = waiting(second), waiting(third)
    await settle_down()
    given_up.cancel()
    await settle_down()
    first.off_the_device()
    second.leave()
    await settle_down()
    assert last.done()


async def test_room_is_for_so_many_in_flight() -> None:
    turns = Turns(Bounds(in_flight=2))
    first = turns.join()
    await first.its_turn(member(), None)
    first.off_the_device()  # on its way out
    second = turns.join()
    await second.its_turn(member(), None)
    room = asyncio.ensure_future(turns.room())
    await settle_down()
    assert not room.done()
    first.leave()
    await settle_down()
    assert room.done()


async def test_no_more_than_one_waits_for_the_device() -> None:
    turns = Turns(Bounds(in_flight=10))
    first = turns.join()
    await first.its_turn(member(), None)
    second = turns.join()
    room = asyncio.ensure_future(turns.room())
    await settle_down()
    assert not room.done()
    first.off_the_device()
    await second.its_turn(member(), None)
    await settle_down()
    assert room.done()


@pytest.mark.parametrize("in_flight", [1, 2, 3])
async def test_one_after_another_at_one_and_never_more_than_the_bound(in_flight: int) -> None:
    turns = Turns(Bounds(in_flight=in_flight))
    most = now = 0

    async def handle(place: Place) -> None:
        nonlocal now
        await place.its_turn(member(), None)
        await asyncio.sleep(0)
        place.off_the_device()
        await asyncio.sleep(0)
        now -= 1
        place.leave()

    handling = []
    for _ in range(20):
        await turns.room()
        now += 1
        most = max(most, now)
        handling.append(asyncio.ensure_future(handle(turns.join())))
    await asyncio.gather(*handling)
    assert most == in_flight


async def test_waits_behind_another() -> None:
    turns = Turns(Bounds(in_flight=3))
    first, second = turns.join(), turns.join()
    assert not turns.waits_behind_another(first)
    assert turns.waits_behind_another(second)
    await first.its_turn(member(), None)
    assert not turns.waits_behind_another(first)
    assert turns.waits_behind_another(second)
    first.off_the_device()
    assert not turns.waits_behind_another(second)


# -- several together -----------------------------------------------------------------------------


async def busy(turns: Turns) -> Place:
    """Occupy the device, so that others have to wait."""
    place = turns.join()
    await place.its_turn(member(), None)
    return place


async def test_those_that_go_together_have_their_turn_together() -> None:
    turns = Turns(Bounds(in_flight=10, together=3))
    first = await busy(turns)
    places = [turns.join() for _ in range(4)]
    granted = [waiting(place, "small") for place in places]
    await settle_down()
    first.off_the_device()
    await settle_down()
    assert [one.done() for one in granted] == [True, True, True, False]
    assert granted[0].result() is granted[2].result()
    assert granted[0].result().members == tuple(place.member for place in places[:3])


async def test_one_that_does_not_fit_ends_a_batch_and_is_not_overtaken() -> None:
    turns = Turns(Bounds(in_flight=10, together=4, window=LONG))
    first = await busy(turns)
    places = [turns.join() for _ in range(3)]
    granted = [waiting(place, key) for place, key in zip(places, "aba", strict=True)]
    await settle_down()
    first.off_the_device()
    await settle_down()
    assert [one.done() for one in granted] == [True, False, False]


async def test_without_a_key_each_runs_alone() -> None:
    turns = Turns(Bounds(in_flight=10, together=4))
    first = await busy(turns)
    granted = [waiting(turns.join()) for _ in range(2)]
    await settle_down()
    first.off_the_device()
    await settle_down()
    assert [one.done() for one in granted] == [True, False]


async def test_device_is_free_when_the_last_of_a_batch_lets_go() -> None:
    turns = Turns(Bounds(in_flight=10, together=2))
    first = await busy(turns)
    one, other, after = (turns.join() for _ in range(3))
    granted = [waiting(place, "a") for place in (one, other, after)]
    await settle_down()
    first.off_the_device()
    await settle_down()
    one.off_the_device()
    await settle_down()
    assert not granted[2].done()
    other.leave()
    await asyncio.wait_for(granted[2], LONG)


async def test_window_ends_the_wait_for_others() -> None:
    turns = Turns(Bounds(in_flight=10, together=4, window=0.05))
    loop = asyncio.get_running_loop()
    began = loop.time()
    turn = await turns.join().its_turn(member(), "a")
    assert loop.time() - began >= 0.04
    assert len(turn.members) == 1


async def test_window_is_not_waited_for_once_it_is_full() -> None:
    turns = Turns(Bounds(in_flight=10, together=2, window=LONG))
    granted = [waiting(turns.join(), "a") for _ in range(2)]
    async with asyncio.timeout(10):
        assert len((await granted[0]).members) == 2


async def test_window_of_one_that_runs_alone_is_not_waited_for() -> None:
    turns = Turns(Bounds(in_flight=10, together=2, window=LONG))
    async with asyncio.timeout(10):
        await turns.join().its_turn(member(), None)


async def test_time_behind_another_run_counts_as_the_window() -> None:
    turns = Turns(Bounds(in_flight=10, together=2, window=0.02))
    first = await busy(turns)
    granted = waiting(turns.join(), "a")
    await asyncio.sleep(0.05)
    first.off_the_device()
    await settle_down()
    assert granted.done()


async def test_lost_device_is_given_to_nobody() -> None:
    turns = Turns(Bounds(in_flight=3))
    first, second = turns.join(), turns.join()
    await first.its_turn(member(), None)
    next_one = waiting(second)
    turns.close()
    first.off_the_device()
    await settle_down()
    assert not next_one.done()
    assert turns.waits_behind_another(second)


async def test_no_room_beside_one_that_may_have_killed_its_worker() -> None:
    turns = Turns(Bounds(in_flight=3))
    suspect = turns.join(suspect=True)
    await suspect.its_turn(member(), None)
    room = asyncio.ensure_future(turns.room())
    await settle_down()
    assert not room.done()
    suspect.leave()
    await settle_down()
    assert room.done()
    assert (suspect.in_company, turns.join().in_company) == (False, False)
    assert turns.join(suspect=True).in_company


async def test_one_that_may_have_killed_its_worker_waits_until_it_is_alone() -> None:
    turns = Turns(Bounds(in_flight=3))
    first, second, suspect = turns.join(), turns.join(), turns.join(suspect=True)
    alone = asyncio.ensure_future(turns.alone(suspect))
    room = asyncio.ensure_future(turns.room())
    second.leave()
    await settle_down()
    assert not alone.done()
    assert turns.waits_behind_another(suspect)
    first.leave()
    await settle_down()
    assert alone.done()
    assert not turns.waits_behind_another(suspect)
    assert not room.done()
    suspect.leave()
    await settle_down()
    assert room.done()


# -- who is next is told to the thread before the device is free ----------------------------------


class Thread:
    """Begins runs as the inference thread does: the next one by itself, before anybody looks."""

    def __init__(self, turns: Turns) -> None:
        self.began: list[Turn] = []  # by the word of the turns
        self.next: tuple[Turn, asyncio.Future[Any]] | None = None
        self.under_way: asyncio.Future[Any]
        turns.attend(self)

    def begin(self, turn: Turn) -> asyncio.Future[Any]:
        self.began.append(turn)
        self.under_way = asyncio.get_running_loop().create_future()
        return self.under_way

    def begin_next(self, turn: Turn) -> asyncio.Future[Any]:
        assert self.next is None, "there is one place"
        self.next = turn, asyncio.get_running_loop().create_future()
        return self.next[1]

    def take_back(self) -> bool:
        taken, self.next = self.next, None
        return taken is not None

    def ends(self) -> None:
        """The run under way ends well, and the thread goes on."""
        ended = self.under_way
        if self.next is not None:
            (_, self.under_way), self.next = self.next, None
        ended.set_result(None)

    def fails(self) -> None:
        self.under_way.set_exception(ValueError())

    @property
    def told(self) -> tuple[Place, ...]:
        """Who is to begin next."""
        return () if self.next is None else self.next[0].places


async def test_next_one_has_its_turn_by_the_thread_alone() -> None:
    turns = Turns(Bounds(in_flight=3))
    thread = Thread(turns)
    first, second, third = (turns.join() for _ in range(3))
    await first.its_turn(member(), None)
    granted = [waiting(place) for place in (second, third)]
    assert thread.told == (second,)
    thread.ends()
    await settle_down()
    assert [one.done() for one in granted] == [True, False]
    assert granted[0].result().first_run() is thread.under_way
    assert thread.told == (third,)
    thread.ends()
    await settle_down()
    assert granted[1].done()
    assert len(thread.began) == 1, "the two others were begun by the thread"


async def test_company_that_gets_ready_meanwhile_joins_who_is_next() -> None:
    turns = Turns(Bounds(in_flight=10, together=2))
    thread = Thread(turns)
    await turns.join().its_turn(member(), None)
    places = [turns.join() for _ in range(3)]
    granted = [waiting(places[0], "a")]
    assert thread.told == (places[0],)
    granted += [waiting(place, "a") for place in places[1:]]
    assert thread.told == tuple(places[:2])
    thread.ends()
    await settle_down()
    assert [one.done() for one in granted] == [True, True, False]


async def test_who_is_next_waits_out_its_window_first() -> None:
    turns = Turns(Bounds(in_flight=10, together=2, window=LONG))
    thread = Thread(turns)
    await turns.join().its_turn(member(), None)
    granted = waiting(turns.join(), "a")
    assert thread.told == ()
    thread.ends()
    await settle_down()
    assert not granted.done()


async def test_who_gives_up_in_time_is_not_begun() -> None:
    turns = Turns(Bounds(in_flight=3))
    thread = Thread(turns)
    await turns.join().its_turn(member(), None)
    second, third = turns.join(), turns.join()
    given_up, granted = waiting(second), waiting(third)
    assert second.give_up() is None
    given_up.cancel()
    second.off_the_device()
    assert thread.told == (third,)
    thread.ends()
    await settle_down()
    assert granted.done()


async def test_who_gives_up_too_late_has_its_turn() -> None:
    turns = Turns(Bounds(in_flight=3))
    thread = Thread(turns)
    await turns.join().its_turn(member(), None)
    second, third = turns.join(), turns.join()
    given_up, granted = waiting(second), waiting(third)
    thread.ends()  # and nobody has looked yet
    given_up.cancel()
    turn = second.give_up()
    assert turn is not None
    assert turn.places == (second,)
    await settle_down()
    assert not granted.done()
    second.off_the_device()
    await settle_down()
    assert not granted.done(), "its run goes on"
    thread.ends()
    await settle_down()
    assert granted.done()


async def test_who_leaves_without_a_word_while_its_run_begins_holds_nobody_up() -> None:
    turns = Turns(Bounds(in_flight=3))
    thread = Thread(turns)
    await turns.join().its_turn(member(), None)
    second, third = turns.join(), turns.join()
    waiting(second)
    granted = waiting(third)
    thread.ends()
    second.leave()
    await settle_down()
    assert not granted.done(), "its run goes on"
    thread.ends()
    await settle_down()
    assert granted.done()


async def test_nobody_is_next_while_a_turn_goes_on_that_began_badly() -> None:
    turns = Turns(Bounds(in_flight=3))
    thread = Thread(turns)
    first, second = turns.join(), turns.join()
    turn = await first.its_turn(member(), None)
    granted = waiting(second)
    assert thread.told == (second,)
    thread.fails()
    await settle_down()
    assert thread.told == ()
    again: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    turns.begun(turn, again, first)
    again.set_result(None)
    await settle_down()
    assert granted.done()
    assert thread.began[-1].places == (second,)


async def test_nobody_is_next_in_a_turn_that_is_held() -> None:
    turns = Turns(Bounds(in_flight=3))
    thread = Thread(turns)
    first, second = turns.join(), turns.join()
    turn = await first.its_turn(member(), None)
    waiting(second)
    turns.hold(turn)
    assert thread.told == ()
    turns.advance()
    assert thread.told == ()


async def test_lost_device_takes_back_who_was_next() -> None:
    turns = Turns(Bounds(in_flight=3))
    thread = Thread(turns)
    await turns.join().its_turn(member(), None)
    granted = waiting(turns.join())
    turns.close()
    assert thread.told == ()
    thread.ends()
    await settle_down()
    assert not granted.done()
