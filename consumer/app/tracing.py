"""Traces: OpenTelemetry spans of jobs, where the extra `traces` is installed and turned on.

A job's span begins when the stream took its request and is the parent of its stages; its context
goes out with the events and the next requests of a chain. The stages are known with their times at
the job's end and become spans then: while a job runs, nothing is measured for a trace.
"""

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from consumer.ports.telemetry import Stage
from consumer.settings import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SERVICE_NAME = "generation-consumer"  # unless OTEL_SERVICE_NAME says otherwise
FLUSH_WITHIN = 3_000  # milliseconds at the end of the process


class JobTrace:
    """The trace of one job; implements `consumer.ports.telemetry.JobTrace`.

    Attributes:
        trace_parent: What goes out with everything that the job publishes.
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
        if outcome not in _FINE:
            self._span.set_status(Status(StatusCode.ERROR, outcome))
        self._span.end()


# What is no failure of anybody's.
_FINE = frozenset({"succeeded", "cancelled", "already_done", "given_back"})


class OpenTelemetry:
    """Exports to an OTLP endpoint over HTTP; implements `consumer.ports.telemetry.Tracer`.

    Where to is said by OpenTelemetry's own variables: OTEL_EXPORTER_OTLP_ENDPOINT and the others.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("consumer")

    def begin(
        self, *, trace_parent: str | None, began: int, attributes: Mapping[str, str | int]
    ) -> JobTrace:
        """Open the span of a job.

        Args:
            trace_parent: The sender's context, if it has one.
            began: When the stream took the request, nanoseconds since the epoch.
            attributes: Of the span.
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
        """Export what is left; blocks for a moment."""
        self._provider.force_flush(FLUSH_WITHIN)
        self._provider.shutdown()


def open_telemetry() -> OpenTelemetry:
    """The exporter that OpenTelemetry's variables describe.

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
