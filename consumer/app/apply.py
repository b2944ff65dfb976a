"""`consumer apply`: create or update what a daemon needs: streams, durables and the bucket."""

import asyncio
import time
from collections.abc import Callable
from functools import partial

from consumer.app.composition import make_artifacts, make_topology
from consumer.app.probes import NullObserver
from consumer.artifacts import (
    ObjectStoreArtifacts,
    StoreMisconfigured,
    store_config,
    with_address,
)
from consumer.bus.connection import connect, require_server_version, wait_until_available
from consumer.bus.topology import PartlyApplied
from consumer.ports.store import StoreUnavailable
from consumer.settings import Settings, SettingsError
from generation_contracts.base import DEFAULT_QUEUES

CONNECT_WITHIN = 5.0  # seconds; a person waits
API_WITHIN = 10.0  # seconds; JetStream and the store may start later, or reply late
SILENT_FOR = 2.0  # seconds until the command reports what it waits for


def for_workers(settings: Settings, number: int) -> Settings:
    """Return the settings with `max_ack_pending` raised for a number of workers of each task.

    `max_ack_pending` belongs to the durable and covers all its workers together. It is their
    number times the requests that one worker has in flight: CONSUMER_JOBS_IN_FLIGHT or, if unset,
    CONSUMER_MAX_ACK_PENDING. The server applies a change at once, also to running workers.
    """
    each = settings.consumer_jobs_in_flight or settings.consumer_max_ack_pending
    return settings.model_copy(update={"consumer_max_ack_pending": number * each})


async def apply(
    settings: Settings, report: Callable[[str], None] = lambda _: None
) -> dict[str, str]:
    """Create or update the streams, the durables and the bucket.

    The rule that lets the store delete uploads is optional: a store may refuse it.

    If MODEL_TYPE is set, only the durable of that task, or of CONSUMER_QUEUE, is applied, and
    MODEL_ID is declared as the model of the queue. Otherwise the default durables are applied.

    Args:
        settings: All settings.
        report: Called with one line if the store does not answer soon.

    Returns:
        The change of each resource, by name: created, updated or unchanged.

    Raises:
        SettingsError: Settings of the store are wrong, or CONSUMER_NAME or CONSUMER_QUEUE is set
            and MODEL_TYPE is not; nothing has been changed.
        BusUnavailable, TopologyError, StoreUnavailable: The text is one line. After PartlyApplied,
            everything was applied except the resource that the line names.
    """
    if settings.model_type is not None:
        queues: tuple[str, ...] = (settings.queue.name,)
    else:
        queues = tuple(str(task) for task in DEFAULT_QUEUES)
        # The second task would overwrite the first task's durable of the same name.
        for name in ("consumer_name", "consumer_queue"):
            if getattr(settings, name) is not None:
                raise SettingsError(f"{name.upper()}: set MODEL_TYPE too, it names the task")
    store_config(settings)  # wrong settings are found before anything is changed
    bus = await connect(settings, name="generation apply", within=CONNECT_WITHIN)
    left: PartlyApplied | None = None
    done: dict[str, str] = {}
    try:
        require_server_version(bus)
        applying = partial(make_topology(settings, bus).apply, queues)
        deadline = time.monotonic() + API_WITHIN
        done.update(await wait_until_available(applying, deadline=deadline))
    except PartlyApplied as error:
        left = error
    finally:
        await bus.close()
    done.update(await _apply_store(settings, report))
    if left is not None:
        raise left
    return done


async def _apply_store(settings: Settings, report: Callable[[str], None]) -> dict[str, str]:
    artifacts = make_artifacts(settings, NullObserver())
    try:
        creating = asyncio.ensure_future(artifacts.ensure_bucket(within=API_WITHIN))
        if not (await asyncio.wait({creating}, timeout=SILENT_FOR))[0]:
            report(f"waiting for S3 at {settings.s3_endpoint}")
        created = await creating
        return {
            f"bucket {settings.s3_bucket}": "created" if created else "unchanged",
            "expiry of uploads": await _expire_uploads(artifacts),
        }
    except StoreUnavailable as error:
        raise StoreUnavailable(with_address(error, settings.s3_endpoint)) from None
    finally:
        await artifacts.close()


async def _expire_uploads(artifacts: ObjectStoreArtifacts) -> str:
    # Optional: many stores, and most policies, do not let this user set lifecycle rules.
    try:
        return "created" if await artifacts.expire_uploads() else "unchanged"
    except StoreMisconfigured as error:
        return f"not set, uploads stay in the bucket: {error}"
