"""The first acknowledgement is lost on its way to the server."""

import asyncio
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import TimeoutError as BusTimeout

from consumer.settings import Settings
from tests.support.holding import hold_once
from tests.support.quick_runner import QuickRunner, first_time

request = Client.request


async def unsent(self: Client, subject: str, *args: Any, **more: Any) -> Msg:
    if subject.startswith("$JS.ACK.") and first_time("lost"):
        await asyncio.to_thread(hold_once, "ack")
        raise BusTimeout
    return await request(self, subject, *args, **more)


Client.request = unsent  # type: ignore[method-assign] # that is the fault


def make_runner(_: Settings) -> QuickRunner:
    return QuickRunner()
