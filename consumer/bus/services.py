"""Discovers the workers of an installation with `$SRV.INFO`."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error

from consumer.bus.connection import Bus, BusUnavailable
from consumer.bus.endpoint_connection import SERVICE
from consumer.bus.server_texts import NO_RESPONDERS

QUERY_TIMEOUT = 1.0  # seconds for all replies together
QUIET = 0.2  # seconds without another reply, after the first one, that end the query
MAX_REPLIES = 1_000

Metadata = Mapping[str, str]


def queue_of_worker(metadata: Metadata) -> str | None:
    """Return the queue of a worker. Workers of earlier versions serve the queue of their task."""
    return metadata.get("queue", metadata.get("task"))


async def worker_metadata(bus: Bus) -> list[Metadata]:
    """Query all workers for the metadata of their services.

    Returns:
        The metadata of each worker that has replied: `worker`, `task`, `queue`, `id` of the
        model, ….

    Raises:
        BusUnavailable: The query could not be sent, or there are workers and none has replied.
    """
    inbox = bus.client.new_inbox()
    replies: list[Metadata] = []
    try:
        subscription = await bus.client.subscribe(inbox)
    except (Error, OSError) as error:
        raise BusUnavailable(
            f"NATS: the workers cannot be queried: {type(error).__name__}"
        ) from None
    try:
        await bus.client.publish(f"$SRV.INFO.{SERVICE}", reply=inbox)
        until = time.monotonic() + QUERY_TIMEOUT
        while len(replies) < MAX_REPLIES and (left := until - time.monotonic()) > 0:
            # A busy worker replies late.
            message = await subscription.next_msg(timeout=min(QUIET, left) if replies else left)
            if (message.headers or {}).get("Status") == NO_RESPONDERS:
                return []
            if (metadata := _metadata(message)) is not None:
                replies.append(metadata)
    except TimeoutError:  # nats-py's timeouts are subclasses
        pass
    except (Error, OSError) as error:
        raise BusUnavailable(
            f"NATS: the workers cannot be queried: {type(error).__name__}"
        ) from None
    finally:
        await _unsubscribe(subscription)
    if not replies:
        # Without a connection nats-py buffers the query and sends it later.
        raise BusUnavailable(f"NATS: no worker has replied within {QUERY_TIMEOUT:g} s")
    return replies


async def _unsubscribe(subscription: Any) -> None:
    with suppress(Error, OSError):  # the connection is lost, and the subscription with it
        await subscription.unsubscribe()


def _metadata(message: Msg) -> Metadata | None:
    """Return the metadata in a reply; None if the reply is not from a worker."""
    try:
        reply: Any = json.loads(message.data)
    except ValueError:
        return None
    found = reply.get("metadata") if isinstance(reply, dict) else None
    if not isinstance(found, dict):
        return None
    return {str(name): value for name, value in found.items() if isinstance(value, str)}
