"""Jobs: requests of a tenant, from their submission to their result."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from consumer.gateway.event_log import Entry, EventId
from consumer.gateway.tenants import Caller
from generation_client import AnyEvent
from generation_contracts import Request, SucceededEvent, Task

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True)
class Job:
    """A request that was submitted.

    Attributes:
        digest: Of what it asks for; "" where this gateway does not know it.
        wait_until: The end of the caller's patience; it is the request's deadline.
    """

    id: str
    task: Task
    digest: str = ""


@dataclass(frozen=True)
class JobView:
    """What is known of a job now.

    Attributes:
        position: How many requests are before it in its queue, at most; None: it does not wait.
        estimated_start: None where nothing has been measured yet.
        last_event: The latest one that this gateway has heard.
        result: Its terminal event.
    """

    job: Job
    state: State
    created: datetime | None
    position: int | None = None
    estimated_start: datetime | None = None
    last_event: AnyEvent | None = None
    result: AnyEvent | None = None


class Jobs:
    """The jobs of all tenants; every method shows a caller its own tenant's only."""

    async def submit(
        self,
        caller: Caller,
        request: Request,
        *,
        idempotency_key: str | None = None,
        wait: bool = True,
    ) -> Job:
        """Queue a request within the caller's bounds.

        A second submit with one idempotency key queues nothing and gives the same job.

        Args:
            request: Without an id.
            wait: Whether the caller waits for the result: the request then has a deadline.

        Raises:
            ApiError: 400, 413, 422 (the key was used for another request), 429 or 503.
        """
        raise NotImplementedError

    def events(self, job: Job, *, after: EventId | None = None) -> AsyncIterator[Entry]:
        """Yield what happens to a job, up to and with its terminal event.

        Raises:
            ApiError: 422 where the result is that of another request; 503.
        """
        raise NotImplementedError

    async def result(self, job: Job) -> SucceededEvent:
        """Wait until a job has succeeded.

        Raises:
            ApiError: It has ended otherwise.
        """
        raise NotImplementedError

    async def find(self, caller: Caller, job_id: str) -> JobView:
        """Look at one job.

        Raises:
            ApiError: 404.
        """
        raise NotImplementedError

    async def cancel(self, caller: Caller, job_id: str) -> JobView:
        """Cancel a job that waits or runs.

        Raises:
            ApiError: 404 or 503.
        """
        raise NotImplementedError

    async def abandon(self, job: Job) -> None:
        """Cancel a job whose caller has gone away. Never raises."""
        raise NotImplementedError

    async def content(self, event: SucceededEvent, number: int) -> bytes:
        """Read the file of one output.

        Raises:
            ApiError: 503: the store cannot be reached.
        """
        raise NotImplementedError
