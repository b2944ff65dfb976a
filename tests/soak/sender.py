"""A sender that repeats each publish until the stream confirms it."""

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

PUBLISH_TIMEOUT = 1.0  # seconds
CALL_TIMEOUT = 10.0  # seconds; the reply arrives when the request has ended
CANCEL_TIMEOUT = 10.0  # seconds, as in this project's client
PAUSE = 0.2  # seconds between two attempts
# js.publish also raises these when the connection is lost during the call.
_NO_REPLY = (Error, OSError, TypeError, AttributeError, ValueError, KeyError, GenerationError)
# The codes of a call that the worker could not queue; the caller may retry.
_NOT_QUEUED = {FailureCode.INTERNAL, FailureCode.QUEUE_FULL}


@dataclass
class Sender:
    """Sends each request at its time and receives the replies.

    Attributes:
        send_timeout: Seconds of retries before a request counts as unsent.
        confirmed_at: `time.time()` of the publish acknowledgement, by message id.
        retries: Number of attempts without a reply; each may have been stored.
        replies: Messages on the reply subjects and replies to calls, by request id.
        cancellations: Status in the reply to each cancellation, by request id.
        unsent: Ids of requests that could not be sent in time.
    """

    client: Client
    subjects: Subjects
    task: Task
    send_timeout: float = 60.0
    confirmed_at: dict[str, float] = field(default_factory=dict)
    retries: int = 0
    replies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    cancellations: dict[str, str] = field(default_factory=dict)
    unsent: list[str] = field(default_factory=list)

    async def listen(self) -> None:
        """Subscribe to all replies. Core NATS loses replies during an outage."""
        await self.client.subscribe(f"{self.subjects.root}.reply.*", cb=self._receive)

    async def send_all(self, sendings: list[Sending]) -> None:
        """Send all; return when each is stored or its call has a reply."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for sending in sendings:
                group.create_task(self._send(sending, began))

    async def _send(self, sending: Sending, began: float) -> None:
        await asyncio.sleep(max(0.0, began + sending.at - time.monotonic()))
        try:
            async with asyncio.timeout(self.send_timeout):
                await self._send_until_confirmed(sending)
                self.confirmed_at[sending.message_id] = time.time()
                if sending.cancel_after is not None:
                    await asyncio.sleep(sending.cancel_after)
                    await self._cancel_until_answered(sending.request_id)
        except TimeoutError:
            self.unsent.append(sending.request_id)

    async def _send_until_confirmed(self, sending: Sending) -> None:
        while not await self._try_to_send(sending):
            self.retries += 1
            await asyncio.sleep(PAUSE)

    async def _try_to_send(self, sending: Sending) -> bool:
        try:
            match sending.way:
                case Way.PUBLISH:
                    subject = self.subjects.request(self.task, sending.in_subject)
                    await self.client.jetstream().publish(
                        subject,
                        sending.body,
                        timeout=PUBLISH_TIMEOUT,
                        headers=dict(sending.headers),
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
        except _NO_REPLY:
            return False
        return True

    async def _call(self, sending: Sending) -> bool:
        subject = self.subjects.call(self.task)
        reply = await self.client.request(subject, sending.body, timeout=CALL_TIMEOUT)
        event = decode_result(reply.data)
        if event.type == "generation.v1.failed" and event.failure.code in _NOT_QUEUED:
            return False
        self.replies.setdefault(sending.request_id, []).append(json.loads(reply.data))
        return True

    async def _cancel_until_answered(self, request_id: str) -> None:
        while True:
            try:
                reply = await self.client.request(
                    self.subjects.cancel(request_id), b"", timeout=CANCEL_TIMEOUT
                )
                self.cancellations[request_id] = decode_cancel_reply(reply.data).status
            except _NO_REPLY:
                await asyncio.sleep(PAUSE)
            else:
                return

    async def _receive(self, message: Msg) -> None:
        request_id = message.subject.rpartition(".")[2]
        # Other senders can publish other messages here; a client reads events only.
        with contextlib.suppress(ValidationError):
            decode_result(message.data)
            self.replies.setdefault(request_id, []).append(json.loads(message.data))
