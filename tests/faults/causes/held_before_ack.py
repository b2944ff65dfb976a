"""The first job waits before its acknowledgement."""

import asyncio

from consumer.bus.delivery import JetStreamDelivery
from consumer.settings import Settings
from tests.support.holding import hold_once
from tests.support.quick_runner import QuickRunner

ack = JetStreamDelivery.ack


async def hold_before_ack(self: JetStreamDelivery) -> None:
    await asyncio.to_thread(hold_once, "ack")
    await ack(self)


JetStreamDelivery.ack = hold_before_ack  # type: ignore[method-assign] # that is the fault


def make_runner(_: Settings) -> QuickRunner:
    return QuickRunner()
