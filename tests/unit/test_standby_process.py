"""The helper process' own loop, without a server."""

import asyncio
import json
import os

from consumer.bus.standby import Charge
from consumer.bus.standby_process import StandbyProcess

TURNS = 20  # of the event loop


async def test_a_lease_that_is_over_at_once_is_no_fault() -> None:
    words = asyncio.StreamReader()
    charge = Charge(
        nats={}, parent=os.getppid(), patience=60.0, log_format="json", log_level="INFO"
    )
    standby = StandbyProcess(charge, words)
    tasks = [asyncio.create_task(standby._listen()), asyncio.create_task(standby._watch())]
    for _ in range(TURNS):
        await asyncio.sleep(0)
    for word in ({"renewed": "a", "ack_wait": 60.0}, {"over": "a"}):
        words.feed_data(json.dumps(word).encode() + b"\n")
    for _ in range(TURNS):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
