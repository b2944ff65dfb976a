"""The Prometheus metrics of one daemon.

Whoever only sends requests never imports this: prometheus-client brings an HTTP server with it.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from consumer.telemetry import JobReport

# Seconds; a demonstration picture takes 0.2, a large model on a small card minutes.
_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one daemon, in a registry of its own."""

    def __init__(self, task: str) -> None:
        self.registry = CollectorRegistry()
        self._task = task

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, ["task"], registry=self.registry, buckets=_BUCKETS)

        self._jobs = Counter(
            "generation_jobs",
            "Deliveries handled, by outcome",
            ["task", "outcome"],
            registry=self.registry,
        )
        self._redelivered = Counter(
            "generation_redelivered_jobs",
            "Deliveries that were not the first of their request",
            ["task"],
            registry=self.registry,
        )
        self._stages = {
            "queued": histogram("generation_queue_wait_seconds", "From stored to started"),
            "inference": histogram("generation_inference_seconds", "The model's run"),
            "encode": histogram("generation_encode_seconds", "Encoding the outputs"),
            "upload": histogram("generation_upload_seconds", "Storing the outputs"),
        }
        self._in_flight = Gauge(
            "generation_jobs_in_flight", "Deliveries in hand", ["task"], registry=self.registry
        )
        self._device_busy = Counter(
            "generation_device_busy_seconds",
            "Time that the device has worked",
            ["task"],
            registry=self.registry,
        )
        self._store_up = Gauge(
            "generation_store_reachable",
            "1 while the store answers",
            ["task"],
            registry=self.registry,
        )
        self._store_failures = Counter(
            "generation_store_failures",
            "Tries that the store did not answer or refused",
            ["task"],
            registry=self.registry,
        )

    def job_started(self) -> None:
        """A delivery is in hand."""
        self._in_flight.labels(self._task).inc()

    def job_finished(self, report: JobReport) -> None:
        """A delivery is settled, given back or abandoned."""
        self._in_flight.labels(self._task).dec()
        self._jobs.labels(self._task, report.outcome).inc()
        if report.attempt > 1:
            self._redelivered.labels(self._task).inc()
        for stage, metric in self._stages.items():
            seconds = getattr(report, stage)
            if seconds > 0:
                metric.labels(self._task).observe(seconds)

    def device_busy(self, seconds: float) -> None:
        """The device has worked for so long."""
        self._device_busy.labels(self._task).inc(seconds)

    def store_reachable(self, reachable: bool, reason: str = "") -> None:  # noqa: ARG002 - Observer's
        """The store has answered, or not."""
        self._store_up.labels(self._task).set(reachable)
        if not reachable:
            self._store_failures.labels(self._task).inc()
