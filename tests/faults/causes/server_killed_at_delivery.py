"""nats-server is killed immediately after the delivery of the second request."""

import os
import signal

from nats.aio.msg import Msg

from consumer.bus.delivery import DeliveryContext, JetStreamDelivery
from consumer.settings import Settings
from tests.support.holding import SERVER
from tests.support.quick_runner import QuickRunner, first_time, note

original_init = JetStreamDelivery.__init__


def kill_server_at_second_delivery(
    self: JetStreamDelivery, message: Msg, context: DeliveryContext
) -> None:
    if not first_time("first") and first_time("second"):
        os.kill(int(os.environ[SERVER]), signal.SIGKILL)
        note("killed", "the server")
    original_init(self, message, context)


JetStreamDelivery.__init__ = kill_server_at_second_delivery  # type: ignore[method-assign] # that is the fault


def make_runner(_: Settings) -> QuickRunner:
    return QuickRunner()
