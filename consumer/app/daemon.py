"""The daemon: puts the parts together, and start -> serve -> drain -> stop with its signals."""

import asyncio
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
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
from consumer.app.tracing import OpenTelemetry, open_telemetry
from consumer.artifacts import ObjectStoreArtifacts, StoreMisconfigured
from consumer.background_tasks import cancel_and_wait
from consumer.bus.attempt_marks import AttemptMarks
from consumer.bus.connection import (
    Bus,
    ConnectionClosed,
    connect,
    wait_until_available,
)
from consumer.bus.dead_letters.exhausted import find_exhausted
from consumer.bus.delivery import DeliveryContext, JetStreamDelivery
from consumer.bus.endpoint_connection import connect_endpoints
from consumer.bus.lease_guard.guard import LeaseGuard
from consumer.bus.publishing import JetStreamEvents
from consumer.bus.pull import PullLoop
from consumer.bus.queue import BroadcastWorkers, JetStreamQueue
from consumer.bus.retries import RetryMover
from consumer.bus.topology import Durable, Topology
from consumer.inference.cancel_token import StopReason
from consumer.inference.monitor import DRAIN_STEP_TIMEOUT
from consumer.inference.worker import InferenceWorker
from consumer.jobs.executor import Executor, Limits
from consumer.media.codec import ImageCodec
from consumer.ports.model import ModelDescription, ModelUnavailable, Runner
from consumer.ports.store import StoreUnavailable
from consumer.ports.telemetry import NoTracer, Tracer
from consumer.ports.unavailable import Unavailable
from consumer.settings import Settings
from generation_contracts import Task

log = structlog.get_logger()

MakeRunner = Callable[[Settings], Runner]

EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h: a service cannot be reached or used
EXIT_MODEL_LOST = 70  # EX_SOFTWARE: the model cannot be loaded, or the device is lost

# Seconds that the daemon waits at its start for NATS and its JetStream API, together.
CONNECT_WITHIN = 30.0
STORE_CHECK_EVERY = 30.0  # seconds between two looks at an idle store
STORE_CHECK_AGAIN = 5.0  # seconds, while it is away
ADVISORY_AGAIN = 5.0  # seconds until a request is looked at again that finds no place in its queue
CANCEL_EVERY = 1.0  # seconds; a close that takes longer is cut short, and the next part is closed
FORCE_AFTER = 2.0  # seconds after a second signal in which the delivery is given back


def run(settings: Settings, *, make_runner: MakeRunner = make_runner) -> int:
    """Run one daemon until a signal, a lost device or a closed bus ends it.

    Args:
        settings: All of them.
        make_runner: Makes the model, not loaded yet.

    Returns:
        The exit code: 0, 69 or 70.

    Raises:
        SettingsError: Before anything is started.
    """
    # The standby asks for it before it kills a process whose threads hang: where they are, on
    # standard error, written without the interpreter's lock.
    if _has_descriptor(sys.stderr):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    daemon = Daemon(settings, make_runner)
    code = asyncio.run(daemon.run())
    if daemon.inference_busy:
        # A thread that loads or hangs cannot be ended, and the interpreter would wait for it.
        with suppress(OSError, ValueError):  # its reader may be gone
            sys.stdout.flush()
        os._exit(code)
    return code


