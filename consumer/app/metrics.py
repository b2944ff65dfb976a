"""The Prometheus metrics of one daemon.

Whoever only sends requests never imports this: prometheus-client brings an HTTP server with it.
"""

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from consumer.media.provenance import SOFTWARE
from consumer.telemetry import JobReport, LogStream
from generation_contracts import FailureCode, ModelInfo

# Seconds; a demonstration picture takes 0.2, a large model on a small card minutes, and a request
# in a long queue, or an output that waits for its store, hours.
_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400)

# What a job's report says beside the failure codes.
_NO_FAILURES = ("succeeded", "cancelled", "already_done", "given_back", "abandoned")

# What the front door may say of a call; see `consumer.endpoints.worker_service`.
_REFUSED = (
    FailureCode.INVALID_REQUEST,
    FailureCode.UNSUPPORTED_PARAMETER,
    FailureCode.DEADLINE_EXCEEDED,
    FailureCode.QUEUE_FULL,
    FailureCode.INTERNAL,
)

# Why the next step of a chain may not be queued; see `consumer.jobs.chain_continuation`.
_BREAKS = (FailureCode.INVALID_REQUEST, FailureCode.QUEUE_FULL, FailureCode.INTERNAL)

# What puts a request aside; see the table in `consumer.jobs.outcomes`.
_DEAD_LETTERED = (
    FailureCode.INVALID_REQUEST,
    FailureCode.MODEL_ERROR,
    FailureCode.WORKER_LOST,
    FailureCode.INTERNAL,
)


class Metrics:
    """The metrics of one daemon, in a registry of its own.

    Every series is made here and not when it is first counted: an increase from nothing to 1 is
    none to Prometheus, so the first failure would be missed. It also spares each job the looking
    up of labels.
    """

    def __init__(self, task: str) -> None:
        self.registry = CollectorRegistry()
        self._task = task

        def histogram(name: str, text: str) -> Histogram:
            made = Histogram(name, text, ["task"], registry=self.registry, buckets=_BUCKETS)
            return made.labels(task)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["task"], registry=self.registry).labels(task)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["task"], registry=self.registry).labels(task)

        def kinds(name: str, text: str, label: str, known: Iterable[str]) -> _Kinds:
            made = Counter(name, text, ["task", label], registry=self.registry)
            return _Kinds(made, task, tuple(map(str, known)))

        self._jobs = kinds(
            "generation_jobs",
            "Deliveries handled, by outcome",
            "outcome",
            (*_NO_FAILURES, *FailureCode),
        )
        self._failures = kinds(
            "generation_failures",
            "Requests that ended as failed, by failure code",
            "code",
            FailureCode,
        )
        self._dead_letters = kinds(
            "generation_dead_letters",
            "Requests put aside as dead letters, by failure code",
            "code",
            _DEAD_LETTERED,
        )
        self._refused_calls = kinds(
            "generation_refused_calls",
            "Calls that were refused at the front door, by failure code",
            "code",
            _REFUSED,
        )
        self._broken_chains = kinds(
            "generation_broken_chains",
            "Chains that ended at a step that could not be queued, by failure code",
            "code",
            _BREAKS,
        )
        self._redelivered = counter(
            "generation_redelivered_jobs", "Deliveries that were not the first of their request"
        )
        self._stages = {
            "queued": histogram("generation_queue_wait_seconds", "From stored to started"),
            "inference": histogram("generation_inference_seconds", "The model's run"),
            "encode": histogram("generation_encode_seconds", "Encoding the outputs"),
            "upload": histogram("generation_upload_seconds", "Storing the outputs"),
        }
        self._in_flight = gauge("generation_jobs_in_flight", "Deliveries in hand")
        self._device_busy = counter(
            "generation_device_busy_seconds",
            "Time that the device has worked, counted at the end of each run",
        )
        self._last_step = gauge(
            "generation_last_step_timestamp_seconds",
            "When a run last came to a new step, more text or its end; 0 before the first",
        )
        self._store_up = gauge("generation_store_reachable", "1 while the store answers")
        self._store_failures = counter(
            "generation_store_failures", "Tries that the store did not answer or refused"
        )
        self._conditions = Gauge(
            "generation_ready_condition",
            "1 while a condition of readiness holds",
            ["task", "condition"],
            registry=self.registry,
        )
        self._model = Info(
            "generation_model", "The model that is loaded", ["task"], registry=self.registry
        )
        build = Info("generation_build", "The daemon", ["task"], registry=self.registry)
        build.labels(task).info({"version": version(SOFTWARE)})
        self.registry.register(_LostLogLines(task))
        ProcessCollector(registry=self.registry)

    def job_started(self) -> None:
        """A delivery is in hand."""
        self._in_flight.inc()

    def job_finished(self, report: JobReport) -> None:
        """A delivery is settled, given back or abandoned."""
        self._in_flight.dec()
        self._jobs.count(report.outcome)
        if report.outcome not in _NO_FAILURES:
            self._failures.count(report.outcome)
        if report.dead_letter:
            self._dead_letters.count(report.outcome)
        if report.attempt > 1:
            self._redelivered.inc()
        for stage, metric in self._stages.items():
            seconds = getattr(report, stage)
            if seconds > 0:
                metric.observe(seconds)

    def chain_broken(self, code: FailureCode) -> None:
        """A chain has ended at a step that could not be queued."""
        self._broken_chains.count(str(code))

    def device_stepped(self) -> None:
        """The run under way has come to a new step, or to more text."""
        self._last_step.set_to_current_time()

    def device_busy(self, seconds: float) -> None:
        """A run has ended, in which the device worked for so long."""
        self._device_busy.inc(seconds)
        self._last_step.set_to_current_time()

    def call_refused(self, code: FailureCode) -> None:
        """The front door has refused a call."""
        self._refused_calls.count(str(code))

    def store_reachable(self, reachable: bool, reason: str = "") -> None:  # noqa: ARG002 - Observer's
        """The store has answered, or not."""
        self._store_up.set(reachable)
        if not reachable:
            self._store_failures.inc()

    def model_loaded(self, model: ModelInfo) -> None:
        """This model is what jobs run on."""
        said = model.model_dump(exclude_none=True)
        self._model.labels(self._task).info({name: str(value) for name, value in said.items()})

    def readiness(self, conditions: Mapping[str, str | None]) -> None:
        """Set what readiness depends on: None, or why a condition does not hold."""
        for condition, reason in conditions.items():
            self._conditions.labels(self._task, condition).set(reason is None)


class _LostLogLines(Collector):
    """Shows how many log lines could not be written."""

    def __init__(self, task: str) -> None:
        self._task = task

    def collect(self) -> Iterator[Metric]:
        """The one counter."""
        counter = CounterMetricFamily(
            "generation_lost_log_lines",
            "Log lines that could not be written: no reader, a full disk or a full pipe",
            labels=["task"],
        )
        counter.add_metric([self._task], LogStream.lost_lines)
        yield counter


class _Kinds:
    """A counter of one task with a label of its own for the kind of what is counted.

    Args:
        counter: With the labels `task` and the kind.
        task: The value of the first.
        kinds: Shown from the start, at 0.
    """

    def __init__(self, counter: Counter, task: str, kinds: tuple[str, ...]) -> None:
        self._counter = counter
        self._task = task
        self._known = {kind: counter.labels(task, kind) for kind in kinds}

    def count(self, kind: str) -> None:
        """One more."""
        known = self._known.get(kind)
        (self._counter.labels(self._task, kind) if known is None else known).inc()
