"""Turns at the device: one run at a time, in the order in which the requests were delivered.

A worker may have several requests in hand: one on the device, the ones before it on their way to
the store, the next ones being read while they wait. Waiting requests that go together have their
turn together, in one run of the model.

Whoever is next is told to the inference thread while the run before goes on, and the thread begins
with it by itself: the device does not wait for the event loop, which is busy with what has just
been made. The event loop learns of it afterwards.
"""

import asyncio
import contextvars
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from consumer.ports.model import BatchMember

STAGES = 3  # being read, on the device, on the way out: what one worker can do at the same time


@dataclass(frozen=True)
class Bounds:
    """How much one worker has in hand.

    Attributes:
        in_flight: Requests in all, from the delivery to the settlement.
        together: Requests in one run at most.
        window: Seconds that the device waits for more of them, once one is ready.
    """

    in_flight: int = 1
    together: int = 1
    window: float = 0.0


class Turn:
    """The device, in the hands of one request or of several at once.

    Attributes:
        members: What the runner needs of each, in the order of their delivery.
        places: Whose turn it is.
        alone: Held by the one whose turn it is where the members run one after another.
        run: The run that the turn began with, until all of them are done with it.
        hands_over: Whether the thread may go on to the next turn by itself when its run has ended.
        failed: Whether one of several has seen that their run failed.
    """

    def __init__(self, places: "tuple[Place, ...]") -> None:
        self.members = tuple(place.member for place in places if place.member is not None)
        self.alone = asyncio.Lock()
        self.run: asyncio.Future[Any] | None = None
        self.places = places
        self.hands_over = True
        self.failed = False
        self._parts = len(places)
        self._holding = set(places)
        self._under_way: set[asyncio.Future[Any]] = set()

    def occupied_by(self, run: asyncio.Future[Any]) -> None:
        """The device is not free before this run has ended, whoever still waits for it."""
        self._under_way.add(run)

    def ended(self, run: asyncio.Future[Any]) -> None:
        """A run has ended."""
        # What it raised has frames in its traceback that have this turn: a cycle otherwise.
        self._under_way.discard(run)

    def let_go(self, place: "Place") -> None:
        """One of the members needs the device no more."""
        self._holding.discard(place)

    def first_run(self) -> asyncio.Future[Any]:
        """The run that the turn began with."""
        if self.run is None:
            raise AssertionError("the turn has not begun with a run")
        return self.run

    def had_its_part(self) -> None:
        """One of the members is done with the run that the turn began with."""
        self._parts -= 1
        if not self._parts:
            self.run = None  # for the reason given in `ended`

    @property
    def over(self) -> bool:
        """Whether the device is free; while its thread hangs it never is."""
        return not self._holding and not self._under_way


class Operator(Protocol):
    """Begins the run of a turn."""

    def begin(self, turn: Turn) -> asyncio.Future[Any]:
        """Begin it: the device is free."""

    def begin_next(self, turn: Turn) -> asyncio.Future[Any]:
        """Have it begun as soon as the run that is under way has ended well."""

    def take_back(self) -> bool:
        """Do not begin what was to begin next; False: it has begun."""


