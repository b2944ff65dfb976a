"""Cancellations that came before their requests."""

import time
from collections import OrderedDict
from collections.abc import Iterable

REMEMBERED_FOR = 600.0  # seconds
MOST = 10_000


class EarlyCancellations:
    """A bounded memory of cancelled ids; the oldest ones are forgotten first."""

    def __init__(self) -> None:
        self._until: OrderedDict[str, float] = OrderedDict()

    def add(self, request_id: str) -> None:
        """Remember an id."""
        self._until.pop(request_id, None)
        self._until[request_id] = time.monotonic() + REMEMBERED_FOR
        while len(self._until) > MOST:
            self._until.popitem(last=False)

    def isdisjoint(self, ids: Iterable[str]) -> bool:
        """Whether none of some ids was cancelled."""
        return not any(one in self for one in ids)

    def __contains__(self, request_id: str) -> bool:
        """Whether an id was cancelled, and not too long ago."""
        return self._until.get(request_id, 0.0) > time.monotonic()
