"""The Prometheus metrics of one gateway.

A label never has a path, an id, a key or a tenant: routes are templates, and methods, statuses and
codes are few.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from consumer.media.provenance import SOFTWARE
from consumer.telemetry import LogStream

# Seconds. A page takes one millisecond, an image in a long queue hours.
_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

# Codes of error answers. They are shown from the start, at 0: an increase from nothing to 1 is none
# to Prometheus, so the first refusal would be missed.
_REASONS = (
    "bound_exceeded",
    "gateway_busy",
    "gateway_stopping",
    "idempotency_key_reused",
    "invalid_api_key",
    "invalid_request",
    "model_not_found",
    "not_found",
    "queue_full",
    "rate_limit_exceeded",
    "request_timeout",
    "request_too_large",
    "too_many_waiting",
    "unavailable",
)


class GatewayMetrics:
    """The metrics of one gateway, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "generation_gateway_requests",
            "HTTP requests that have ended, by route and status",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "generation_gateway_request_seconds",
            "From the beginning of a request to the end of its answer; streams included",
            ["route"],
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self._in_flight = Gauge(
            "generation_gateway_requests_in_flight",
            "HTTP requests that are in progress, streams included",
            registry=self.registry,
        )
        self._streams = Gauge(
            "generation_gateway_streams",
            "Streams of events that clients read now",
            registry=self.registry,
        )
        self._events = Gauge(
            "generation_gateway_event_log_bytes",
            "Events that are kept so that streams can be resumed",
            registry=self.registry,
        )
        self._refused = Counter(
            "generation_gateway_refused",
            "Requests that were answered with an error, by its code",
            ["reason"],
            registry=self.registry,
        )
        for reason in _REASONS:
            self._refused.labels(reason)
        self._conditions = Gauge(
            "generation_gateway_ready_condition",
            "1 while a condition of readiness holds",
            ["condition"],
            registry=self.registry,
        )
        build = Info("generation_gateway_build", "The gateway", registry=self.registry)
        build.info({"version": version(SOFTWARE)})
        self.registry.register(_LostLogLines())
        ProcessCollector(registry=self.registry)

    def request_ended(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request.

        Args:
            method: Of HTTP; any text.
            route: The template of its path.
            status: 499 where the client went away before the answer.
            seconds: To the end of the answer.
        """
        known = method if method in _METHODS else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def refused(self, reason: str) -> None:
        """Count an error answer by its code."""
        self._refused.labels(reason).inc()

    def exposition(
        self,
        *,
        requests: int,
        streams: int,
        event_bytes: int,
        conditions: Mapping[str, str | None],
    ) -> bytes:
        """Return all metrics as Prometheus text.

        Args:
            requests: In progress now.
            streams: Of these, the streams of events.
            event_bytes: Of the events that are kept.
            conditions: Why a condition of readiness does not hold; None: it holds.
        """
        self._in_flight.set(requests)
        self._streams.set(streams)
        self._events.set(event_bytes)
        for condition, reason in conditions.items():
            self._conditions.labels(condition).set(reason is None)
        return generate_latest(self.registry)


class _LostLogLines(Collector):
    """Shows how many log lines could not be written."""

    def collect(self) -> Iterator[Metric]:
        """Yield the one counter."""
        yield CounterMetricFamily(
            "generation_gateway_lost_log_lines",
            "Log lines that could not be written: no reader, a full disk or a full pipe",
            value=LogStream.lost_lines,
        )
