"""Work that ends when a process of the development stack ends."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from consumer.background_tasks import cancel_and_wait
from consumer.devstack import DevStack

CHECK_INTERVAL = 0.5  # seconds between two checks of the child processes

T = TypeVar("T")


async def supervised(stack: DevStack, work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine while every child of a stack is alive.

    Raises:
        ChildEndedError: A child ended; the coroutine is cancelled. An exception of the coroutine
            that has this cause is replaced.
    """
    working = asyncio.create_task(work, name="work")
    watching = asyncio.create_task(_watch(stack), name="watch-children")
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done() or working.exception() is not None:
            stack.require_alive()
        return await working
    finally:
        await cancel_and_wait(working, watching)


async def _watch(stack: DevStack) -> None:
    while all(child.alive for child in stack.children):  # noqa: ASYNC110 - no event reports it
        await asyncio.sleep(CHECK_INTERVAL)
