"""A sender that goes on until the stream has its message, whatever happens to the server."""

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error
from pydantic import ValidationError

from generation_client import GenerationClient, GenerationError
from generation_contracts import (
    FailureCode,
    Subjects,
    Task,
    decode_cancel_reply,
    decode_request,
    decode_result,
)
from generation_contracts.headers import REPLY_TO
from tests.soak.workload import Sending, Way

ANSWER_WITHIN = 1.0  # seconds
CALL_WITHIN = 10.0  # seconds; an answer comes when the request has ended
CANCEL_WITHIN = 10.0  # seconds, as the client of this project
PAUSE = 0.2  # seconds between two tries
# js.publish raises these too, when the connection is lost under it.
_NO_ANSWER = (Error, OSError, TypeError, AttributeError, ValueError, KeyError, GenerationError)
# Said by a worker that could not queue a call: it may be made again.
_NOT_QUEUED = {FailureCode.INTERNAL, FailureCode.QUEUE_FULL}


@dataclass
class Sender:
    """Sends each request at its moment, and hears the replies.

    Attributes:
        patience: Seconds of tries after which it gives up on a request.
        taken: `time.time()` of the stream's confirmation, by message id.
        tries_again: How many tries had no answer; each of them may have been stored.
        replies: What came on the reply subjects and as answers to calls, by request id.
        cancellations: What was said of each request that was cancelled, by its id.
        given_up: Request ids that were tried for too long.
    """

    client: Client
    subjects: Subjects
    task: Task
    patience: float = 60.0
    taken: dict[str, float] = field(default_factory=dict)
    tries_again: int = 0
    replies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    cancellations: dict[str, str] = field(default_factory=dict)
    given_up: list[str] = field(default_factory=list)

    async def listen(self) -> None:
        """Hear every reply from now on; those in an outage are lost, which is their nature."""
        await self.client.subscribe(f"{self.subjects.root}.reply.*", cb=self._hear)

    async def send_all(self, sendings: list[Sending]) -> None:
        """Return when the stream has them all, and every call is answered."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for sending in sendings:
                group.create_task(self._send(sending, began))

    async def _send(self, sending: Sending, began: float) -> None:
        await asyncio.sleep(max(0.0, began + sending.at - time.monotonic()))
        try:
            async with asyncio.timeout(self.patience):
                await self._until_sent(sending)
                self.taken[sending.message_id] = time.time()
                if sending.cancel_after is not None:
                    await asyncio.sleep(sending.cancel_after)
                    await self._until_cancelled(sending.request_id)
        except TimeoutError:
            self.given_up.append(sending.request_id)

    async def _until_sent(self, sending: Sending) -> None:
        while not await self._sent(sending):
            self.tries_again += 1
            await asyncio.sleep(PAUSE)

    async def _sent(self, sending: Sending) -> bool:
        try:
            match sending.way:
                case Way.PUBLISH:
                    subject = self.subjects.request(self.task, sending.in_subject)
                    await self.client.jetstream().publish(
                        subject, sending.body, timeout=ANSWER_WITHIN, headers=dict(sending.headers)
                    )
                case Way.SUBMIT:
                    request = decode_request(self.task, sending.body).model_copy(
                        update={
                            "request_id": sending.request_id,
                            "reply_to": sending.headers[REPLY_TO],
                        }
                    )
                    await GenerationClient(self.client, root=self.subjects.root).submit(request)
                case Way.CALL:
                    return await self._call(sending)
        except _NO_ANSWER:
            return False
        return True

    async def _call(self, sending: Sending) -> bool:
        subject = self.subjects.call(self.task)
        answer = await self.client.request(subject, sending.body, timeout=CALL_WITHIN)
        event = decode_result(answer.data)
        if event.type == "generation.v1.failed" and event.failure.code in _NOT_QUEUED:
            return False
        self.replies.setdefault(sending.request_id, []).append(json.loads(answer.data))
        return True

    async def _until_cancelled(self, request_id: str) -> None:
        while True:
            try:
                answer = await self.client.request(
                    self.subjects.cancel(request_id), b"", timeout=CANCEL_WITHIN
                )
                self.cancellations[request_id] = decode_cancel_reply(answer.data).status
            except _NO_ANSWER:
                await asyncio.sleep(PAUSE)
            else:
                return

    async def _hear(self, message: Msg) -> None:
        request_id = message.subject.rpartition(".")[2]
        # Other senders may make other things appear here; a client reads events only.
        with contextlib.suppress(ValidationError):
            decode_result(message.data)
            self.replies.setdefault(request_id, []).append(json.loads(message.data))
