"""Removes a queue: its streams, its durable in the retries stream, and its waiting retries."""

from collections.abc import Awaitable, Callable
from functools import partial

import structlog
from nats.errors import Error
from nats.js.errors import APIError, NotFoundError

from consumer.bus.connection import API_TIMEOUT, Bus, BusUnavailable
from generation_contracts import Subjects

log = structlog.get_logger()


class QueueInUse(Exception):  # noqa: N818 - a state of the queue
    """The queue has requests or workers; the text is one line."""


async def count_requests(bus: Bus, subjects: Subjects, queue: str) -> int:
    """Return how many requests of a queue wait, are in flight, or wait for their next attempt.

    Raises:
        BusUnavailable: The server does not answer.
    """
    retries = f"{subjects.retry(queue, 'x')[:-1]}*"
    try:
        async with bus.api_call(API_TIMEOUT):
            stored = await bus.jetstream.stream_info(subjects.requests_stream(queue))
        async with bus.api_call(API_TIMEOUT):
            waiting = await bus.jetstream.stream_info(
                subjects.retries_stream, subjects_filter=retries
            )
    except NotFoundError:
        return 0
    except (Error, OSError) as error:
        raise _unavailable(error) from None
    return stored.state.messages + sum((waiting.state.subjects or {}).values())


async def remove_queue(bus: Bus, subjects: Subjects, queue: str, *, force: bool) -> None:
    """Delete a queue that is no default queue.

    Stop its senders and its workers first: a worker creates missing streams again.

    Args:
        bus: A connection.
        subjects: Subjects of the installation.
        queue: Name of the queue.
        force: Delete its requests too, and do not look for workers.

    Raises:
        QueueInUse: It has requests, or workers that wait for requests; nothing was deleted.
        BusUnavailable: The server does not answer, or refuses. Another call completes the removal.
    """
    if not force:
        await _require_unused(bus, subjects, queue)
    retries = f"{subjects.retry(queue, 'x')[:-1]}*"
    manager = bus.jetstream
    try:
        # The request stream first: from then on no request is stored.
        deletions: tuple[Callable[[], Awaitable[object]], ...] = (
            partial(manager.delete_stream, subjects.requests_stream(queue)),
            partial(manager.purge_stream, subjects.retries_stream, subject=retries),
            partial(manager.delete_consumer, subjects.retries_stream, queue),
            partial(manager.delete_stream, subjects.advisories_stream_of(queue)),
        )
        for delete in deletions:
            try:
                async with bus.api_call(API_TIMEOUT):
                    await delete()
            except NotFoundError:
                continue  # deleted by an earlier call
    except (Error, OSError) as error:
        raise _unavailable(error) from None
    log.info("queue_removed", queue=queue)


async def _require_unused(bus: Bus, subjects: Subjects, queue: str) -> None:
    requests = await count_requests(bus, subjects, queue)
    if requests:
        raise QueueInUse(f"{queue}: it has {requests} requests; --force deletes them too")
    try:
        async with bus.api_call(API_TIMEOUT):
            durables = await bus.jetstream.consumers_info(subjects.requests_stream(queue))
    except NotFoundError:
        return
    except (Error, OSError) as error:
        raise _unavailable(error) from None
    if any(durable.num_waiting for durable in durables):
        raise QueueInUse(f"{queue}: its workers are running; stop them first")


def _unavailable(error: Exception) -> BusUnavailable:
    reason = error.description if isinstance(error, APIError) else type(error).__name__
    return BusUnavailable(f"NATS: the queue cannot be read or removed: {reason}")
