"""The list of queues, read from the server."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from generation_contracts import Subjects
from generation_contracts.queues import QueueInfo, default_queues, queue_of_stream

STREAM_LIST = "$JS.API.STREAM.LIST"  # the user needs permission to publish to it


class QueuesUnreadable(Exception):  # noqa: N818 - a state of the server
    """The reply is not a list of streams."""


async def list_queues(
    request: Callable[[str, bytes], Awaitable[bytes]], subjects: Subjects
) -> dict[str, QueueInfo]:
    """Return all queues of an installation by name, with the default queue of each task.

    Args:
        request: Sends a request to a subject and returns the body of the reply.
        subjects: Subjects of the installation.

    Raises:
        QueuesUnreadable: The server refuses, or the reply is not from a server.
    """
    found = default_queues()
    offset, total = 0, 1
    while offset < total:
        query = {"subject": f"{subjects.root}.request.>", "offset": offset}
        try:
            page: Any = json.loads(await request(STREAM_LIST, json.dumps(query).encode()))
            if "error" in page:
                raise QueuesUnreadable(page["error"].get("description", "refused"))
            configs = [stream["config"] for stream in page.get("streams") or ()]
            queues = [queue_of_stream(config, subjects) for config in configs]
            offset, total = offset + max(1, len(configs)), int(page["total"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise QueuesUnreadable(f"not a list of streams: {type(error).__name__}") from None
        found.update({queue.name: queue for queue in queues if queue is not None})
    return found
