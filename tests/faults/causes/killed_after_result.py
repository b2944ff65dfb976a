"""The process is killed after it stores a result, and before the reply and the acknowledgement."""

from consumer.bus.publishing import JetStreamEvents
from tests.faults.causes.none import make_runner
from tests.support.holding import after, die_once_marked

__all__ = ["make_runner"]

after(JetStreamEvents, "publish_result", die_once_marked)
