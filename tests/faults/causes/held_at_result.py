"""A worker with stored outputs publishes its result when the test releases it."""

import asyncio
import os

from consumer.bus.publishing import JetStreamEvents
from tests.faults.causes.none import make_runner
from tests.support.holding import RELEASE_MARK, before, hold

__all__ = ["make_runner"]


async def _held() -> None:
    await asyncio.to_thread(hold, os.environ[RELEASE_MARK])


before(JetStreamEvents, "publish_result", _held)
