"""The requests that one worker has in flight: their number, and the isolation of some of them.

While one request runs on the device, the worker stores the outputs of earlier requests and reads
the inputs of later ones. Only the event loop uses this module.
"""

import asyncio

from consumer.inference.run_queue import RunQueue, Ticket

STAGES = 3  # read inputs, run, store outputs: a worker does all three at the same time


class InFlight:
    """Limits the requests in flight, and isolates redelivered requests.

    Args:
        queue: The queue of the inference thread.
        most: Maximum number of requests in flight, from the delivery to the settlement.

    Attributes:
        queue: The queue of the inference thread.
        slots: Slots of all requests in flight.
        aside: Slots of requests that have left the run queue for a while.
        waiting: Slots of requests that wait for the device, in the order of their deliveries.
        on_device: Slots of requests whose run is in progress.
        changed: Set at each change of the other attributes.
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
            redelivered: The request may have killed its last worker. Until it has left there is
                no room for further requests. The caller runs it after `isolate`: if this worker
                dies too, the request is the cause.
        """
        slot = Slot(self, redelivered=redelivered, co_resident=bool(self.slots - self.aside))
        self.slots.add(slot)
        slot.enqueue()
        return slot

    async def room(self) -> None:
        """Wait until there is room for one more request.

        At most the requests of one batch wait for the device, because another worker may be idle.
        """
        while (
            len(self.slots) >= self._most
            or len(self.waiting) >= self.queue.max_batch
            or any(slot.redelivered for slot in self.slots)
        ):
            await self._change()

    async def isolate(self, slot: "Slot") -> None:
        """Wait until no other request waits for the device or uses it."""
        while not self._is_alone(slot):
            await self._change()

    def waits_behind_another(self, slot: "Slot") -> bool:
        """Return whether a request waits, and could not start now even if it were ready."""
        if slot not in self.waiting:
            return False
        is_blocked = slot.redelivered and not self._is_alone(slot)
        is_device_busy = self.queue.closed or bool(self.on_device)
        return is_device_busy or is_blocked or slot is not next(iter(self.waiting))

    def _is_alone(self, slot: "Slot") -> bool:
        return self.slots - self.aside == {slot}

    async def _change(self) -> None:
        self.changed.clear()
        await self.changed.wait()


class Slot:
    """One request in flight; `InFlight.join` makes it.

    Attributes:
        redelivered: Whether the request may have killed its last worker.
        co_resident: Whether other requests were in flight when it joined. Then its delivery does
            not count as an attempt yet.
    """

    def __init__(self, in_flight: InFlight, *, redelivered: bool, co_resident: bool) -> None:
        self._in_flight = in_flight
        self.redelivered = redelivered
        self.co_resident = co_resident
        self._ticket: Ticket | None = None  # None: the request does not wait for the device

    @property
    def ticket(self) -> Ticket:
        """The ticket of the request in the run queue.

        Raises:
            AssertionError: The request has left the run queue.
        """
        if self._ticket is None:
            raise AssertionError("the request has left the run queue")
        return self._ticket

    @property
    def waits_behind_another(self) -> bool:
        """Whether its run could not begin now if it were ready."""
        return self._in_flight.waits_behind_another(self)

    def enqueue(self) -> None:
        """Put a new ticket at the end of the run queue."""
        self._ticket = self._in_flight.queue.put()
        self._in_flight.waiting[self] = None

    def occupy_device(self) -> None:
        """Record that the run has begun."""
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
        """Leave the run queue but stay in flight: other requests do not wait for this one."""
        self._in_flight.aside.add(self)
        self.release_device()

    def rejoin(self) -> None:
        """Return to the end of the run queue after `step_aside`."""
        if self in self._in_flight.aside:
            self._in_flight.aside.remove(self)
            self.enqueue()

    def clear(self) -> None:
        """Record that the request did not kill its last worker and needs no isolation."""
        self.redelivered = self.co_resident = False
        self._in_flight.changed.set()

    def leave(self) -> None:
        """Leave the requests in flight; the request is about to be settled."""
        self.release_device()
        self._in_flight.slots.discard(self)
        self._in_flight.aside.discard(self)


def unqueued_slot() -> Slot:
    """Return a slot for a request that is finalized without a run: it has no ticket."""
    return Slot(InFlight(RunQueue()), redelivered=False, co_resident=False)
