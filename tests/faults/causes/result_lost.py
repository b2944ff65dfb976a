"""The first result is lost on its way to the server."""

import asyncio
from typing import Any

from nats.errors import TimeoutError as BusTimeout
from nats.js import JetStreamContext
from nats.js.api import PubAck

from consumer.settings import Settings
from tests.support.holding import hold_once
from tests.support.quick_runner import QuickRunner, first_time

publish = JetStreamContext.publish


async def unsent(self: JetStreamContext, subject: str, *args: Any, **more: Any) -> PubAck:
    if ".result." in subject and first_time("lost"):
        await asyncio.to_thread(hold_once, "result")
        raise BusTimeout
    return await publish(self, subject, *args, **more)


JetStreamContext.publish = unsent  # type: ignore[method-assign] # that is the fault


def make_runner(_: Settings) -> QuickRunner:
    return QuickRunner()