class Place:
    """One request among those in hand; `Turns.join` makes it.

    Attributes:
        suspect: Whether its last worker may have died of it.
        in_company: Whether others were in hand when it came, and its delivery is no try yet.
        member: What the runner needs of it, from the time it is ready to the end of its turn.
        context: The context variables of whoever asked for its turn.
    """

    def __init__(self, turns: "Turns", *, suspect: bool, in_company: bool) -> None:
        self._turns = turns
        self.suspect = suspect
        self.in_company = in_company
        self.member: BatchMember | None = None
        self.context = contextvars.Context()
        self.key: Hashable | None = None
        self.ready_since: float | None = None
        self.granted: asyncio.Future[Turn] | None = None
        self.turn: Turn | None = None

    def its_turn(self, member: BatchMember, key: Hashable | None) -> asyncio.Future[Turn]:
        """Ask for the device; the future's result is there once the run has begun.

        Args:
            member: What the runner needs.
            key: Equal for requests that go together; None: this one has its turn alone.
        """
        self.member, self.key = member, key
        self.context = contextvars.copy_context()
        self.ready_since = time.monotonic()
        self.granted = granted = asyncio.get_running_loop().create_future()
        self._turns.advance()
        return granted

    def give_up(self) -> Turn | None:
        """Wait for the turn no more, unless its run has begun in this moment: then the turn."""
        return self._turns.take_back(self)

    def off_the_device(self) -> None:
        """It waits for the device no more, or has no more use for it; once more is no fault."""
        self._turns.release(self)

    def step_aside(self) -> None:
        """Stay in flight without waiting for the device: others need not wait for this one."""
        self._turns.step_aside(self)

    def rejoin(self) -> None:
        """Wait for the device again, behind all others, after `step_aside`."""
        self._turns.rejoin(self)

    def clear(self) -> None:
        """Its last worker did not die of it: others may be in flight and in its batch."""
        self._turns.clear(self)

    def leave(self) -> None:
        """It is about to be settled: there is room for another one."""
        self._turns.remove(self)


