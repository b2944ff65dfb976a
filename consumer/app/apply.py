"""`consumer apply`: what must be there before a daemon can work: streams, durables, the bucket."""

import time
from functools import partial

from consumer.app.composition import make_artifacts, make_topology
from consumer.app.probes import NullObserver
from consumer.bus.connection import connect, wait_until_available
from consumer.bus.topology import PartlyApplied
from consumer.settings import Settings, SettingsError
from generation_contracts import Task

CONNECT_WITHIN = 5.0  # seconds; a person waits
API_WITHIN = 10.0  # seconds for a JetStream that starts later than its server, or answers late


def for_workers(settings: Settings, number: int) -> Settings:
    """The settings with room for so many workers of each task.

    `max_ack_pending` belongs to the durable and counts for all its workers together: it is their
    number times what one has in hand, CONSUMER_JOBS_IN_FLIGHT or, where that is not set,
    CONSUMER_MAX_ACK_PENDING. The server heeds it at once, also while they run.
    """
    each = settings.consumer_jobs_in_flight or settings.consumer_max_ack_pending
    return settings.model_copy(update={"consumer_max_ack_pending": number * each})


async def apply(settings: Settings) -> dict[str, str]:
    """Create or update the streams, the durables and the bucket.

    With MODEL_TYPE set only that task's durable is applied, else both.

    Returns:
        What was done, by name: created, updated or unchanged.

    Raises:
        SettingsError: CONSUMER_NAME is set and MODEL_TYPE is not.
        BusUnavailable, TopologyError, StoreUnavailable: With one clear line. With PartlyApplied
            everything was applied but what the line names.
    """
    tasks = tuple(Task) if settings.model_type is None else (settings.model_type,)
    if settings.consumer_name is not None and len(tasks) > 1:
        # One durable would be turned from the one task to the other.
        raise SettingsError("CONSUMER_NAME: set MODEL_TYPE too, to say whose durable it is")
    bus = await connect(settings, name="generation apply", within=CONNECT_WITHIN)
    left: PartlyApplied | None = None
    done: dict[str, str] = {}
    try:
        applying = partial(make_topology(settings, bus).apply, tasks)
        deadline = time.monotonic() + API_WITHIN
        done.update(await wait_until_available(applying, deadline=deadline))
    except PartlyApplied as error:
        left = error
    finally:
        await bus.close()
    artifacts = make_artifacts(settings, NullObserver())
    try:
        created = await artifacts.ensure_bucket()
    finally:
        await artifacts.close()
    if left is not None:
        raise left
    done[f"bucket {settings.s3_bucket}"] = "created" if created else "unchanged"
    return done
