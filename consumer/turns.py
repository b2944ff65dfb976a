"""Turns at the device: one run at a time, in the order in which the requests were delivered.

A worker may have several requests in hand: one on the device, the ones before it on their way to
the store, the next ones being read while they wait. Waiting requests that go together have their
turn together, in one run of the model.
"""

import asyncio
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from consumer.ports import BatchMember

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
    """

    def __init__(self, places: "tuple[Place, ...]") -> None:
        self.members = tuple(place.member for place in places if place.member is not None)
        self.alone = asyncio.Lock()
        self.run: asyncio.Future[Any] | None = None  # of all together, once one has begun it
        self.places = places
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

    def had_its_part(self) -> None:
        """One of the members is done with the run of all together."""
        self._parts -= 1
        if not self._parts:
            self.run = None  # for the reason given in `ended`

    @property
    def over(self) -> bool:
        """Whether the device is free; while its thread hangs it never is."""
        return not self._holding and not self._under_way


class Place:
    """One request among those in hand; `Turns.join` makes it.

    Attributes:
        suspect: Whether its last worker may have died of it.
        in_company: Whether others were in hand when it came.
        member: What the runner needs of it, from the time it is ready to the end of its turn.
    """

    def __init__(self, turns: "Turns", *, suspect: bool, in_company: bool) -> None:
        self._turns = turns
        self.suspect = suspect
        self.in_company = in_company
        self.member: BatchMember | None = None
        self.key: Hashable | None = None
        self.ready_since: float | None = None
        self.granted: asyncio.Future[Turn] | None = None
        self.turn: Turn | None = None

    def its_turn(self, member: BatchMember, key: Hashable | None) -> asyncio.Future[Turn]:
        """Ask for the device; the future's result is there as soon as it is free.

        Args:
            member: What the runner needs.
            key: Equal for requests that go together; None: this one has its turn alone.
        """
        self.member, self.key = member, key
        self.ready_since = time.monotonic()
        self.granted = granted = asyncio.get_running_loop().create_future()
        self._turns.advance()
        return granted

    def off_the_device(self) -> None:
        """It waits for the device no more, or has no more use for it; once more is no fault."""
        self._turns.release(self)

    def leave(self) -> None:
        """It is about to be settled: there is room for another one."""
        self._turns.remove(self)


class Turns:
    """Who has the device, who is next, and whether there is room for one more request.

    Only for the event loop's thread.
    """

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self._in_hand: set[Place] = set()
        self._waiting: list[Place] = []  # in the order of their delivery
        self._turn: Turn | None = None
        self._closed = False
        self._closing: asyncio.TimerHandle | None = None  # ends the window
        self._changed = asyncio.Event()

    def join(self, *, suspect: bool = False) -> Place:
        """A place behind all others.

        Args:
            suspect: Its last worker may have died of it. Until it is settled there is no room for
                others: should this worker die as well, it is known of whom.
        """
        place = Place(self, suspect=suspect, in_company=bool(self._in_hand))
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

    def waits_behind_another(self, place: Place) -> bool:
        """Whether a place is not the next one, or the device is not free."""
        if place not in self._waiting:
            return False
        return self._closed or self._turn is not None or place != self._waiting[0]

    def close(self) -> None:
        """Give the device to nobody any more: it is lost."""
        self._closed = True

    def release(self, place: Place) -> None:
        """See `Place.off_the_device`."""
        if place in self._waiting:
            self._waiting.remove(place)
        if place.turn is not None:
            place.turn.let_go(place)
        # What it brought for the run, and a cycle of place and turn, are kept by nobody.
        place.turn = place.member = place.granted = None
        self.advance()

    def remove(self, place: Place) -> None:
        """See `Place.leave`."""
        self.release(place)
        self._in_hand.discard(place)
        self._changed.set()

    def advance(self) -> None:
        """Give the device to whoever is next, where it is free and they are ready."""
        if self._turn is not None and self._turn.over:
            self._turn = None
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        free = self._turn is None and not self._closed
        if free and self._waiting and self._waiting[0].ready_since is not None:
            together = self._together()
            patience = self._patience(together)
            if patience > 0:
                loop = asyncio.get_running_loop()
                self._closing = loop.call_later(patience, self.advance)
            else:
                self._grant(together)
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
            self.advance()

        turn.occupied_by(run)
        run.add_done_callback(look)

    def _together(self) -> list[Place]:
        """The next one, with those right behind it that go with it."""
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

    def _grant(self, together: list[Place]) -> None:
        del self._waiting[: len(together)]
        self._turn = turn = Turn(tuple(together))
        for place in together:
            place.turn = turn
            if place.granted is not None and not place.granted.done():
                place.granted.set_result(turn)
