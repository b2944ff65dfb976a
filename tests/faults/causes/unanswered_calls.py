"""The first calls of each kind get no reply, as on a loaded computer."""

import asyncio
from typing import Any

from consumer.bus import topology
from consumer.bus.nats_internals import RobustClient
from consumer.endpoints import worker_service as front_door
from consumer.settings import Settings
from tests.support.quick_runner import QuickRunner

request = RobustClient.request
unanswered = ["$JS.API.STREAM.INFO.", "$JS.API.CONSUMER.", "$SRV.PING."]  # one call each


async def request_or_hang(self: RobustClient, subject: str, *args: Any, **options: Any) -> Any:
    for kind in unanswered:
        if subject.startswith(kind):
            unanswered.remove(kind)
            await asyncio.Event().wait()  # until the timeout of the caller
    return await request(self, subject, *args, **options)


RobustClient.request = request_or_hang  # type: ignore[method-assign]
topology.API_TIMEOUT = front_door.API_TIMEOUT = 0.3  # seconds


def make_runner(_: Settings) -> QuickRunner:
    return QuickRunner()
