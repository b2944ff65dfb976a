"""The process is killed after it stores a dead letter, and before the failed event."""

from consumer.bus.publishing import JetStreamEvents
from tests.faults.causes.none import make_runner
from tests.support.holding import after, die_once_marked

__all__ = ["make_runner"]

after(JetStreamEvents, "dead_letter", die_once_marked)
