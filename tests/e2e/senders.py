"""What a sender does, with nats-py alone: no code of this project."""

import asyncio
import json
import uuid
from typing import Any

from nats.aio.client import Client

WITHIN = 60.0  # seconds; generous, a hang is a failure
QUEUES = ("GENERATION_REQUESTS_TEXT_TO_IMAGE", "GENERATION_REQUESTS_IMAGE_TO_TEXT")


def new_id() -> str:
    return uuid.uuid4().hex


async def publish_and_wait(
    sender: Client,
    subject: str,
    body: bytes,
    *,
    result: str,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Publish bytes to a request subject; the first event on the result subject."""
    answers = await sender.subscribe(result)
    await sender.flush()
    await sender.jetstream().publish(subject, body, headers=headers)
    message = await answers.next_msg(timeout=WITHIN)
    await answers.unsubscribe()
    event: dict[str, Any] = json.loads(message.data)
    return event


async def ask(sender: Client, task: str, **fields: Any) -> dict[str, Any]:
    """Publish a request with an id of its own; its stored event."""
    request_id = fields.setdefault("request_id", new_id())
    return await publish_and_wait(
        sender,
        f"generation.request.{task}",
        json.dumps(fields).encode(),
        result=f"generation.result.{task}.{request_id}",
    )


async def dead_letter_of(sender: Client, task: str, request_id: str) -> Any:
    """The dead letter of a request, waited for."""
    jetstream = sender.jetstream()
    subscription = await jetstream.subscribe(f"generation.dead.{task}", ordered_consumer=True)
    try:
        async with asyncio.timeout(WITHIN):
            async for message in subscription.messages:
                if (message.headers or {}).get("Dead-Letter-Request-Id") == request_id:
                    return message
    finally:
        await subscription.unsubscribe()


async def nothing_waits(sender: Client) -> None:
    """Wait until every request is settled: that is the moment after its event is heard."""
    async with asyncio.timeout(WITHIN):
        # JetStream tells nobody that a message is gone.
        for queue in QUEUES:
            while (await sender.jetstream().stream_info(queue)).state.messages:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
