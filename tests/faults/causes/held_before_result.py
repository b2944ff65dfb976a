"""The first job waits before it publishes its result."""

import asyncio

from consumer.bus.publishing import JetStreamEvents
from consumer.ports.bus import ResultEvent
from consumer.settings import Settings
from tests.support.holding import hold_once
from tests.support.quick_runner import QuickRunner

publish_result = JetStreamEvents.publish_result


async def hold_before_result(
    self: JetStreamEvents, event: ResultEvent, *, trace_parent: str | None
) -> bool:
    await asyncio.to_thread(hold_once, "result")
    return await publish_result(self, event, trace_parent=trace_parent)


JetStreamEvents.publish_result = hold_before_result  # type: ignore[method-assign] # that is the fault


def make_runner(_: Settings) -> QuickRunner:
    return QuickRunner()
