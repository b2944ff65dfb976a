"""The requests that one worker has in flight: how many, and which of them are kept apart.

One request can be on the device while the ones before it are on their way to the store and the next
ones are being read. Only the event loop uses this module.
"""

import asyncio

from consumer.inference.run_queue import RunQueue, Ticket

STAGES = 3  # being read, on the device, being stored: what one worker does at the same time


class InFlight:
    """Counts the requests in flight, and keeps redelivered ones apart.

    Args:
        queue: Where requests wait for the device, in the order of their deliveries.
        most: Requests in flight at most, from the delivery to the settlement.

    Attributes:
        slots: Of all requests in flight.
        aside: Of these, the slots of requests that left the run queue for a while.
        waiting: Slots of those that wait for the device, in the order of their deliveries.
        on_device: Slots of those whose run goes on.
    """

    def __init__(self, queue: RunQueue, *, most: int = 1) -> None:
        self.queue = queue
        self.slots: set[Slot] = set()
        self.aside: set[Slot] = set()
        self.waiting: dict[Slot, None] = {}
        self.on_device: set[Slot] = set()
        self.changed = asyncio.Event()
        self._most = most

    def join(self, *, redelivered: bool = False) -> "Slot":
        """Add a request, and put a ticket for it into the run queue.

        Args:
            redelivered: Its last worker may have died of it. There is no room for others until it
                has left, and it should wait for `isolate`: should this worker die as well, the
                cause is known.
        """
        slot = Slot(self, redelivered=redelivered, co_resident=bool(self.slots - self.aside))
        self.slots.add(slot)
        slot.enqueue()
        return slot

    async def room(self) -> None:
        """Wait until there is room for one more request.

        No more than the requests of one run wait for the device: another worker may be idle.
        """
        while (
            len(self.slots) >= self._most
            or len(self.waiting) >= self.queue.max_batch
            or any(slot.redelivered for slot in self.slots)
        ):
            await self._change()

    async def isolate(self, slot: "Slot") -> None:
        """Wait until all others have left that wait for the device or use it."""
        while not self._is_alone(slot):
            await self._change()

    def waits_behind_another(self, slot: "Slot") -> bool:
        """Return whether a request waits for the device, and could not begin if it were ready."""
        if slot not in self.waiting:
            return False
        is_kept_back = slot.redelivered and not self._is_alone(slot)
        is_taken = self.queue.closed or bool(self.on_device)
        return is_taken or is_kept_back or slot is not next(iter(self.waiting))

    def _is_alone(self, slot: "Slot") -> bool:
        return self.slots - self.aside == {slot}

    async def _change(self) -> None:
        self.changed.clear()
        await self.changed.wait()


class Slot:
    """One request in flight; `InFlight.join` makes it.

    Attributes:
        redelivered: Whether its last worker may have died of it.
        co_resident: Whether others were in flight when it came, so that its delivery does not count
            as an attempt yet.
    """

    def __init__(self, in_flight: InFlight, *, redelivered: bool, co_resident: bool) -> None:
        self._in_flight = in_flight
        self.redelivered = redelivered
        self.co_resident = co_resident
        self._ticket: Ticket | None = None  # None: it needs the device no more, or not now

    @property
    def ticket(self) -> Ticket:
        """Its place in the run queue.

        Raises:
            AssertionError: It has none.
        """
        if self._ticket is None:
            raise AssertionError("the request has left the run queue")
        return self._ticket

    def enqueue(self) -> None:
        """Go to the end of the run queue."""
        self._ticket = self._in_flight.queue.put()
        self._in_flight.waiting[self] = None

    def occupy_device(self) -> None:
        """Note that its run has begun."""
        self._in_flight.waiting.pop(self, None)
        self._in_flight.on_device.add(self)
        self._in_flight.changed.set()

    def release_device(self) -> None:
        """Leave the run queue or the device; a second call is harmless."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._in_flight.queue.remove(ticket)
            ticket.abandon()
        self._in_flight.waiting.pop(self, None)
        self._in_flight.on_device.discard(self)
        self._in_flight.changed.set()

    def step_aside(self) -> None:
        """Leave the run queue, but stay in flight: others need not wait for this request."""
        self._in_flight.aside.add(self)
        self.release_device()

    def rejoin(self) -> None:
        """Go back to the end of the run queue after `step_aside`."""
        if self in self._in_flight.aside:
            self._in_flight.aside.remove(self)
            self.enqueue()

    def clear(self) -> None:
        """Note that its last worker did not die of it: it need not be kept apart."""
        self.redelivered = self.co_resident = False
        self._in_flight.changed.set()

    def leave(self) -> None:
        """Make room for another request: this one is about to be settled."""
        self.release_device()
        self._in_flight.slots.discard(self)
        self._in_flight.aside.discard(self)


def unqueued_slot() -> Slot:
    """Return a slot for a request that is only ended: it takes no room, and is not run."""
    return InFlight(RunQueue()).join()
