"""The worker process: connect, load the model, serve, drain and stop.

`Daemon` builds the components, runs the background tasks, and handles the signals. `run` is the
entry point of `consumer run` and returns its exit code.
"""

import asyncio
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TextIO

import structlog

from consumer.app.composition import (
    make_admission,
    make_artifacts,
    make_run_queue,
    make_runner,
    make_topology,
    make_worker_service,
    most_in_flight,
    warn_of_short_batches,
)
from consumer.app.metrics import Metrics
from consumer.app.probes import Probes, Telemetry
from consumer.app.signing import make_credentials
from consumer.app.tracing import OpenTelemetry, open_telemetry
from consumer.artifacts import (
    ObjectStoreArtifacts,
    StoreMisconfigured,
    store_config,
    with_address,
)
from consumer.background_tasks import cancel_and_wait
from consumer.bus.attempt_marks import AttemptMarks
from consumer.bus.connection import (
    Bus,
    ConnectionClosed,
    connect,
    require_server_version,
    wait_until_available,
)
from consumer.bus.dead_letters.exhausted import find_exhausted
from consumer.bus.delivery import DeliveryContext, JetStreamDelivery
from consumer.bus.endpoint_connection import connect_endpoints
from consumer.bus.lease_guard.guard import LeaseGuard
from consumer.bus.publishing import JetStreamEvents
from consumer.bus.pull import PullLoop
from consumer.bus.queue import BroadcastWorkers, JetStreamQueue
from consumer.bus.queue_directory import QueueDirectory
from consumer.bus.retries import RetryMover
from consumer.bus.topology import Durable, Topology
from consumer.inference.cancel_token import StopReason
from consumer.inference.monitor import DRAIN_STEP_TIMEOUT
from consumer.inference.worker import InferenceWorker
from consumer.jobs.executor import Executor, Limits
from consumer.jobs.served_model import ServedModel
from consumer.media.codec import ImageCodec
from consumer.ports.model import ModelDescription, ModelMisconfigured, ModelUnavailable, Runner
from consumer.ports.store import StoreUnavailable
from consumer.ports.telemetry import NoTracer, Tracer
from consumer.ports.unavailable import Unavailable
from consumer.settings import Settings
from generation_contracts import TASKS

log = structlog.get_logger()

MakeRunner = Callable[[Settings], Runner]

EXIT_USAGE = 2  # wrong settings; a restart does not help
EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h: a service cannot be reached or used
EXIT_MODEL_LOST = 70  # EX_SOFTWARE: the model cannot be loaded, or the device is lost

CONNECT_WITHIN = 30.0  # seconds at startup for NATS and its JetStream API together
STORE_CHECK_INTERVAL = 30.0  # seconds between two checks of an idle store
STORE_RECHECK_INTERVAL = 5.0  # seconds between two checks of an unreachable store
ADVISORY_RETRY_DELAY = 5.0  # seconds until an advisory that could not be handled is delivered again
CANCEL_INTERVAL = 1.0  # seconds until a component that is still closing is cancelled again
FORCED_STOP_TIMEOUT = 2.0  # seconds after a second signal to requeue the deliveries in flight


def run(settings: Settings, *, make_runner: MakeRunner = make_runner) -> int:
    """Run one daemon until a signal, a lost device or a closed connection ends it.

    Args:
        settings: All settings.
        make_runner: Makes the runner; it loads the model later.

    Returns:
        The exit code: 0, 2, 69 or 70.

    Raises:
        SettingsError: A setting is unusable; nothing has been started.
    """
    # The lease guard sends SIGUSR1 before it kills a worker whose threads hang. faulthandler then
    # writes all stacks to standard error, without the interpreter lock.
    if _has_descriptor(sys.stderr):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    daemon = Daemon(settings, make_runner)
    code = asyncio.run(daemon.run())
    if daemon.busy:
        # Python cannot end a thread that loads or hangs, and a normal exit would wait for it.
        with suppress(OSError, ValueError):  # the pipe may be closed
            sys.stdout.flush()
        os._exit(code)
    return code


@dataclass(frozen=True)
class _Services:
    """The connections to the services, and the adapters that use them."""

    bus: Bus
    endpoints: Bus
    artifacts: ObjectStoreArtifacts
    topology: Topology
    ensure: Callable[[], Awaitable[Durable]]
    durable: Durable
    events: JetStreamEvents
    queue: JetStreamQueue
    directory: QueueDirectory
    workers: BroadcastWorkers


