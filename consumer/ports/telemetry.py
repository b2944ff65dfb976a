"""Ports for traces, metrics and readiness."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from consumer.telemetry import JobReport
from generation_contracts import FailureCode


class JobTrace(Protocol):
    """The trace of one job.

    Attributes:
        trace_parent: W3C trace context for the headers of everything that the job publishes.
    """

    trace_parent: str | None

    def end(self, *, outcome: str, queued: float, stages: "Iterable[Stage]") -> None:
        """Record the end of the job.

        Args:
            outcome: As in `JobReport`.
            queued: Seconds from the storing of the request to its delivery.
            stages: The stages of the job with their times.
        """


class Tracer(Protocol):
    """Creates traces. No method raises or blocks."""

    def begin(
        self, *, trace_parent: str | None, began: int, attributes: Mapping[str, str | int]
    ) -> JobTrace:
        """Begin the trace of a job.

        Args:
            trace_parent: W3C trace context of the sender.
            began: When the stream stored the request, in nanoseconds since the epoch.
            attributes: Attributes of the trace.
        """


@dataclass(frozen=True)
class Stage:
    """Begin and end of one stage of a job, in nanoseconds since the epoch."""

    name: str
    began: int
    ended: int


@dataclass
class PropagatedTrace:
    """Passes the trace context of the sender on unchanged, and records nothing."""

    trace_parent: str | None

    def end(self, *, outcome: str, queued: float, stages: "Iterable[Stage]") -> None:
        """Record nothing."""


class NoTracer:
    """Tracer for a process without the tracing extra, or with tracing disabled."""

    def begin(
        self,
        *,
        trace_parent: str | None,
        began: int,  # noqa: ARG002 - the port's
        attributes: Mapping[str, str | int],  # noqa: ARG002 - the port's
    ) -> JobTrace:
        """Return a trace that only passes the sender's context on."""
        return PropagatedTrace(trace_parent)


class Observer(Protocol):
    """Receives what the daemon does. No method raises or blocks."""

    def job_started(self) -> None:
        """Record that a delivery is in progress."""

    def job_finished(self, report: JobReport) -> None:
        """Record that a delivery is settled or requeued."""

    def chain_broken(self, code: FailureCode) -> None:
        """Record that the next step of a chain could not be queued; no job reports that failure."""

    def call_refused(self, code: FailureCode) -> None:
        """Record that the request-reply endpoint has refused a call."""

    def device_stepped(self) -> None:
        """Record that the current run has made a step or produced text."""

    def device_busy(self, seconds: float) -> None:
        """Record the duration of a run on the device that has ended."""

    def store_reachable(self, reachable: bool, reason: str = "") -> None:
        """Record whether the store has answered."""

    def bus_writable(self, writable: bool, reason: str = "") -> None:
        """Record whether JetStream stores what is published."""
