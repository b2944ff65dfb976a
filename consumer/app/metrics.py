"""The Prometheus metrics of one daemon.

Commands that only send requests do not import this module: prometheus-client loads an HTTP server.
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

from consumer.media.ai_mark import SOFTWARE
from consumer.telemetry import JobReport, LogStream
from generation_contracts import FailureCode, ModelInfo

# Seconds. An image of the demonstration model takes 0.2 s, a large model on a small GPU minutes.
# A request in a long queue, or an output that waits for the store, takes hours.
_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400)

_LABELS = ("task", "queue")  # of every series

# The outcomes of `JobReport` that are not failure codes.
_NO_FAILURES = ("succeeded", "cancelled", "already_done", "requeued", "abandoned")

# The failure codes of refused calls; see `consumer.endpoints.worker_service`.
_REFUSED = (
    FailureCode.INVALID_REQUEST,
    FailureCode.UNSUPPORTED_PARAMETER,
    FailureCode.DEADLINE_EXCEEDED,
    FailureCode.QUEUE_FULL,
    FailureCode.INTERNAL,
)

# The failure codes of a next step that cannot be queued; see `consumer.jobs.chain_continuation`.
_BREAKS = (
    FailureCode.INVALID_REQUEST,
    FailureCode.UNSUPPORTED_PARAMETER,
    FailureCode.QUEUE_FULL,
    FailureCode.INTERNAL,
)

# The failure codes with a dead letter; see the table in `consumer.jobs.outcomes`.
_DEAD_LETTERED = (
    FailureCode.INVALID_REQUEST,
    FailureCode.MODEL_ERROR,
    FailureCode.WORKER_LOST,
    FailureCode.INTERNAL,
)


class Metrics:
    """The metrics of one daemon, in a separate registry.

    Every time series is created here and not at its first increment. Prometheus sees no increase
    when a series appears with the value 1, so it would miss the first failure. Jobs also need no
    label lookup.

    Args:
        task: Task of the daemon.
        queue: Queue of the daemon; empty: the default queue of the task.
    """

    def __init__(self, task: str, queue: str = "") -> None:
        self.registry = CollectorRegistry()
        self._labels = own = (task, queue or task)

        def histogram(name: str, text: str) -> Histogram:
            metric = Histogram(name, text, _LABELS, registry=self.registry, buckets=_BUCKETS)
            return metric.labels(*own)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, _LABELS, registry=self.registry).labels(*own)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, _LABELS, registry=self.registry).labels(*own)

        def labelled(name: str, text: str, label: str, values: Iterable[str]) -> _LabelledCounter:
            metric = Counter(name, text, [*_LABELS, label], registry=self.registry)
            return _LabelledCounter(metric, own, tuple(map(str, values)))

        self._jobs = labelled(
            "generation_jobs",
            "Deliveries handled, by outcome",
            "outcome",
            (*_NO_FAILURES, *FailureCode),
        )
        self._failures = labelled(
            "generation_failures",
            "Failed requests, by failure code",
            "code",
            FailureCode,
        )
        self._dead_letters = labelled(
            "generation_dead_letters",
            "Requests stored as dead letters, by failure code",
            "code",
            _DEAD_LETTERED,
        )
        self._refused_calls = labelled(
            "generation_refused_calls",
            "Calls refused by the request-reply endpoint, by failure code",
            "code",
            _REFUSED,
        )
        self._broken_chains = labelled(
            "generation_broken_chains",
            "Chains whose next step could not be queued, by failure code",
            "code",
            _BREAKS,
        )
        self._redelivered = counter(
            "generation_redelivered_jobs", "Redeliveries: deliveries after the first of a request"
        )
        self._unsigned = counter(
            "generation_unsigned_images", "Images that should be signed and could not be signed"
        )
        self._stages = {
            "queued": histogram(
                "generation_queue_wait_seconds", "Time from stored in the stream to started"
            ),
            "inference": histogram("generation_inference_seconds", "Time to run the model"),
            "encode": histogram("generation_encode_seconds", "Time to encode the outputs"),
            "upload": histogram("generation_upload_seconds", "Time to upload the outputs"),
        }
        self._in_flight = gauge("generation_jobs_in_flight", "Deliveries in flight")
        self._device_busy = counter(
            "generation_device_busy_seconds",
            "Time in which the device was busy, added at the end of each run",
        )
        self._last_step = gauge(
            "generation_last_step_timestamp_seconds",
            "Time of the last step, text token or end of a run; 0 before the first",
        )
        self._store_up = gauge("generation_store_reachable", "1 while the store is reachable")
        self._store_failures = counter(
            "generation_store_failures", "Calls to the store that failed or were refused"
        )
        self._conditions = Gauge(
            "generation_ready_condition",
            "1 while a readiness condition is met",
            [*_LABELS, "condition"],
            registry=self.registry,
        )
        self._model = Info("generation_model", "The loaded model", _LABELS, registry=self.registry)
        build = Info("generation_build", "The version", _LABELS, registry=self.registry)
        build.labels(*own).info({"version": version(SOFTWARE)})
        self.registry.register(_LostLogLines(own))
        ProcessCollector(registry=self.registry)

    def job_started(self) -> None:
        """Report that a delivery is in flight."""
        self._in_flight.inc()

    def job_finished(self, report: JobReport) -> None:
        """Report that a delivery is settled, requeued or abandoned."""
        self._in_flight.dec()
        self._jobs.count(report.outcome)
        if report.outcome not in _NO_FAILURES:
            self._failures.count(report.outcome)
        if report.dead_letter:
            self._dead_letters.count(report.outcome)
        if report.attempt > 1:
            self._redelivered.inc()
        self._unsigned.inc(report.unsigned)
        for stage, metric in self._stages.items():
            seconds = getattr(report, stage)
            if seconds > 0:
                metric.observe(seconds)

    def chain_broken(self, code: FailureCode) -> None:
        """Report that the next step of a chain could not be queued."""
        self._broken_chains.count(str(code))

    def device_stepped(self) -> None:
        """Report that the current run has made a step or generated text."""
        self._last_step.set_to_current_time()

    def device_busy(self, seconds: float) -> None:
        """Report that a run has ended, and the seconds in which the device was busy."""
        self._device_busy.inc(seconds)
        self._last_step.set_to_current_time()

    def call_refused(self, code: FailureCode) -> None:
        """Report that a request-reply call was refused."""
        self._refused_calls.count(str(code))

    def store_reachable(self, reachable: bool, reason: str = "") -> None:  # noqa: ARG002 - Observer's
        """Report whether the store is reachable."""
        self._store_up.set(reachable)
        if not reachable:
            self._store_failures.inc()

    def model_loaded(self, model: ModelInfo) -> None:
        """Set the labels of the loaded model."""
        self._model.labels(*self._labels).info(model.labels())

    def readiness(self, conditions: Mapping[str, str | None]) -> None:
        """Set the readiness conditions: None, or the reason why a condition is not met."""
        for condition, reason in conditions.items():
            self._conditions.labels(*self._labels, condition).set(reason is None)


class _LostLogLines(Collector):
    """Collects the number of lost log lines at each scrape."""

    def __init__(self, labels: tuple[str, str]) -> None:
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        """Yield the counter."""
        counter = CounterMetricFamily(
            "generation_lost_log_lines",
            "Log lines that could not be written: closed pipe, full pipe or full disk",
            labels=_LABELS,
        )
        counter.add_metric(self._labels, LogStream.lost_lines)
        yield counter


class _LabelledCounter:
    """A counter of one daemon with one more label.

    Args:
        counter: The metric, with the labels of the daemon and one more.
        own: The values of the labels of the daemon.
        values: Values of the last label that are exported from the start, as 0.
    """

    def __init__(self, counter: Counter, own: tuple[str, str], values: tuple[str, ...]) -> None:
        self._counter = counter
        self._own = own
        self._known = {value: counter.labels(*own, value) for value in values}

    def count(self, value: str) -> None:
        """Add one to the series of a label value."""
        known = self._known.get(value)
        (self._counter.labels(*self._own, value) if known is None else known).inc()