class Daemon:
    """One process, one loaded model, one queue."""

    def __init__(self, settings: Settings, make_runner: MakeRunner) -> None:
        store_config(settings)  # wrong settings are found before anything starts
        self._settings = settings
        self._runner = make_runner(settings)
        self._credentials = make_credentials(settings)
        self._task = settings.task
        self._queue = settings.queue.name
        self._telemetry = Telemetry(Metrics(str(self._task), self._queue))
        self._health = self._telemetry.health
        self._run_queue = make_run_queue(settings)
        self._inference: InferenceWorker | None = None
        self._main_task: asyncio.Task[int] | None = None
        self._pull: PullLoop | None = None
        self._executor: Executor | None = None
        self._tracer: Tracer = open_telemetry() if settings.consumer_traces else NoTracer()
        self._signals = 0
        self._exit_code = 0
        self._drained = False  # no request is in flight, and the inference thread is idle
        self._failure: BaseException | None = None  # what a background task raised

    @property
    def busy(self) -> bool:
        """Whether a thread is running code of the model or of a signer, which has no end."""
        inferring = self._inference is not None and self._inference.busy
        return inferring or (self._credentials is not None and self._credentials.busy)

    async def run(self) -> int:
        """Start, serve until a stop is requested, drain and stop; return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        log.info("daemon_starting", worker=self._settings.consumer_worker)
        self._main_task = asyncio.create_task(self._start_and_serve(), name="daemon")
        try:
            return await self._main_task
        except asyncio.CancelledError:
            log.warning("stopped_before_drained", running=self._executor is not None)
            return self._exit_code if self._failure is None else _exit_code_of(self._failure)
        except Exception as error:  # noqa: BLE001 - each exception has an exit code
            return _exit_code_of(error)
        finally:
            self._run_queue.close()
            log.info("daemon_stopped")

    # -- start ------------------------------------------------------------------------------------

    async def _start_and_serve(self) -> int:
        async with AsyncExitStack() as stack:
            await self._start_probes(stack)
            if isinstance(self._tracer, OpenTelemetry):
                stack.push_async_callback(asyncio.to_thread, self._tracer.close)
            runner = self._runner
            # The model loads while the connections are made.
            inference = self._inference = InferenceWorker(
                runner, self._run_queue, on_busy=self._telemetry.device_busy
            )
            loading = inference.start()
            stack.callback(loading.cancel)
            lease_guard = await self._start_lease_guard(stack)
            services = await self._open_services(stack)
            model = await loading
            self._health.model_loaded = True
            self._telemetry.metrics.model_loaded(model.info)
            served = await self._served_model(services, model)
            executor = self._make_executor(services, model=model, runner=runner, served=served)
            context = self._make_context(services.bus, services.durable, lease_guard)
            pull = PullLoop(services.bus, services.durable, ensure=services.ensure, context=context)
            service = make_worker_service(
                self._settings,
                endpoints=services.endpoints,
                queue=services.queue,
                directory=services.directory,
                workers=services.workers,
                events=services.events,
                artifacts=services.artifacts,
                model=model,
                served=served,
                check=runner.check,
                request_stop=executor.request_stop,
                is_running=executor.has_started,
                observer=self._telemetry,
            )
            # The stack closes the service first: its last calls still use the model.
            stack.push_async_callback(self._close_model, inference)
            self._start_background_task(self._watch_inference(inference), "watch-inference", stack)
            await service.start()
            stack.push_async_callback(service.close)
            await pull.start()
            stack.push_async_callback(pull.close)
            # A server that shuts down may answer as if the durable was missing.
            bus = services.bus
            self._health.durable_present = lambda: pull.attached or not bus.connected
            self._pull, self._executor = pull, executor
            await self._start_watches(services, context, pull, executor, stack=stack)
            log.info(
                "daemon_ready", worker=self._settings.consumer_worker, model=model.info.model_dump()
            )
            code = await self._serve(pull, executor)
            self._drained = code == 0
            return code

    async def _open_services(self, stack: AsyncExitStack) -> "_Services":
        """Connect to NATS and S3, and wait until the durable exists."""
        deadline = time.monotonic() + CONNECT_WITHIN
        bus, endpoints = await self._connect(stack)
        require_server_version(bus)
        artifacts = make_artifacts(self._settings, self._telemetry)
        stack.push_async_callback(artifacts.close)
        topology = make_topology(self._settings, bus)
        ensure = partial(topology.ensure, self._queue)
        durable = await wait_until_available(ensure, deadline=deadline)
        warn_of_short_batches(self._settings, durable)
        # After NATS: a slow store must not use up the time limit for NATS.
        await self._check_store(artifacts)
        subjects, names = self._settings.subjects, {self._queue: durable.name}
        directory = QueueDirectory(bus, subjects)
        return _Services(
            bus=bus,
            endpoints=endpoints,
            artifacts=artifacts,
            topology=topology,
            ensure=ensure,
            durable=durable,
            events=JetStreamEvents(bus, subjects, ensure=ensure, observer=self._telemetry),
            queue=JetStreamQueue(bus, subjects, names, directory),
            directory=directory,
            workers=BroadcastWorkers(bus, subjects, queue=self._queue, durables=names),
        )

    async def _close_model(self, inference: InferenceWorker) -> None:
        if self._drained:  # otherwise the thread may hang, and the wait would not end
            await inference.stop()

    async def _watch_inference(self, inference: InferenceWorker) -> None:
        # Raises what the thread raised. It also ends, without an error, when the device is lost.
        await asyncio.shield(inference.ended)

    async def _start_probes(self, stack: AsyncExitStack) -> None:
        port, host = self._settings.consumer_probes_port, self._settings.consumer_probes_host
        if port:
            probes = Probes(self._telemetry, host=host, port=port)
            await probes.start()
            stack.push_async_callback(probes.close)

    async def _start_lease_guard(self, stack: AsyncExitStack) -> LeaseGuard:
        lease_guard = LeaseGuard(self._settings)
        await lease_guard.start()
        stack.push_async_callback(lease_guard.close)
        return lease_guard

    def _make_context(self, bus: Bus, durable: Durable, lease_guard: LeaseGuard) -> DeliveryContext:
        marks = AttemptMarks(bus, self._settings.subjects, self._queue)
        return DeliveryContext(bus, durable.ack_wait, marks, lease_guard)

    async def _connect(self, stack: AsyncExitStack) -> tuple[Bus, Bus]:
        """Open the connection for deliveries and results, and the connection of the endpoints."""
        name = f"generation {self._settings.consumer_worker}"
        bus = await connect(self._settings, name=name, within=CONNECT_WITHIN)
        stack.push_async_callback(bus.close)
        endpoints = await connect_endpoints(self._settings, self._telemetry, within=CONNECT_WITHIN)
        stack.push_async_callback(endpoints.close)
        self._start_background_task(self._watch_bus(bus), "watch-bus", stack)
        self._health.bus_connected = lambda: bus.connected and endpoints.connected
        return bus, endpoints

    async def _watch_bus(self, bus: Bus) -> None:
        # The pull loop reports a closed connection only to `next`, which is not called while a job
        # runs, and a job may run for hours.
        await bus.closed.wait()
        raise ConnectionClosed

    async def _served_model(self, services: "_Services", model: ModelDescription) -> ServedModel:
        # The queue may declare another name, for example of a model that is in a folder.
        own = self._settings.queue
        declared = (await services.directory.known()).get(own.name, own)
        return ServedModel(declared, model.info.id)

    def _make_executor(
        self,
        services: "_Services",
        *,
        model: ModelDescription,
        runner: Runner,
        served: ServedModel,
    ) -> Executor:
        settings = self._settings
        return Executor(
            worker=settings.consumer_worker,
            admission=make_admission(settings, settings.queue),
            limits=Limits(
                # The values of the durable, not the settings: the heartbeat depends on ack_wait,
                # and all workers of a durable must count attempts in the same way.
                ack_wait=services.durable.ack_wait,
                max_attempts=services.durable.max_attempts,
                stall_timeout=settings.consumer_stall_timeout,
                retry_delay=settings.consumer_retry_delay,
            ),
            model=model,
            runner=runner,
            served=served,
            run_queue=self._run_queue,
            events=services.events,
            queue=services.queue,
            workers=services.workers,
            artifacts=services.artifacts,
            images=ImageCodec(
                max_bytes=settings.consumer_max_input_bytes,
                max_pixels=settings.consumer_max_input_pixels,
                ai_mark=settings.consumer_ai_mark,
            ),
            observer=self._telemetry,
            prompt_in_images=settings.consumer_prompt_in_pictures,
            credentials=self._credentials,
            credentials_required=settings.consumer_c2pa == "required",
            tracer=self._tracer,
            most_in_flight=most_in_flight(settings),
            before_exit=self._stop_pulling,
        )

    async def _check_store(self, artifacts: ObjectStoreArtifacts) -> None:
        # A wrong secret or a missing bucket ends the daemon. A store that is down does not: the
        # worker is not ready, and the first output waits for the store.
        try:
            await artifacts.probe()
        except StoreUnavailable as error:
            reason = with_address(error, self._settings.s3_endpoint)
            if isinstance(error, StoreMisconfigured):
                raise StoreMisconfigured(reason) from None
            log.warning("started_without_store", reason=reason)

    async def _start_watches(
        self,
        services: "_Services",
        context: DeliveryContext,
        pull: PullLoop,
        executor: Executor,
        *,
        stack: AsyncExitStack,
    ) -> None:
        """Start the background tasks that need the executor."""
        watching = self._watch_store(services.artifacts, executor, pull)
        self._start_background_task(watching, "watch-store", stack)
        watching = self._watch_endpoints(services.endpoints)
        self._start_background_task(watching, "watch-endpoints", stack)
        await self._watch_advisories(services.topology, context, executor, stack)
        await self._watch_retries(services.topology, context, services.events, stack)

    async def _watch_store(
        self, artifacts: ObjectStoreArtifacts, executor: Executor, pull: PullLoop
    ) -> None:
        while True:
            reachable = self._health.store_reachable
            changed = await self._telemetry.store_changes(
                STORE_CHECK_INTERVAL if reachable else STORE_RECHECK_INTERVAL
            )
            # A pending upload is a better check: a full store still passes `reachable`.
            if not changed and not executor.storing:
                try:
                    await artifacts.reachable()
                except Exception as error:  # noqa: BLE001 - a failed check must not end the daemon
                    log.warning("store_check_failed", error=type(error).__name__)
            # A worker that cannot reach the store leaves new requests to other workers.
            needed = TASKS[self._task].stores_files or executor.waits_for_store
            if not self._health.store_reachable and needed:
                pull.pause()
            else:
                pull.resume()

    async def _watch_endpoints(self, endpoints: Bus) -> None:
        await endpoints.closed.wait()
        # The worker can still store results, so it finishes the running requests before it exits.
        log.error("endpoints_lost", reason=endpoints.last_error[:200])
        self._exit_code = self._exit_code or EXIT_UNAVAILABLE
        self._drain()

    async def _watch_advisories(
        self,
        topology: Topology,
        context: DeliveryContext,
        executor: Executor,
        stack: AsyncExitStack,
    ) -> None:
        pull = await self._open_pull_loop(topology, topology.watcher(self._queue), context, stack)
        self._start_background_task(
            self._handle_advisories(pull, context, executor), "watch-advisories", stack
        )

    async def _handle_advisories(
        self, pull: PullLoop, context: DeliveryContext, executor: Executor
    ) -> None:
        stream = self._settings.subjects.requests_stream(self._queue)
        while (advisory := await pull.next()) is not None:
            try:
                delivery = await find_exhausted(context.bus, stream, advisory, context.marks)
                if delivery is not None:
                    await executor.handle_exhausted(delivery)
            except asyncio.CancelledError:
                await advisory.nak()  # otherwise no worker receives it before its ack wait ends
                raise
            if delivery is None or delivery.settled:
                await advisory.ack()
            else:
                await advisory.nak_later(ADVISORY_RETRY_DELAY)

    async def _watch_retries(
        self,
        topology: Topology,
        context: DeliveryContext,
        events: JetStreamEvents,
        stack: AsyncExitStack,
    ) -> None:
        durable = topology.retries(self._queue)
        pull = await self._open_pull_loop(topology, durable, context, stack)
        mover = RetryMover(context.bus, self._queue, durable, events)
        self._start_background_task(self._move_retries(pull, mover), "move-retries", stack)

    async def _move_retries(self, pull: PullLoop, mover: RetryMover) -> None:
        while (retry := await pull.next()) is not None:
            await mover.move(retry)

    async def _open_pull_loop(
        self, topology: Topology, durable: Durable, context: DeliveryContext, stack: AsyncExitStack
    ) -> PullLoop:
        """Start a pull loop on a durable of another stream than the requests."""
        # The sequences of this stream are not those of requests.
        of = "retries" if durable.stream == self._settings.subjects.retries_stream else "advisories"
        marks = AttemptMarks(context.bus, self._settings.subjects, self._queue, of=of)
        pull = PullLoop(
            context.bus,
            durable,
            ensure=partial(topology.ensure, self._queue),
            context=replace(context, marks=marks),
        )
        await pull.start()
        stack.push_async_callback(pull.close)
        return pull

    def _start_background_task(
        self, work: Coroutine[Any, Any, None], name: str, stack: AsyncExitStack
    ) -> None:
        """Run a coroutine in parallel with serving, until the exit stack closes.

        If the coroutine raises, the daemon ends: it must not run without this task.
        """

        def on_done(ended: asyncio.Task[None]) -> None:
            if not ended.cancelled() and ended.exception() is not None:
                self._failure = ended.exception()
                if self._main_task is not None:
                    self._cancel(self._main_task)

        async def cancel() -> None:
            await cancel_and_wait(task)

        task = asyncio.create_task(work, name=name)
        task.add_done_callback(on_done)
        stack.push_async_callback(cancel)

    # -- serve ------------------------------------------------------------------------------------

    async def _serve(self, pull: PullLoop, executor: Executor) -> int:
        handling: set[asyncio.Task[None]] = set()
        drained = False
        try:
            await executor.room()
            while (delivery := await pull.next()) is not None:
                task = asyncio.create_task(self._handle(delivery, executor), name="job")
                handling.add(task)
                task.add_done_callback(handling.discard)
                del delivery  # free the body, up to a megabyte: the next delivery may take hours
                await asyncio.sleep(0)  # let the task enter the executor before `room` counts it
                await executor.room()
            drained = True
        finally:
            if not drained:  # the connection is closed, or the process must end at once
                for task in handling:
                    task.cancel()
            await _wait_for(handling)
        return self._exit_code

    async def _handle(self, delivery: JetStreamDelivery, executor: Executor) -> None:
        code = await executor.handle(delivery)
        if code is not None and not self._exit_code:
            # Uploads in progress may still finish. No further run starts.
            self._exit_code = code
            self._health.device_lost = True
            log.error("device_lost")
            self._schedule_stop(
                self._settings.consumer_drain_grace, DRAIN_STEP_TIMEOUT + FORCED_STOP_TIMEOUT
            )

    async def _stop_pulling(self) -> None:
        # Called before the request is requeued: an open pull request would fetch it again.
        if self._pull is not None and self._executor is not None:
            await self._pull.unsubscribe()
            self._executor.requeue_waiting()

    # -- drain ------------------------------------------------------------------------------------

    def _on_signal(self, number: signal.Signals) -> None:
        self._signals += 1
        log.info("signal", name=signal.Signals(number).name, times=self._signals)
        if self._executor is not None and self._signals > 1:
            self._schedule_stop(0.0, FORCED_STOP_TIMEOUT)
        else:
            self._drain()

    def _drain(self) -> None:
        """Fetch no more requests, finish those that have started, then end."""
        self._health.draining = True
        if self._main_task is None:
            return
        if self._executor is None or self._pull is None:
            self._cancel(self._main_task)  # during startup no request has been fetched
            return
        self._pull.stop()
        self._executor.requeue_waiting()
        self._schedule_stop(
            self._settings.consumer_drain_grace, DRAIN_STEP_TIMEOUT + FORCED_STOP_TIMEOUT
        )

    def _schedule_stop(self, grace: float, timeout: float) -> None:
        """Interrupt the runs after `grace` seconds, and end the daemon `timeout` seconds later."""
        if self._executor is None or self._main_task is None:
            return
        loop = asyncio.get_running_loop()
        loop.call_later(grace, self._executor.interrupt, StopReason.DRAIN)
        loop.call_later(grace + timeout, self._cancel, self._main_task)

    def _cancel(self, main_task: asyncio.Task[int]) -> None:
        # Repeated: before Python 3.12, asyncio.wait_for loses a cancellation that arrives when the
        # awaited future completes (python/cpython#86296).
        if not main_task.done():
            main_task.cancel()
            asyncio.get_running_loop().call_later(CANCEL_INTERVAL, self._cancel, main_task)


async def _wait_for(tasks: set[asyncio.Task[None]]) -> None:
    """Wait until all tasks have ended; each cancellation of the wait cancels the tasks."""
    cancelled = False
    while running := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError:
            cancelled = True
            for task in running:
                task.cancel()
    if cancelled:
        raise asyncio.CancelledError


def _has_descriptor(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.fileno() >= 0
    except (OSError, ValueError):  # the process was started without standard error
        return False


def _exit_code_of(error: BaseException) -> int:
    match error:
        case ModelMisconfigured():
            log.error("model_unavailable", reason=str(error))
            return EXIT_USAGE
        case ModelUnavailable():
            log.error("model_unavailable", reason=str(error))
            return EXIT_MODEL_LOST
        case Unavailable() | OSError():
            log.error("service_unavailable", reason=str(error))
            return EXIT_UNAVAILABLE
        case _:
            # An unknown error. The supervisor starts a new process, and the server redelivers the
            # requests in flight.
            log.error("daemon_failed", exc_info=error)
            return EXIT_MODEL_LOST
