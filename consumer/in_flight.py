"""The requests that one worker has in flight: how many, and which of them are kept apart.

One request can be on the device while the ones before it are on their way to the store and the next
ones are being read.
"""

import asyncio

from consumer.inference.run_queue import RunQueue, Ticket

STAGES = 3  # being read, on the device, being stored: what one worker does at the same time


class Slot:
    """One request in flight; `InFlight.join` makes it.

    Attributes:
        redelivered: Whether its last worker may have died of it.
        co_resident: Whether others were in flight when it came, so that its delivery does not count
            as an attempt yet.
        ticket: Its place in the run queue; None: it needs the device no more, or not now.
    """

    def __init__(self, in_flight: "InFlight", *, redelivered: bool, co_resident: bool) -> None:
        self._in_flight = in_flight
        self.redelivered = redelivered
        self.co_resident = co_resident
        self.ticket: Ticket | None = None

    def require_ticket(self) -> Ticket:
        """Return the ticket.

        Raises:
            AssertionError: The request has left the run queue.
        """
        if self.ticket is None:
            raise AssertionError("the request has left the run queue")
        return self.ticket

    def occupy_device(self) -> None:
        """Note that its run has begun."""
        self._in_flight.occupy_device(self)

    def release_device(self) -> None:
        """Note that it needs the device no more; a second call is harmless."""
        self._in_flight.release_device(self)

    def step_aside(self) -> None:
        """Leave the run queue, but stay in flight: others need not wait for this one."""
        self._in_flight.step_aside(self)

    def rejoin(self) -> None:
        """Go back to the end of the run queue after `step_aside`."""
        self._in_flight.rejoin(self)

    def clear(self) -> None:
        """Note that its last worker did not die of it: it need not be kept apart."""
        self._in_flight.clear(self)

    def leave(self) -> None:
        """Make room for another request: this one is about to be settled."""
        self._in_flight.leave(self)


class InFlight:
    """Counts the requests in flight, and keeps redelivered ones apart. For the event loop only.

    Args:
        queue: Where requests wait for the device, in the order of their deliveries.
        most: Requests in flight at most, from the delivery to the settlement.
    """

    def __init__(self, queue: RunQueue, *, most: int = 1) -> None:
        self._queue = queue
        self._most = most
        self._slots: set[Slot] = set()
        self._aside: set[Slot] = set()  # of these, those that left the run queue for a while
        self._waiting: dict[Slot, None] = {}  # for the device, in the order of their deliveries
        self._on_device: set[Slot] = set()
        self._changed = asyncio.Event()

    def join(self, *, redelivered: bool = False) -> Slot:
        """Add a request, and put a ticket for it into the run queue.

        Args:
            redelivered: Its last worker may have died of it. There is no room for others until it
                has left, and it should wait for `isolate`: should this worker die as well, the
                cause is known.
        """
        slot = Slot(self, redelivered=redelivered, co_resident=bool(self._slots - self._aside))
        self._slots.add(slot)
        self._enqueue(slot)
        return slot

    async def room(self) -> None:
        """Wait until there is room for one more request.

        No more than the requests of one run wait for the device: another worker may be idle.
        """
        while not self._has_room():
            await self._change()

    async def isolate(self, slot: Slot) -> None:
        """Wait until all others have left that wait for the device or use it."""
        while self._slots - self._aside != {slot}:
            await self._change()

    def waits_behind_another(self, slot: Slot) -> bool:
        """Return whether a request waits for the device, and could not begin if it were ready."""
        if slot not in self._waiting:
            return False
        is_kept_back = slot.redelivered and self._slots - self._aside != {slot}
        is_taken = self._queue.closed or bool(self._on_device)
        return is_taken or is_kept_back or slot is not next(iter(self._waiting))

    def occupy_device(self, slot: Slot) -> None:
        """See `Slot.occupy_device`."""
        self._waiting.pop(slot, None)
        self._on_device.add(slot)
        self._changed.set()

    def release_device(self, slot: Slot) -> None:
        """See `Slot.release_device`."""
        ticket, slot.ticket = slot.ticket, None
        if ticket is not None:
            self._queue.remove(ticket)
            ticket.abandon()
        self._waiting.pop(slot, None)
        self._on_device.discard(slot)
        self._changed.set()

    def step_aside(self, slot: Slot) -> None:
        """See `Slot.step_aside`."""
        if slot not in self._aside:
            self._aside.add(slot)
            self.release_device(slot)

    def rejoin(self, slot: Slot) -> None:
        """See `Slot.rejoin`."""
        if slot in self._aside:
            self._aside.remove(slot)
            self._enqueue(slot)

    def clear(self, slot: Slot) -> None:
        """See `Slot.clear`."""
        slot.redelivered = slot.co_resident = False
        self._changed.set()

    def leave(self, slot: Slot) -> None:
        """See `Slot.leave`."""
        self.release_device(slot)
        self._slots.discard(slot)
        self._aside.discard(slot)
        self._changed.set()

    def _enqueue(self, slot: Slot) -> None:
        slot.ticket = self._queue.put()
        self._waiting[slot] = None

    def _has_room(self) -> bool:
        return (
            len(self._slots) < self._most
            and len(self._waiting) < self._queue.max_batch
            and not any(slot.redelivered for slot in self._slots)
        )

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def unqueued_slot() -> Slot:
    """Return a slot for a request that is only ended: it takes no room, and is not run."""
    return InFlight(RunQueue()).join()
