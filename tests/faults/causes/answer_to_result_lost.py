"""The server stores the first result, and its confirmation is lost."""

import asyncio
from typing import Any

from nats.errors import TimeoutError as BusTimeout
from nats.js import JetStreamContext
from nats.js.api import PubAck

from consumer.settings import Settings
from tests.support.holding import hold_once
from tests.support.quick_runner import QuickRunner, first_time

publish = JetStreamContext.publish


async def unheard(self: JetStreamContext, subject: str, *args: Any, **more: Any) -> PubAck:
    answer = await publish(self, subject, *args, **more)
    if ".result." in subject and first_time("answer"):
        await asyncio.to_thread(hold_once, "result")
        raise BusTimeout
    return answer


JetStreamContext.publish = unheard  # type: ignore[method-assign] # that is the fault


def make_runner(_: Settings) -> QuickRunner:
    return QuickRunner()
