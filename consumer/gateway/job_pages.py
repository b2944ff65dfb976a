"""Pages of a tenant's jobs, newest first."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from consumer.gateway.errors import not_found
from consumer.gateway.job_list import JobList
from consumer.gateway.job_view import JobView, State
from consumer.gateway.tenants import Tenant, submitted_at
from generation_contracts import Task
from generation_contracts.queues import QueueInfo

MOST_READ = 500  # jobs read for one page; with a filter a page may be shorter than its limit
MOST_DATED = 2_000  # jobs whose times are read for one page; the remaining jobs are listed last
KNOWN_TIMES = 50_000  # times of submission in memory
CONCURRENT_READS = 32
UNFINISHED: frozenset[State] = frozenset({"queued", "running"})

ReadView = Callable[[str, str], Awaitable[JobView | None]]
ReadQueues = Callable[[], Awaitable[Mapping[str, QueueInfo]]]
_Key = tuple[datetime, str]


@dataclass(frozen=True)
class Page:
    """One page of a tenant's jobs.

    Attributes:
        next: The `after` of the next page; None on the last page.
    """

    jobs: Sequence[JobView]
    next: str | None


class JobPages:
    """Lists jobs by page.

    Args:
        ids: The ids of all jobs.
        read_view: Returns the view of one job, or None if the job does not exist.
        read_queues: Returns all queues by name.
    """

    def __init__(self, ids: JobList, read_view: ReadView, read_queues: ReadQueues) -> None:
        self._ids = ids
        self._read_view = read_view
        self._read_queues = read_queues
        self._times: OrderedDict[str, datetime] = OrderedDict()
        self._reads = asyncio.Semaphore(CONCURRENT_READS)

    async def page(
        self,
        tenant: Tenant,
        *,
        states: Collection[State],
        task: Task | None,
        queue: str | None = None,
        limit: int,
        after: str | None,
    ) -> Page:
        """Return the jobs after one, newest first.

        Args:
            tenant: The owner of the jobs.
            states: Only jobs in one of these states; empty: all jobs.
            task: Only jobs of this task.
            queue: Only jobs of this queue.
            limit: Largest number of jobs.
            after: Id of the last job of the previous page; None starts with the newest job.

        Raises:
            ApiError: 404: `after` is not one of the tenant's jobs.
            BusUnavailable, GenerationError: The streams cannot be read.
        """
        known = await self._read_queues()
        wanted = {
            name for name, q in known.items() if task in {None, q.task} and queue in {None, name}
        }
        queues = await self._queues(tenant, states)
        order = await self._order({i: name for i, name in queues.items() if name in wanted})
        if after is not None:
            candidates = [queues[after]] if after in queues else known
            last = await self._key(tenant, after, candidates)
            order = [key for key in order if key < last]
        return await self._filled(order, queues, states, limit)

    async def _queues(self, tenant: Tenant, states: Collection[State]) -> dict[str, str]:
        filtered = frozenset(states)
        found: dict[str, str] = {}
        if not filtered or filtered & UNFINISHED:
            found.update(await self._ids.unfinished(tenant))
        if not filtered or filtered - UNFINISHED:
            found.update(await self._ids.ended(tenant))
        return found

    async def _order(self, queues: dict[str, str]) -> list[_Key]:
        undated = [id_ for id_ in queues if self._time(id_) is None]
        await asyncio.gather(
            *(self._read(id_, queues[id_]) for id_ in undated[max(0, len(undated) - MOST_DATED) :])
        )
        return sorted((self._key_of(id_) for id_ in queues), reverse=True)

    async def _filled(
        self, order: list[_Key], queues: dict[str, str], states: Collection[State], limit: int
    ) -> Page:
        found: list[JobView] = []
        done = 0
        while done < min(len(order), MOST_READ) and len(found) < limit:
            ids = [id_ for _, id_ in order[done : done + limit - len(found)]]
            views = await asyncio.gather(*(self._read(id_, queues[id_]) for id_ in ids))
            found += [v for v in views if v is not None and (not states or v.state in states)]
            done += len(ids)
        return Page(found, order[done - 1][1] if 0 < done < len(order) else None)

    async def _key(self, tenant: Tenant, request_id: str, queues: Iterable[str]) -> _Key:
        if tenant.owns(request_id):
            for candidate in queues:
                if self._time(request_id) is None:
                    await self._read(request_id, candidate)
            if self._time(request_id) is not None:
                return self._key_of(request_id)
        raise not_found("after: there is no such job")

    async def _read(self, request_id: str, queue: str) -> JobView | None:
        async with self._reads:
            view = await self._read_view(request_id, queue)
        if view is None:
            self._ids.remove(request_id)
        elif submitted_at(request_id) is None:
            self._times[request_id] = view.created
            if len(self._times) > KNOWN_TIMES:
                self._times.popitem(last=False)
        return view

    def _key_of(self, request_id: str) -> _Key:
        return self._time(request_id) or datetime.min.replace(tzinfo=UTC), request_id

    def _time(self, request_id: str) -> datetime | None:
        return submitted_at(request_id) or self._times.get(request_id)
