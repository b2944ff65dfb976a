"""The process is killed when its result is stored, before it replies and acknowledges."""

from consumer.bus.publishing import JetStreamEvents
from tests.faults.causes.none import make_runner
from tests.support.holding import after, die_once_marked

__all__ = ["make_runner"]

after(JetStreamEvents, "publish_result", die_once_marked)
