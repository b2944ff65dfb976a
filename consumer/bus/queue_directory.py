"""The queues of an installation, read from the metadata of the request streams.

The user of the connection needs permission to publish to `$JS.API.STREAM.LIST`. Without it, only
the default queues are known.
"""

import time
from collections.abc import Mapping

import structlog
from nats.errors import Error

from consumer.bus.cached_read import CachedRead
from consumer.bus.connection import Bus, BusUnavailable
from consumer.bus.server_texts import is_permission_error
from generation_client.queue_list import STREAM_LIST, QueuesUnreadable, list_queues
from generation_contracts import Subjects, Task
from generation_contracts.base import DEFAULT_QUEUES
from generation_contracts.queues import QueueInfo, default_queues, queue_for

log = structlog.get_logger()

AGE = 1.0  # seconds for which the list is cached
REFUSED_AGE = 60.0  # seconds until a list that the server has refused is read again
LIST_TIMEOUT = 1.0  # seconds; a server that refuses does not reply


class QueueDirectory:
    """Lists the queues.

    Args:
        bus: A connection.
        subjects: Subjects of the installation.
    """

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subjects = subjects
        self._cached = CachedRead(self._read, age=AGE)
        self._refused_until = 0.0
        self.latest: Mapping[str, QueueInfo] = default_queues()  # the last list that was read

    async def queues(self) -> Mapping[str, QueueInfo]:
        """Return all queues by name, at most a second old.

        Raises:
            BusUnavailable: The server does not answer.
        """
        return await self._cached.get()

    async def queue_for(self, task: Task, model: str | None) -> str | None:
        """Return the name of the queue for a model; None if no queue serves it.

        Raises:
            BusUnavailable: The server does not answer.
        """
        if model is None and task in DEFAULT_QUEUES:
            return str(task)
        found = queue_for(model, task, (await self.queues()).values())
        return None if found is None else found.name

    async def known(self) -> Mapping[str, QueueInfo]:
        """Return all queues by name; the last known ones if the server does not answer."""
        try:
            return await self.queues()
        except BusUnavailable as error:
            log.warning("queues_not_listed", reason=str(error))
            return self.latest

    def expire(self) -> None:
        """Make the next call read the queues again."""
        self._cached.expire()

    async def _read(self) -> Mapping[str, QueueInfo]:
        if time.monotonic() < self._refused_until:
            return self.latest
        self._bus.last_error = ""
        try:
            self.latest = await list_queues(self._request, self._subjects)
        except (Error, OSError, TimeoutError, QueuesUnreadable) as error:
            if not self._may_not_list():
                reason = str(error) or type(error).__name__
                raise BusUnavailable(f"NATS: the queues cannot be listed: {reason}") from None
            log.warning("queues_not_listed", reason=self._bus.last_error[:200])
            self._refused_until = time.monotonic() + REFUSED_AGE
        return self.latest

    async def _request(self, subject: str, body: bytes) -> bytes:
        return await self._bus.request(subject, body, within=LIST_TIMEOUT)

    def _may_not_list(self) -> bool:
        # The server drops a request without permission and reports the reason asynchronously.
        reason = self._bus.last_error
        return is_permission_error(reason) and STREAM_LIST.lower() in reason.lower()
