"""Ports of what is observed: traces, metrics and readiness."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from consumer.telemetry import JobReport
from generation_contracts import FailureCode


class JobTrace(Protocol):
    """The trace of one job.

    Attributes:
        trace_parent: What goes out with everything that the job publishes: W3C trace context.
    """

    trace_parent: str | None

    def end(self, *, outcome: str, queued: float, stages: "Iterable[Stage]") -> None:
        """The job has come to its end.

        Args:
            outcome: As in `JobReport`.
            queued: Seconds from stored to taken.
            stages: Where the time went.
        """


class Tracer(Protocol):
    """Where traces go; nothing of it raises or waits."""

    def begin(
        self, *, trace_parent: str | None, began: int, attributes: Mapping[str, str | int]
    ) -> JobTrace:
        """A job has begun.

        Args:
            trace_parent: The sender's.
            began: When the stream took the request, nanoseconds since the epoch.
            attributes: What it is about.
        """


@dataclass(frozen=True)
class Stage:
    """When a stage of a job began and ended, in nanoseconds since the epoch."""

    name: str
    began: int
    ended: int


@dataclass
class PassedOn:
    """A trace that nobody keeps here: the sender's context goes out as it came."""

    trace_parent: str | None

    def end(self, *, outcome: str, queued: float, stages: "Iterable[Stage]") -> None:
        """Nothing is kept."""


class NoTracer:
    """Without the extra, or turned off."""

    def begin(
        self,
        *,
        trace_parent: str | None,
        began: int,  # noqa: ARG002 - the port's
        attributes: Mapping[str, str | int],  # noqa: ARG002 - the port's
    ) -> JobTrace:
        """Pass the sender's context on."""
        return PassedOn(trace_parent)


class Observer(Protocol):
    """Told what the daemon does; it never raises and never blocks."""

    def job_started(self) -> None:
        """A delivery is in hand."""

    def job_finished(self, report: JobReport) -> None:
        """A delivery is settled or given back."""

    def chain_broken(self, code: FailureCode) -> None:
        """A chain has ended at a step that could not be queued: it is no job, and no job's end."""

    def call_refused(self, code: FailureCode) -> None:
        """The front door has refused a call."""

    def device_stepped(self) -> None:
        """The run under way has come to a new step, or to more text."""

    def device_busy(self, seconds: float) -> None:
        """A run has ended, in which the device worked for so long."""

    def store_reachable(self, reachable: bool, reason: str = "") -> None:
        """The store has answered, or not."""

    def bus_writable(self, writable: bool, reason: str = "") -> None:
        """JetStream has taken what was published, or refuses it."""
