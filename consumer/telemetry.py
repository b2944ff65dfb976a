"""Logs and metrics: structlog set up once, and the Prometheus metrics of one daemon.

Other parts tell what happened through plain values (`JobReport`); nothing here reads a prompt, a
secret or a presigned URL, so none can get into a log or a label.
"""

import logging
import sys
from dataclasses import dataclass
from typing import Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Seconds; a demonstration picture takes 0.2, a large model on a small card minutes.
_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class JobReport:
    """One finished job, for metrics and the log.

    Attributes:
        outcome: `succeeded`, a failure code, `cancelled`, `already_done`, `given_back` or
            `abandoned`.
        attempt: How often the request has been delivered.
    """

    outcome: str
    attempt: int
    queued: float = 0.0  # seconds
    inference: float = 0.0  # seconds
    encode: float = 0.0  # seconds
    upload: float = 0.0  # seconds


def configure_logging(log_format: Literal["json", "console"], level: str) -> None:
    """Set up structlog for the process: one JSON object a line on standard error, or for people."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks without the frames' variables: those are prompts and secrets, and looking at them
    # makes a cycle of the frame and its exception that keeps a run's tensors.
    tracebacks = structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    )
    render: list[structlog.typing.Processor] = (
        [tracebacks, structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    )
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # What the libraries say by the standard logging: warnings and above, in the same form.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)


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
