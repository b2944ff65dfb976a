"""Ids that were cancelled before their request arrived, stored for a bounded time.

A cancellation reaches all workers at once. The request may arrive at a worker later, or may not
have been published yet. The worker that receives the request looks its id up here.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

KEEP = 600.0  # seconds
MAX_IDS = 10_000  # about 2 MB


class EarlyCancellations:
    """A bounded, expiring set of request ids and chain ids.

    Args:
        keep: Seconds that an id is stored after it was last added.
        max_ids: Number of stored ids; above it the oldest ids are dropped.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        *,
        keep: float = KEEP,
        max_ids: int = MAX_IDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keep = keep
        self._max_ids = max_ids
        self._clock = clock
        self._added: OrderedDict[str, float] = OrderedDict()  # the oldest first

    def add(self, request_id: str) -> None:
        """Store an id, or store it for longer."""
        now = self._clock()
        self._added[request_id] = now
        self._added.move_to_end(request_id)
        while len(self._added) > self._max_ids or self._expired(next(iter(self._added.values()))):
            self._added.popitem(last=False)

    def __contains__(self, request_id: str) -> bool:
        added = self._added.get(request_id)
        return added is not None and not self._expired(added)

    def _expired(self, added: float) -> bool:
        return self._clock() - added >= self._keep