class Daemon:
    """One process, one loaded model, one queue."""

    def __init__(self, settings: Settings, make_runner: MakeRunner) -> None:
        self._settings = settings
        self._make_runner = make_runner
        self._task = settings.task
        self._telemetry = Telemetry(Metrics(str(self._task)))
        self._health = self._telemetry.health
        self._run_queue = make_run_queue(settings)
        self._inference: InferenceWorker | None = None
        self._life: asyncio.Task[int] | None = None
        self._pull: PullLoop | None = None
        self._executor: Executor | None = None
        self._tracer: Tracer = open_telemetry() if settings.consumer_traces else NoTracer()
        self._signals = 0
        self._code = 0  # how the process ends
        self._drained = False  # nothing is in hand, and the inference thread is free
        self._failure: BaseException | None = None  # of what must go on beside the serving

    @property
    def inference_busy(self) -> bool:
        """Whether the inference thread works, which nothing can end."""
        return self._inference is not None and self._inference.busy

    async def run(self) -> int:
        """Start, serve until told to stop, drain, stop; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        log.info("daemon_starting", worker=self._settings.consumer_worker)
        self._life = asyncio.create_task(self._start_and_serve(), name="life")
        try:
            return await self._life
        except asyncio.CancelledError:
            log.warning("stopped_before_drained", running=self._executor is not None)
            return self._code if self._failure is None else _exit_code(self._failure)
        except Exception as error:  # noqa: BLE001 - each of them is an exit code
            return _exit_code(error)
        finally:
            self._run_queue.close()
            log.info("daemon_stopped")

    # -- start ------------------------------------------------------------------------------------

    async def _start_and_serve(self) -> int:
        async with AsyncExitStack() as parts:
            await self._start_probes(parts)
            if isinstance(self._tracer, OpenTelemetry):
                parts.push_async_callback(asyncio.to_thread, self._tracer.close)
            runner = self._make_runner(self._settings)
            # The weights come in while the connections are made.
            inference = self._inference = InferenceWorker(
                runner, self._run_queue, on_busy=self._telemetry.device_busy
            )
            loading = inference.start()
            parts.callback(loading.cancel)
            lease_guard = await self._start_lease_guard(parts)
            deadline = time.monotonic() + CONNECT_WITHIN
            bus, endpoints = await self._connect(parts)
            artifacts = make_artifacts(self._settings, self._telemetry)
            parts.push_async_callback(artifacts.close)
            topology = make_topology(self._settings, bus)
            ensure = partial(topology.ensure, self._task)
            durable = await wait_until_available(ensure, deadline=deadline)
            # After the bus: a slow store must not take the time that the bus is waited for.
            await self._look_at_store(artifacts)
            model = await loading
            self._health.model_loaded = True
            self._telemetry.metrics.model_loaded(model.info)
            events = JetStreamEvents(
                bus, self._settings.subjects, ensure=ensure, observer=self._telemetry
            )
            names = topology.durables(self._task)
            queue = JetStreamQueue(bus, self._settings.subjects, names)
            workers = BroadcastWorkers(
                bus, self._settings.subjects, task=self._task, durables=names
            )
            warn_of_short_batches(self._settings, durable)
            executor = self._make_executor(
                durable=durable,
                model=model,
                runner=runner,
                events=events,
                queue=queue,
                workers=workers,
                artifacts=artifacts,
            )
            context = self._make_context(bus, durable, lease_guard)
            pull = PullLoop(bus, durable, ensure=ensure, context=context)
            door = make_worker_service(
                self._settings,
                endpoints=endpoints,
                queue=queue,
                workers=workers,
                events=events,
                artifacts=artifacts,
                model=model,
                check=runner.check,
                request_stop=executor.request_stop,
                is_running=executor.has_started,
                observer=self._telemetry,
            )
            # Behind the door, which asks it about the last calls.
            parts.push_async_callback(self._close_model, inference)
            self._start_background_task(self._watch_inference(inference), "watch-inference", parts)
            await door.start()
            parts.push_async_callback(door.close)
            await pull.start()
            parts.push_async_callback(pull.close)
            self._health.durable_present = lambda: pull.attached
            self._pull, self._executor = pull, executor
            self._start_background_task(
                self._watch_store(artifacts, executor, pull), "watch-store", parts
            )
            self._start_background_task(self._watch_endpoints(endpoints), "watch-endpoints", parts)
            await self._watch_advisories(topology, context, executor, parts)
            await self._watch_retries(topology, context, events, parts)
            log.info(
                "daemon_ready", worker=self._settings.consumer_worker, model=model.info.model_dump()
            )
            code = await self._serve(pull, executor)
            self._drained = code == 0
            return code

    async def _close_model(self, inference: InferenceWorker) -> None:
        if self._drained:  # else its thread may hang
            await inference.stop()

    async def _watch_inference(self, inference: InferenceWorker) -> None:
        # Its end is asked for only when this task has been cancelled.
        await asyncio.shield(inference.ended)
        raise RuntimeError("the inference thread has ended")

    async def _start_probes(self, parts: AsyncExitStack) -> None:
        port, host = self._settings.consumer_probes_port, self._settings.consumer_probes_host
        if port:
            probes = Probes(self._telemetry, host=host, port=port)
            await probes.start()
            parts.push_async_callback(probes.close)

    async def _start_lease_guard(self, parts: AsyncExitStack) -> LeaseGuard:
        lease_guard = LeaseGuard(self._settings)
        await lease_guard.start()
        parts.push_async_callback(lease_guard.close)
        return lease_guard

    def _make_context(self, bus: Bus, durable: Durable, lease_guard: LeaseGuard) -> DeliveryContext:
        marks = AttemptMarks(bus, self._settings.subjects, self._task)
        return DeliveryContext(bus, durable.ack_wait, marks, lease_guard)

    async def _connect(self, parts: AsyncExitStack) -> tuple[Bus, Bus]:
        """Open the connection for deliveries and results, and the one for the endpoints."""
        name = f"generation {self._settings.consumer_worker}"
        bus = await connect(self._settings, name=name, within=CONNECT_WITHIN)
        parts.push_async_callback(bus.close)
        endpoints = await connect_endpoints(self._settings, self._telemetry, within=CONNECT_WITHIN)
        parts.push_async_callback(endpoints.close)
        self._start_background_task(self._watch_bus(bus), "watch-bus", parts)
        self._health.bus_connected = lambda: bus.connected and endpoints.connected
        return bus, endpoints

    async def _watch_bus(self, bus: Bus) -> None:
        # While a job runs the pull loop is not asked, and a job may run for hours.
        await bus.closed.wait()
        raise ConnectionClosed

    def _make_executor(
        self,
        *,
        durable: Durable,
        model: ModelDescription,
        runner: Runner,
        events: JetStreamEvents,
        queue: JetStreamQueue,
        workers: BroadcastWorkers,
        artifacts: ObjectStoreArtifacts,
    ) -> Executor:
        settings = self._settings
        return Executor(
            worker=settings.consumer_worker,
            admission=make_admission(settings, self._task),
            limits=Limits(
                # The server's values, whoever set them: the heartbeat depends on the first, and
                # all workers of a durable must count alike.
                ack_wait=durable.ack_wait,
                max_attempts=durable.max_attempts,
                stall_timeout=settings.consumer_stall_timeout,
                retry_delay=settings.consumer_retry_delay,
            ),
            model=model,
            runner=runner,
            run_queue=self._run_queue,
            events=events,
            queue=queue,
            workers=workers,
            artifacts=artifacts,
            images=ImageCodec(
                max_bytes=settings.consumer_max_input_bytes,
                max_pixels=settings.consumer_max_input_pixels,
            ),
            observer=self._telemetry,
            prompt_in_images=settings.consumer_prompt_in_pictures,
            tracer=self._tracer,
            most_in_flight=most_in_flight(settings),
            before_exit=self._end_pulling,
        )

    async def _look_at_store(self, artifacts: ObjectStoreArtifacts) -> None:
        # A wrong secret or a missing bucket stops the start; a store that is down for a while does
        # not: the readiness says so, and the first output waits for it.
        try:
            await artifacts.probe()
        except StoreMisconfigured:
            raise
        except StoreUnavailable as error:
            log.warning("store_unavailable", reason=str(error))

    async def _watch_store(
        self, artifacts: ObjectStoreArtifacts, executor: Executor, pull: PullLoop
    ) -> None:
        while True:
            away = not self._health.store_reachable
            changed = await self._telemetry.store_changes(
                STORE_CHECK_AGAIN if away else STORE_CHECK_EVERY
            )
            # While an output is stored, its attempts tell more than a look, which a full store
            # answers as well.
            if not changed and not executor.storing:
                try:
                    await artifacts.reachable()
                except Exception as error:  # noqa: BLE001 - it must not end the daemon
                    log.warning("store_check_failed", error=type(error).__name__)
            # A worker that has lost its own way to the store leaves new requests to the others.
            needed = self._task is Task.TEXT_TO_IMAGE or executor.waits_for_store
            if not self._health.store_reachable and needed:
                pull.pause()
            else:
                pull.resume()

    async def _watch_endpoints(self, endpoints: Bus) -> None:
        await endpoints.closed.wait()
        # The worker can still store results: what runs is finished, for the next process to begin
        # with the rest.
        log.error("endpoints_lost", reason=endpoints.last_error[:200])
        self._code = self._code or EXIT_UNAVAILABLE
        self._drain()

    async def _watch_advisories(
        self,
        topology: Topology,
        context: DeliveryContext,
        executor: Executor,
        parts: AsyncExitStack,
    ) -> None:
        pull = await self._open_pull_loop(topology, topology.watcher(self._task), context, parts)
        self._start_background_task(
            self._end_exhausted(pull, context, executor), "watch-advisories", parts
        )

    async def _end_exhausted(
        self, pull: PullLoop, context: DeliveryContext, executor: Executor
    ) -> None:
        stream = self._settings.subjects.requests_stream(self._task)
        while (advisory := await pull.next()) is not None:
            try:
                delivery = await find_exhausted(context.bus, stream, advisory, context.marks)
                if delivery is not None:
                    await executor.handle_exhausted(delivery)
            except asyncio.CancelledError:
                await advisory.nak()  # else the next worker gets it when its lease is over
                raise
            if delivery is None or delivery.settled:
                await advisory.ack()
            else:
                await advisory.nak_later(ADVISORY_AGAIN)

    async def _watch_retries(
        self,
        topology: Topology,
        context: DeliveryContext,
        events: JetStreamEvents,
        parts: AsyncExitStack,
    ) -> None:
        durable = topology.retries(self._task)
        pull = await self._open_pull_loop(topology, durable, context, parts)
        mover = RetryMover(context.bus, self._task, durable, events)
        self._start_background_task(self._move_retries(pull, mover), "move-retries", parts)

    async def _move_retries(self, pull: PullLoop, mover: RetryMover) -> None:
        while (retry := await pull.next()) is not None:
            await mover.move(retry)

    async def _open_pull_loop(
        self, topology: Topology, durable: Durable, context: DeliveryContext, parts: AsyncExitStack
    ) -> PullLoop:
        """Pull from another durable than that of the requests."""
        of = durable.stream.rpartition("_")[2].lower()  # sequences of another stream
        marks = AttemptMarks(context.bus, self._settings.subjects, self._task, of=of)
        pull = PullLoop(
            context.bus,
            durable,
            ensure=partial(topology.ensure, self._task),
            context=replace(context, marks=marks),
        )
        await pull.start()
        parts.push_async_callback(pull.close)
        return pull

    def _start_background_task(
        self, work: Coroutine[Any, Any, None], name: str, parts: AsyncExitStack
    ) -> None:
        """Do something beside the serving, until the parts are taken down.

        When it raises, nobody may go on as if it were still done: the daemon ends.
        """

        def look(ended: asyncio.Task[None]) -> None:
            if not ended.cancelled() and ended.exception() is not None:
                self._failure = ended.exception()
                if self._life is not None:
                    self._cancel(self._life)

        async def end() -> None:
            await cancel_and_wait(task)

        task = asyncio.create_task(work, name=name)
        task.add_done_callback(look)
        parts.push_async_callback(end)

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
                del delivery  # its body may be a megabyte, and the next may be long in coming
                await asyncio.sleep(0)  # the task takes its place
                await executor.room()
            drained = True
        finally:
            if not drained:  # the bus is lost for good, or the process ends at once
                for task in handling:
                    task.cancel()
            await _ended(handling)
        return self._code

    async def _handle(self, delivery: JetStreamDelivery, executor: Executor) -> None:
        code = await executor.handle(delivery)
        if code is not None and not self._code:
            # What is on its way to the store may still get there; nothing more is begun.
            self._code = code
            self._health.device_lost = True
            log.error("device_lost")
            self._end_after(self._settings.consumer_drain_grace, DRAIN_STEP_TIMEOUT + FORCE_AFTER)

    async def _end_pulling(self) -> None:
        # Before the request is given back: a standing pull would bring it here again.
        if self._pull is not None and self._executor is not None:
            await self._pull.unsubscribe()
            self._executor.requeue_waiting()

    # -- drain ------------------------------------------------------------------------------------

    def _on_signal(self, number: signal.Signals) -> None:
        self._signals += 1
        log.info("signal", name=signal.Signals(number).name, times=self._signals)
        if self._executor is not None and self._signals > 1:
            self._end_after(0.0, FORCE_AFTER)
        else:
            self._drain()

    def _drain(self) -> None:
        """Take no more requests, and end once those that were begun have ended."""
        self._health.draining = True
        if self._life is None:
            return
        if self._executor is None or self._pull is None:
            self._cancel(self._life)  # still starting: nothing has been taken
            return
        self._pull.stop()
        self._executor.requeue_waiting()
        self._end_after(self._settings.consumer_drain_grace, DRAIN_STEP_TIMEOUT + FORCE_AFTER)

    def _end_after(self, grace: float, patience: float) -> None:
        if self._executor is None or self._life is None:
            return
        loop = asyncio.get_running_loop()
        loop.call_later(grace, self._executor.interrupt, StopReason.DRAIN)
        loop.call_later(grace + patience, self._cancel, self._life)

    def _cancel(self, life: asyncio.Task[int]) -> None:
        # More than once: until Python 3.12, asyncio.wait_for loses a cancellation that comes in the
        # moment in which what it waits for is done (python/cpython#86296).
        if not life.done():
            life.cancel()
            asyncio.get_running_loop().call_later(CANCEL_EVERY, self._cancel, life)


async def _ended(tasks: set[asyncio.Task[None]]) -> None:
    """Wait until tasks have ended; to cancel the waiting is to cancel them, as often as it is."""
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


def _exit_code(error: BaseException) -> int:
    match error:
        case ModelUnavailable():
            log.error("model_unavailable", reason=str(error))
            return EXIT_MODEL_LOST
        case Unavailable() | OSError():
            log.error("service_unavailable", reason=str(error))
            return EXIT_UNAVAILABLE
        case _:
            # Not foreseen. The supervisor may start a new process; what is in hand comes again.
            log.error("daemon_failed", exc_info=error)
            return EXIT_MODEL_LOST
