"""A sender that goes on until the stream has its message, whatever happens to the server."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error

from generation_contracts import Subjects, Task
from tests.soak.workload import Sending

ANSWER_WITHIN = 1.0  # seconds
PAUSE = 0.2  # seconds between two tries
# js.publish raises these too, when the connection is lost under it.
_NO_ANSWER = (Error, OSError, TypeError, AttributeError, ValueError, KeyError)


@dataclass
class Sender:
    """Publishes each message at its moment, and hears the replies.

    Attributes:
        taken: `time.time()` of the stream's confirmation, by message id.
        tries_again: How many tries had no answer; each of them may have been stored.
        replies: What came on the reply subjects, by request id.
    """

    client: Client
    subjects: Subjects
    task: Task
    taken: dict[str, float] = field(default_factory=dict)
    tries_again: int = 0
    replies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    async def listen(self) -> None:
        """Hear every reply from now on; those in an outage are lost, which is their nature."""
        await self.client.subscribe(f"{self.subjects.root}.reply.*", cb=self._hear)

    async def send_all(self, sendings: list[Sending]) -> None:
        """Return when the stream has them all."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for sending in sendings:
                group.create_task(self._send(sending, began))

    async def _send(self, sending: Sending, began: float) -> None:
        await asyncio.sleep(max(0.0, began + sending.at - time.monotonic()))
        subject = self.subjects.request(self.task, sending.in_subject)
        while True:
            try:
                await self.client.jetstream().publish(
                    subject, sending.body, timeout=ANSWER_WITHIN, headers=dict(sending.headers)
                )
            except _NO_ANSWER:
                self.tries_again += 1
                await asyncio.sleep(PAUSE)
            else:
                self.taken[sending.message_id] = time.time()
                return

    async def _hear(self, message: Msg) -> None:
        request_id = message.subject.rpartition(".")[2]
        self.replies.setdefault(request_id, []).append(json.loads(message.data))
