"""The queues of an installation, read from the metadata of the request streams.

The user of the connection needs permission to publish to `$JS.API.STREAM.LIST`. Without it, only
the default queues are known.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

import structlog
from nats.errors import Error

from consumer.bus.cached_read import CachedRead
from consumer.bus.connection import Bus, BusUnavailable
from consumer.bus.server_texts import is_permission_error
from generation_contracts import Subjects
from generation_contracts.queues import QueueInfo, default_queues, queue_of_stream

log = structlog.get_logger()

AGE = 1.0  # seconds for which the list is cached
REFUSED_AGE = 60.0  # seconds until a list that the server has refused is read again
API = "$JS.API.STREAM.LIST"
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
        found = default_queues()
        offset, total = 0, 1
        while offset < total:
            page = await self._page(offset)
            if page is None:
                return self.latest
            streams = page.get("streams") or []
            for stream in streams:
                queue = queue_of_stream(stream["config"], self._subjects)
                if queue is not None:
                    found[queue.name] = queue
            offset, total = offset + max(1, len(streams)), page.get("total", 0)
        self.latest = found
        return found

    async def _page(self, offset: int) -> Mapping[str, Any] | None:
        """Return one page of the list of request streams, or None if this user may not list."""
        query = {"subject": f"{self._subjects.root}.request.>", "offset": offset}
        self._bus.last_error = ""
        try:
            reply = await self._bus.request(
                API, json.dumps(query).encode(), within=LIST_TIMEOUT
            )
            page: dict[str, Any] = json.loads(reply)
        except (Error, OSError, TimeoutError, ValueError) as error:
            if self._may_not_list():
                log.warning("queues_not_listed", reason=self._bus.last_error[:200])
                self._refused_until = time.monotonic() + REFUSED_AGE
                return None
            raise BusUnavailable(f"NATS: no list of queues: {type(error).__name__}") from None
        if "error" in page:
            raise BusUnavailable(f"NATS: no list of queues: {page['error'].get('description')}")
        return page

    def _may_not_list(self) -> bool:
        # The server drops a request without permission and reports the reason asynchronously.
        reason = self._bus.last_error
        return is_permission_error(reason) and API.lower() in reason.lower()
