"""nats-server is killed in the moment in which it has handed the second request out."""

import os
import signal

from nats.aio.msg import Msg

from consumer.bus.delivery import Custody, JetStreamDelivery
from consumer.settings import Settings
from tests.support.holding import SERVER
from tests.support.quick_runner import QuickRunner, first_time, note

take = JetStreamDelivery.__init__


def taken(self: JetStreamDelivery, message: Msg, custody: Custody) -> None:
    if not first_time("first") and first_time("second"):
        os.kill(int(os.environ[SERVER]), signal.SIGKILL)
        note("killed", "the server")
    take(self, message, custody)


JetStreamDelivery.__init__ = taken  # type: ignore[method-assign] # that is the fault


def make_runner(_: Settings) -> QuickRunner:
    return QuickRunner()
