"""The Prometheus metrics of one gateway.

No label contains a path, an id, a key or a tenant. Routes are templates, and there are few methods,
statuses and codes.
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

from consumer.media.ai_mark import SOFTWARE
from consumer.telemetry import LogStream

# Seconds. A page takes 1 ms; an image in a long queue takes hours.
_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

# Codes of error responses. Their series start at 0: Prometheus sees no increase when a series
# appears with the value 1, so it would miss the first error.
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
            "Finished HTTP requests, by method, route and status",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "generation_gateway_request_seconds",
            "Time from the start of a request to the end of its response, including streams",
            ["route"],
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self._in_flight = Gauge(
            "generation_gateway_requests_in_flight",
            "HTTP requests in progress, including streams",
            registry=self.registry,
        )
        self._streams = Gauge(
            "generation_gateway_streams",
            "Open event streams",
            registry=self.registry,
        )
        self._events = Gauge(
            "generation_gateway_event_log_bytes",
            "Size of the events that are kept to resume streams",
            registry=self.registry,
        )
        self._refused = Counter(
            "generation_gateway_refused",
            "Error responses, by error code",
            ["reason"],
            registry=self.registry,
        )
        for reason in _REASONS:
            self._refused.labels(reason)
        self._conditions = Gauge(
            "generation_gateway_ready_condition",
            "1 while a readiness condition is met",
            ["condition"],
            registry=self.registry,
        )
        build = Info("generation_gateway_build", "The version", registry=self.registry)
        build.info({"version": version(SOFTWARE)})
        self.registry.register(_LostLogLines())
        ProcessCollector(registry=self.registry)

    def request_ended(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request.

        Args:
            method: HTTP method; may be any text.
            route: Template of the path.
            status: HTTP status; 499 if the client disconnected before the response.
            seconds: Time to the end of the response.
        """
        known = method if method in _METHODS else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def refused(self, reason: str) -> None:
        """Count an error response by its code."""
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
            requests: Number of requests in progress.
            streams: Number of open event streams.
            event_bytes: Bytes of the kept events.
            conditions: Readiness conditions: None, or the reason why a condition is not met.
        """
        self._in_flight.set(requests)
        self._streams.set(streams)
        self._events.set(event_bytes)
        for condition, reason in conditions.items():
            self._conditions.labels(condition).set(reason is None)
        return generate_latest(self.registry)


class _LostLogLines(Collector):
    """Collects the number of lost log lines at each scrape."""

    def collect(self) -> Iterator[Metric]:
        """Yield the counter."""
        yield CounterMetricFamily(
            "generation_gateway_lost_log_lines",
            "Log lines that could not be written: closed pipe, full pipe or full disk",
            value=LogStream.lost_lines,
        )
