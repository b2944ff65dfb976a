"""The NATS client closes permanently during the first run, which would take a minute.

The server closes the connection after a message that nats-py accepts and the server refuses.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from consumer.app import daemon
from consumer.bus.connection import Bus
from consumer.settings import Settings
from generation_contracts import Request
from tests.support.quick_runner import QuickRunner

connect: Callable[..., Any] = daemon.connect
opened: list[tuple[asyncio.AbstractEventLoop, Bus]] = []


async def connect_and_remember(*args: Any, **options: Any) -> Bus:
    bus: Bus = await connect(*args, **options)
    opened.append((asyncio.get_running_loop(), bus))
    return bus


daemon.connect = connect_and_remember  # type: ignore[assignment]


class Runner(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        close_all()

    def step(self, request: Request, number: int) -> None:
        time.sleep(60)


def close_all() -> None:
    """Send a message that makes the server close the connection."""
    for loop, bus in opened:
        too_much = bus.client.publish(
            "anything", bytes(bus.client.max_payload), headers={"one": "more"}
        )
        asyncio.run_coroutine_threadsafe(too_much, loop)


def make_runner(_: Settings) -> Runner:
    return Runner()
