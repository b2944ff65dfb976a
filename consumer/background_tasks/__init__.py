"""Cancels asyncio tasks reliably."""

import asyncio
from typing import Any

CANCEL_EVERY = 1.0  # seconds between two cancellations of the same task


async def cancel_and_wait(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and return when every task has ended.

    A single cancellation can be lost. Until Python 3.12, asyncio.wait_for drops a cancellation that
    arrives at the same time as its result (python/cpython#86296), and libraries swallow
    cancellations. The cancellation is therefore repeated until the task has ended.
    """
    while pending := {task for task in tasks if not task.done()}:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=CANCEL_EVERY)
