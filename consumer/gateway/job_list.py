"""The ids of each tenant's jobs, read from the subjects of the streams.

The server cannot search a stream for the prefix of an id. So the gateway reads the subjects of all
tenants together and sorts them by tenant. It reads the subjects of requests at most once a second.
It reads the subjects of results once, and again after a lost connection; between these reads, the
events report which jobs have ended.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping

from consumer.bus.cached_read import CachedRead
from consumer.bus.queue_view import QueueView
from consumer.gateway.tenants import IDEMPOTENT, TAG_LENGTH, TIMED, Tenant, tag_of

AGE = 1.0  # seconds for which the list of unfinished jobs is used
DUTY = 20  # a long list is read for at most 1/DUTY of the time,
MOST_AGE = 4.0  # unless it is older than this, in seconds
ENDED_AGE = 600.0  # seconds for which the list of ended jobs is used; results expire
# Limit per tenant, for ids with an idempotency key and for ids without one. The oldest are left
# out, if the ids contain a time.
MOST_ENDED = 10_000
RECENT = 10.0  # seconds after which a new list contains all changes that this gateway saw before

_Lists = dict[str, dict[str, str]]  # by the prefix of the ids: tag and kind


class JobList:
    """The ids of all jobs, by tenant.

    Args:
        view: Reads the subjects.
    """

    def __init__(self, view: QueueView) -> None:
        self._view = view
        self._unfinished = CachedRead(self._read_unfinished, age=AGE, duty=DUTY, most_age=MOST_AGE)
        self._ended = CachedRead(self._read_ended, age=ENDED_AGE)
        self._ended_lists: _Lists | None = None  # before the first read
        self._ended_while_read: dict[str, str] | None = None  # jobs that end during a read
        self._just_submitted = _Recent()
        self._just_ended = _Recent()

    async def unfinished(self, tenant: Tenant) -> Mapping[str, str]:
        """Return a tenant's queued and running jobs; the list is at most a few seconds old.

        Jobs that this gateway has queued, or whose end it has received, are always up to date.

        Raises:
            BusUnavailable: The server does not reply.
        """
        found = _of(tenant, await self._unfinished.get())
        just_submitted, just_ended = self._just_submitted.ids(), self._just_ended.ids()
        found.update((id_, queue) for id_, queue in just_submitted.items() if tenant.owns(id_))
        return {id_: queue for id_, queue in found.items() if id_ not in just_ended}

    async def ended(self, tenant: Tenant) -> Mapping[str, str]:
        """Return a tenant's ended jobs; some of their results may have expired.

        Raises:
            BusUnavailable: The server does not reply.
        """
        await self._ended.get()
        return _of(tenant, self._ended_lists or {})

    def add_submitted(self, request_id: str, queue: str) -> None:
        """Add a request that this gateway queues."""
        self._just_submitted.add(request_id, queue)

    def remove(self, request_id: str) -> None:
        """Remove a request that could not be queued, or whose result has expired."""
        self._just_submitted.remove(request_id)
        (self._ended_lists or {}).get(_prefix(request_id), {}).pop(request_id, None)

    def add_ended(self, request_id: str, queue: str) -> None:
        """Add a request that has a terminal event."""
        self._just_ended.add(request_id, queue)
        if self._ended_while_read is not None:
            self._ended_while_read[request_id] = queue
        if self._ended_lists is not None:
            _add(self._ended_lists, request_id, queue, most=MOST_ENDED)

    def interrupt(self) -> None:
        """Make the next call read the ended jobs again: terminal events may have been missed."""
        self._ended.expire()

    async def _read_unfinished(self) -> _Lists:
        found: _Lists = {}
        for request_id, queue in (await self._view.unfinished()).items():
            _add(found, request_id, queue)
        return found

    async def _read_ended(self) -> None:
        self._ended_while_read = meanwhile = self._just_ended.ids()
        try:
            ids = await self._view.ended()
        finally:
            self._ended_while_read = None
        found: _Lists = {}
        # Sorted by time of submission, if the ids contain it, so that the oldest are left out.
        for request_id in sorted(ids):
            _add(found, request_id, ids[request_id], most=MOST_ENDED)
        for request_id, queue in meanwhile.items():
            _add(found, request_id, queue, most=MOST_ENDED)
        self._ended_lists = found


class _Recent:
    """Request ids that were added in the last `RECENT` seconds."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def add(self, request_id: str, queue: str) -> None:
        self._drop_old()
        self._seen[request_id] = queue, time.monotonic()
        self._seen.move_to_end(request_id)

    def remove(self, request_id: str) -> None:
        self._seen.pop(request_id, None)

    def ids(self) -> dict[str, str]:
        self._drop_old()
        return {request_id: queue for request_id, (queue, _) in self._seen.items()}

    def _drop_old(self) -> None:
        oldest = time.monotonic() - RECENT
        while self._seen and next(iter(self._seen.values()))[1] < oldest:
            self._seen.popitem(last=False)


def _prefix(request_id: str) -> str:
    return request_id[: TAG_LENGTH + len("-k")]


def _of(tenant: Tenant, lists: _Lists) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind in (IDEMPOTENT, TIMED):
        found.update(lists.get(f"{tenant.tag}-{kind}", {}))
    return found


def _add(lists: _Lists, request_id: str, queue: str, *, most: int | None = None) -> None:
    if tag_of(request_id) is None:
        return
    ids = lists.setdefault(_prefix(request_id), {})
    ids[request_id] = queue
    if most is not None and len(ids) > most:
        del ids[next(iter(ids))]
