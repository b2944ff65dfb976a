"""The ids of each tenant's jobs, from the subjects of the streams.

The server cannot search a stream for the first characters of an id. So the subjects of all tenants
are read at a time and sorted by tenant: those of requests that wait at most once a second, those of
results once, and again after a lost connection. In between, the events say what has ended.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping

from consumer.bus.cached_read import CachedRead
from consumer.bus.queue_view import QueueView
from consumer.gateway.tenants import IDEMPOTENT, TAG_LENGTH, TIMED, Tenant, tag_of
from generation_contracts import Task

AGE = 1.0  # seconds that the list of unfinished jobs is kept
DUTY = 20  # where the list is long, at most one part in so many of the time is spent on reading it,
MOST_AGE = 4.0  # unless it is so many seconds old
ENDED_AGE = 600.0  # seconds that the list of ended jobs is kept: results expire
# Of each tenant, with an idempotency key and without one each. The oldest are left out, as far as
# the ids have a time.
MOST_ENDED = 10_000
RECENT = 10.0  # seconds after which the streams' lists have what this gateway has seen before

_Lists = dict[str, dict[str, Task]]  # by what the ids begin with: tag and kind


class JobList:
    """The ids of all jobs, by tenant.

    Args:
        view: Reads the subjects.
    """

    def __init__(self, view: QueueView) -> None:
        self._view = view
        self._unfinished = CachedRead(self._read_unfinished, age=AGE, duty=DUTY, most_age=MOST_AGE)
        self._ended = CachedRead(self._read_ended, age=ENDED_AGE)
        self._ended_lists: _Lists | None = None  # until it is asked for
        self._ended_while_read: dict[str, Task] | None = None  # where it is being read
        self._just_submitted = _Recent()
        self._just_ended = _Recent()

    async def unfinished(self, tenant: Tenant) -> Mapping[str, Task]:
        """Return a tenant's jobs that wait or run, a few seconds old at most.

        What this gateway has queued, or has seen ending, is right at once.

        Raises:
            BusUnavailable: The server does not answer.
        """
        found = _of(tenant, await self._unfinished.get())
        just_submitted, just_ended = self._just_submitted.ids(), self._just_ended.ids()
        found.update((id_, task) for id_, task in just_submitted.items() if tenant.owns(id_))
        return {id_: task for id_, task in found.items() if id_ not in just_ended}

    async def ended(self, tenant: Tenant) -> Mapping[str, Task]:
        """Return a tenant's jobs that have ended; some of their results may have expired.

        Raises:
            BusUnavailable: The server does not answer.
        """
        await self._ended.get()
        return _of(tenant, self._ended_lists or {})

    def add_submitted(self, request_id: str, task: Task) -> None:
        """Note a request that is being queued here."""
        self._just_submitted.add(request_id, task)

    def remove(self, request_id: str) -> None:
        """Forget a request that could not be queued, or whose result has expired."""
        self._just_submitted.remove(request_id)
        (self._ended_lists or {}).get(_beginning(request_id), {}).pop(request_id, None)

    def add_ended(self, request_id: str, task: Task) -> None:
        """Note a request that has its terminal event."""
        self._just_ended.add(request_id, task)
        if self._ended_while_read is not None:
            self._ended_while_read[request_id] = task
        if self._ended_lists is not None:
            _add(self._ended_lists, request_id, task, most=MOST_ENDED)

    def interrupt(self) -> None:
        """Read what has ended again: terminal events may have been missed."""
        self._ended.expire()

    async def _read_unfinished(self) -> _Lists:
        found: _Lists = {}
        for request_id, task in (await self._view.unfinished()).items():
            _add(found, request_id, task)
        return found

    async def _read_ended(self) -> None:
        self._ended_while_read = meanwhile = self._just_ended.ids()
        try:
            ids = await self._view.ended()
        finally:
            self._ended_while_read = None
        found: _Lists = {}
        # In the order of their submission, as far as the ids have it: the oldest are left out.
        for request_id in sorted(ids):
            _add(found, request_id, ids[request_id], most=MOST_ENDED)
        for request_id, task in meanwhile.items():
            _add(found, request_id, task, most=MOST_ENDED)
        self._ended_lists = found


class _Recent:
    """Ids of the last seconds."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, tuple[Task, float]] = OrderedDict()

    def add(self, request_id: str, task: Task) -> None:
        self._drop_old()
        self._seen[request_id] = task, time.monotonic()
        self._seen.move_to_end(request_id)

    def remove(self, request_id: str) -> None:
        self._seen.pop(request_id, None)

    def ids(self) -> dict[str, Task]:
        self._drop_old()
        return {request_id: task for request_id, (task, _) in self._seen.items()}

    def _drop_old(self) -> None:
        oldest = time.monotonic() - RECENT
        while self._seen and next(iter(self._seen.values()))[1] < oldest:
            self._seen.popitem(last=False)


def _beginning(request_id: str) -> str:
    return request_id[: TAG_LENGTH + len("-k")]


def _of(tenant: Tenant, lists: _Lists) -> dict[str, Task]:
    found: dict[str, Task] = {}
    for kind in (IDEMPOTENT, TIMED):
        found.update(lists.get(f"{tenant.tag}-{kind}", {}))
    return found


def _add(lists: _Lists, request_id: str, task: Task, *, most: int | None = None) -> None:
    if tag_of(request_id) is None:
        return
    ids = lists.setdefault(_beginning(request_id), {})
    ids[request_id] = task
    if most is not None and len(ids) > most:
        del ids[next(iter(ids))]
