"""OpenTelemetry traces of jobs; needs the extra `traces` and CONSUMER_TRACES.

The span of a job starts when the stream stored its request, and is the parent of the spans of its
stages. Its context is published with the events and with the next requests of a chain. Spans of
stages are created at the end of the job from the recorded times, so tracing adds no work to a run.
"""

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from consumer.ports.telemetry import Stage
from consumer.settings import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SERVICE_NAME = "generation-consumer"  # default of OTEL_SERVICE_NAME
FLUSH_TIMEOUT_MS = 3_000  # milliseconds, at the end of the process


class JobTrace:
    """The trace of one job; implements `consumer.ports.telemetry.JobTrace`.

    Attributes:
        trace_parent: The W3C `traceparent` header of every message that the job publishes.
    """

    def __init__(self, tracer: Any, span: "Span", began: int) -> None:
        context = span.get_span_context()
        flags = int(context.trace_flags)
        self.trace_parent: str | None = (
            f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"
        )
        self._tracer = tracer
        self._span = span
        self._began = began

    def end(self, *, outcome: str, queued: float, stages: Iterable[Stage]) -> None:
        """Export the job's span and its stages."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        within = set_span_in_context(self._span)
        waited = Stage("queue", self._began, self._began + round(queued * 1_000_000_000))
        for stage in (waited, *stages):
            span = self._tracer.start_span(stage.name, within, start_time=stage.began)
            span.end(max(stage.ended, stage.began))
        self._span.set_attribute("generation.outcome", outcome)
        if outcome not in _NOT_ERRORS:
            self._span.set_status(Status(StatusCode.ERROR, outcome))
        self._span.end()


# Outcomes that do not set the span's status to error.
_NOT_ERRORS = frozenset({"succeeded", "cancelled", "already_done", "requeued"})


class OpenTelemetry:
    """Exports to an OTLP endpoint over HTTP; implements `consumer.ports.telemetry.Tracer`.

    OpenTelemetry's own variables configure the export: OTEL_EXPORTER_OTLP_ENDPOINT and others.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("consumer")

    def begin(
        self, *, trace_parent: str | None, began: int, attributes: Mapping[str, str | int]
    ) -> JobTrace:
        """Start the span of a job.

        Args:
            trace_parent: The sender's `traceparent` header, if the request has one.
            began: Time at which the stream stored the request, in nanoseconds since the epoch.
            attributes: Attributes of the span.
        """
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {} if trace_parent is None else {"traceparent": trace_parent}
        span = self._tracer.start_span(
            f"generation {attributes['generation.task']}",
            TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            start_time=began,
        )
        return JobTrace(self._tracer, span, began)

    def close(self) -> None:
        """Export the remaining spans; blocks for up to `FLUSH_TIMEOUT_MS`."""
        self._provider.force_flush(FLUSH_TIMEOUT_MS)
        self._provider.shutdown()


def open_telemetry() -> OpenTelemetry:
    """Return an exporter that is configured by OpenTelemetry's environment variables.

    Raises:
        SettingsError: The extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise SettingsError("CONSUMER_TRACES: needs the extra `traces`") from None
    os.environ.setdefault("OTEL_SERVICE_NAME", SERVICE_NAME)
    provider = TracerProvider(resource=Resource.create())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OpenTelemetry(provider)
