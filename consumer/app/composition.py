"""Build the daemon's components from the settings."""

from collections.abc import Awaitable, Callable

import structlog

from consumer.artifacts import ObjectStoreArtifacts, store_config
from consumer.bus.connection import Bus
from consumer.bus.publishing import JetStreamEvents
from consumer.bus.queue import BroadcastWorkers, JetStreamQueue
from consumer.bus.queue_directory import QueueDirectory
from consumer.bus.topology import DELIVERIES_PER_ATTEMPT, Durable, Topology
from consumer.endpoints.cancellation import Cancellation, QueueFinalizer
from consumer.endpoints.worker_service import WorkerBackend, WorkerService
from consumer.inference.run_queue import RunQueue
from consumer.jobs.admission import Admission
from consumer.jobs.finalizer import Finalizer
from consumer.jobs.in_flight import STAGES
from consumer.jobs.served_model import ServedModel
from consumer.ports.bus import StopAck
from consumer.ports.model import ModelDescription, Runner
from consumer.ports.telemetry import Observer
from consumer.runners import ModelConfig, create_runner, find_setting_errors
from consumer.settings import Settings, SettingsError
from generation_contracts import Request
from generation_contracts.queues import QueueInfo

log = structlog.get_logger()


def make_topology(settings: Settings, bus: Bus, *, queue: QueueInfo | None = None) -> Topology:
    """Return the streams and durables under the configured subject root.

    Args:
        settings: All settings.
        bus: A connection.
        queue: A queue in addition to the default queues; by default the queue of the settings.
    """
    if queue is None and settings.model_type is not None:
        queue = settings.queue
    return Topology(
        bus,
        settings.subjects,
        ack_wait=settings.consumer_ack_wait,
        max_ack_pending=settings.consumer_max_ack_pending,
        max_deliver=DELIVERIES_PER_ATTEMPT * settings.consumer_max_attempts,
        durable_name=settings.consumer_name,
        queue=queue,
        replicas=settings.nats_replicas,
        sizes=settings.nats_stream_sizes,
    )


def make_artifacts(settings: Settings, observer: Observer) -> ObjectStoreArtifacts:
    """Return the object store with the configured credentials.

    Raises:
        SettingsError: Settings of the store are wrong: one line for each.
    """
    return ObjectStoreArtifacts(store_config(settings), observer=observer)


def make_admission(settings: Settings, queue: QueueInfo) -> Admission:
    """Return the admission stage, which decodes and validates the requests of a queue."""
    return Admission(queue.task, settings.subjects, settings.reply_prefixes, queue.name)


def make_run_queue(settings: Settings) -> RunQueue:
    """Return the queue from which the inference thread takes its runs."""
    return RunQueue(
        max_batch=min(settings.consumer_max_batch, most_in_flight(settings)),
        window=settings.consumer_batch_window_ms / 1000,
    )


def most_in_flight(settings: Settings) -> int:
    """Return how many requests this worker may have in flight.

    The durable's `max_ack_pending` is not applied here: the server enforces it for all workers
    together, and an operator can change it while they run.
    """
    return settings.consumer_jobs_in_flight or STAGES * settings.consumer_max_batch


def warn_of_short_batches(settings: Settings, durable: Durable) -> None:
    """Log a warning if the configured batch size can never be reached."""
    batch, in_flight = settings.consumer_max_batch, most_in_flight(settings)
    if batch > min(in_flight, durable.max_ack_pending):
        log.warning(
            "batches_cut_short",
            max_batch=batch,
            jobs_in_flight=in_flight,
            max_ack_pending=durable.max_ack_pending,
        )


def make_worker_service(
    settings: Settings,
    *,
    endpoints: Bus,
    queue: JetStreamQueue,
    directory: QueueDirectory,
    workers: BroadcastWorkers,
    events: JetStreamEvents,
    artifacts: ObjectStoreArtifacts,
    model: ModelDescription,
    served: ServedModel,
    check: Callable[[Request], None],
    request_stop: Callable[[str], Awaitable[StopAck | None]],
    is_running: Callable[[str], bool],
    observer: Observer,
) -> WorkerService:
    """Return the request-reply endpoints: calls of this worker's task, cancellations and uploads.

    Cancellation covers every queue because another queue may have no worker.

    Args:
        settings: All settings.
        endpoints: The connection that carries the replies; see `connect_endpoints`.
        queue: Reads the requests in their streams.
        directory: Lists the queues.
        workers: Broadcasts to all workers.
        events: Publishes events and requests.
        artifacts: The object store.
        model: The loaded model.
        served: The names of the loaded model.
        check: Raises if the model cannot serve a request.
        request_stop: Stops a request that is in flight in this worker.
        is_running: Returns whether a request is in flight in this worker.
        observer: Called for each refused call, and for each chain that breaks when a cancellation
            finds its request finished.
    """

    def finalizer_of(name: str) -> QueueFinalizer:
        found = directory.latest[name]
        finalizer = Finalizer(
            task=found.task,
            queue=found.name,
            worker=settings.consumer_worker,
            model=model,
            events=events,
            queues=queue,
            artifacts=artifacts,
            retry_delay=settings.consumer_retry_delay,
            observer=observer,
        )
        return QueueFinalizer(make_admission(settings, found), finalizer)

    cancellation = Cancellation(
        queue=queue, workers=workers, events=events, finalizer_of=finalizer_of
    )
    backend = WorkerBackend(
        task=settings.task,
        served=served,
        queue_for=directory.queue_for,
        worker=settings.consumer_worker,
        model=model.info,
        reply_prefixes=settings.reply_prefixes,
        check=check,
        cancel=cancellation.cancel,
        request_stop=request_stop,
        is_running=is_running,
        sign_upload=artifacts.sign_upload,
        observer=observer,
        worker_inboxes=f"{settings.nats_inbox_prefix}.",
        request_schema=model.request_schema,
    )
    return WorkerService(endpoints, settings.subjects, backend)


def make_runner(settings: Settings) -> Runner:
    """Return the runner of the configured model; the model is not loaded yet.

    Raises:
        SettingsError: MODEL_TYPE is not set, or settings of the model are wrong: one line for each.
    """
    config = ModelConfig(
        model_id=settings.model_id,
        revision=settings.model_revision,
        device=settings.model_device,
        dtype=settings.model_dtype,
        offload=settings.model_offload,
        quantization=settings.model_quantization,
        compile=settings.model_compile,
        device_map=settings.model_device_map,
        warm_up=settings.model_warm_up,
        vae_tiling=settings.model_vae_tiling,
        vae_slicing=settings.model_vae_slicing,
        channels_last=settings.model_channels_last,
        attention=settings.model_attention,
        step_cache=settings.model_step_cache,
        defaults=settings.model_defaults,
        adapters=settings.model_adapters,
        safety_checker=settings.model_safety_checker,
        safety_labels=settings.model_safety_labels,
        safety_threshold=settings.model_safety_threshold,
        safety_policy=settings.model_safety_policy,
        max_image_pixels=settings.model_max_image_pixels,
        runner=settings.model_runner,
    )
    if errors := find_setting_errors(settings.task, config):
        raise SettingsError("\n".join(errors))
    return create_runner(settings.task, config)
