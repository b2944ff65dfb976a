"""The process is killed with a request in flight, before the run."""

from consumer.bus.publishing import JetStreamEvents
from tests.faults.causes.none import make_runner
from tests.support.holding import after, die_once_marked

__all__ = ["make_runner"]

after(JetStreamEvents, "find_result", die_once_marked)