class Turns:
    """Who has the device, who is next, and whether there is room for one more request.

    Only for the event loop's thread.
    """

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self._operator: Operator | None = None
        self._in_hand: set[Place] = set()
        self._aside: set[Place] = set()  # of these, those that do not wait for the device
        self._waiting: list[Place] = []  # in the order of their delivery
        self._turn: Turn | None = None
        self._ahead: _Ahead | None = None
        self._closed = False
        self._closing: asyncio.TimerHandle | None = None  # ends the window
        self._changed = asyncio.Event()

    def attend(self, operator: Operator) -> None:
        """Have the runs begun by this one."""
        self._operator = operator

    def join(self, *, suspect: bool = False) -> Place:
        """A place behind all others.

        Args:
            suspect: Its last worker may have died of it. Until it is settled there is no room for
                others, and it goes on once it is `alone`: should this worker die as well, it is
                known of whom.
        """
        place = Place(self, suspect=suspect, in_company=bool(self._in_hand - self._aside))
        self._in_hand.add(place)
        self._waiting.append(place)
        return place

    async def room(self) -> None:
        """Wait until there is room for one more.

        No more than one run's requests wait for the device: another worker may have one that is
        idle.
        """
        while not self._has_room():
            self._changed.clear()
            await self._changed.wait()

    def _has_room(self) -> bool:
        return (
            len(self._in_hand) < self.bounds.in_flight
            and len(self._waiting) < self.bounds.together
            and not any(place.suspect for place in self._in_hand)
        )

    async def alone(self, place: Place) -> None:
        """Wait until all others have left that wait for the device or use it.

        A suspect admits no others meanwhile.
        """
        while self._in_hand - self._aside != {place}:
            self._changed.clear()
            await self._changed.wait()

    def waits_behind_another(self, place: Place) -> bool:
        """Whether a place is not the next one, or the device is not free."""
        if place not in self._waiting:
            return False
        lets_others_leave = place.suspect and self._in_hand - self._aside != {place}
        taken = self._closed or self._turn is not None
        return taken or lets_others_leave or place != self._waiting[0]

    def close(self) -> None:
        """Give the device to nobody any more: it is lost."""
        self._closed = True
        self._keep_ahead()

    def take_back(self, place: Place) -> Turn | None:
        """See `Place.give_up`."""
        if self._ahead is not None and place in self._ahead.turn.places:
            self._keep_ahead()
        return place.turn

    def hold(self, turn: Turn) -> None:
        """Keep the device in this turn: its run is made again, or its members' one by one.

        The thread would go on to the next turn by itself after the first of them.
        """
        turn.hands_over = False
        self._keep_ahead()

    def release(self, place: Place) -> None:
        """See `Place.off_the_device`."""
        if place in self._waiting:
            self._waiting.remove(place)
        if place.turn is not None:
            place.turn.let_go(place)
        # What it brought for the run, and a cycle of place and turn, are kept by nobody.
        place.turn = place.member = place.granted = None
        self.advance()

    def step_aside(self, place: Place) -> None:
        """See `Place.step_aside`."""
        if place not in self._aside:
            self._aside.add(place)
            self.release(place)

    def rejoin(self, place: Place) -> None:
        """See `Place.rejoin`."""
        if place in self._aside:
            self._aside.remove(place)
            self._waiting.append(place)
            self.advance()

    def clear(self, place: Place) -> None:
        """See `Place.clear`."""
        place.suspect = place.in_company = False
        self._changed.set()

    def remove(self, place: Place) -> None:
        """See `Place.leave`."""
        self.release(place)
        self._in_hand.discard(place)
        self._aside.discard(place)
        self._changed.set()

    def advance(self) -> None:
        """Give the device to whoever is next, where it is free and they are ready."""
        if self._turn is not None and self._turn.over:
            self._turn = None
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        self._keep_ahead(() if self._turn is None else self._together())
        together = self._together()
        if together:
            patience = self._patience(together)
            if patience > 0:
                loop = asyncio.get_running_loop()
                self._closing = loop.call_later(patience, self.advance)
            elif self._turn is None:
                self._begin(Turn(tuple(together)))
            elif self._ahead is None and self._turn.hands_over and self._operator is not None:
                turn = Turn(tuple(together))
                self._ahead = _Ahead(turn, self._operator.begin_next(turn))
        self._changed.set()

    def begun(self, turn: Turn, run: asyncio.Future[Any], *places: Place) -> None:
        """A run has begun in a turn.

        Once it has ended well, those for whom it was made need the device no more: the next one
        has its turn before they have looked at what they got.
        """

        def look(ended: asyncio.Future[Any]) -> None:
            turn.ended(ended)
            if not ended.cancelled() and ended.exception() is None:
                for place in places:
                    self.release(place)
            else:
                self.hold(turn)
            self.advance()

        turn.occupied_by(run)
        run.add_done_callback(look)

    def _begin(self, turn: Turn) -> None:
        run = None if self._operator is None else self._operator.begin(turn)
        self._grant(turn, run)

    def _keep_ahead(self, wanted: Sequence[Place] = ()) -> None:
        """Take back what the thread was told to begin next, unless it is for these.

        Where that comes too late, the thread has begun with it: the run before has ended well, and
        it is their turn.
        """
        ahead = self._ahead
        if ahead is None or ahead.turn.places == tuple(wanted):
            return
        self._ahead = None
        if self._operator is not None and not self._operator.take_back():
            self._grant(ahead.turn, ahead.run)

    def _together(self) -> list[Place]:
        """The next one, where it is ready, with those right behind it that go with it."""
        if self._closed or not self._waiting or self._waiting[0].ready_since is None:
            return []
        first, *others = self._waiting
        together = [first]
        for place in others:
            fits = place.ready_since is not None and place.key == first.key is not None
            if not fits or len(together) == self.bounds.together:
                break
            together.append(place)
        return together

    def _patience(self, together: list[Place]) -> float:
        """Seconds that it is worth to wait for one more."""
        behind = self._waiting[len(together) :]
        no_more = behind and behind[0].ready_since is not None  # it does not go with them
        first = together[0]
        full = len(together) == self.bounds.together
        if first.ready_since is None or first.key is None or full or no_more:
            return 0.0
        return first.ready_since + self.bounds.window - time.monotonic()

    def _grant(self, turn: Turn, run: asyncio.Future[Any] | None) -> None:
        self._turn, turn.run = turn, run
        for place in turn.places:
            if place not in self._waiting:  # gone while its run began
                turn.let_go(place)
                turn.had_its_part()
                continue
            self._waiting.remove(place)
            place.turn = turn
            if place.granted is not None and not place.granted.done():
                place.granted.set_result(turn)
        if run is not None:
            self.begun(turn, run, *turn.places)


@dataclass(frozen=True)
class _Ahead:
    """The turn that the inference thread has been told to begin next."""

    turn: Turn
    run: asyncio.Future[Any]
