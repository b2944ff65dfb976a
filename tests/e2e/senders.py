"""The actions of a sender: with nats-py, without code of this project, and on the command line."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client

WITHIN = 60.0  # seconds; only a hang takes this long
QUEUES = ("GENERATION_REQUESTS_TEXT_TO_IMAGE", "GENERATION_REQUESTS_IMAGE_TO_TEXT")


# With NATSCLI_REQUIRED the tests run, and fail without these programs.
needs_nats_and_jq = pytest.mark.skipif(
    not os.environ.get("NATSCLI_REQUIRED")
    and (shutil.which("nats") is None or shutil.which("jq") is None),
    reason="nats or jq is not installed",
)


def run_consumer(
    *arguments: str, folder: Path | None = None, **settings: str
) -> "subprocess.CompletedProcess[str]":
    """Run a `consumer` command in a folder, with settings in the environment."""
    return subprocess.run(
        [sys.executable, "-m", "consumer", *arguments],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=2 * WITHIN,
        check=False,
    )


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
    """Publish bytes to a request subject; return the first event on the result subject."""
    answers = await sender.subscribe(result)
    await sender.flush()
    await sender.jetstream().publish(subject, body, headers=headers)
    message = await answers.next_msg(timeout=WITHIN)
    await answers.unsubscribe()
    event: dict[str, Any] = json.loads(message.data)
    return event


async def run_request(sender: Client, task: str, **fields: Any) -> dict[str, Any]:
    """Publish a request, by default with a new id; return its stored event."""
    request_id = fields.setdefault("request_id", new_id())
    return await publish_and_wait(
        sender,
        f"generation.request.{task}",
        json.dumps(fields).encode(),
        result=f"generation.result.{task}.{request_id}",
    )


async def dead_letter_of(sender: Client, task: str, request_id: str) -> Any:
    """Wait for the dead letter of a request."""
    jetstream = sender.jetstream()
    subscription = await jetstream.subscribe(f"generation.dead.{task}", ordered_consumer=True)
    try:
        async with asyncio.timeout(WITHIN):
            async for message in subscription.messages:
                if (message.headers or {}).get("Dead-Letter-Request-Id") == request_id:
                    return message
    finally:
        await subscription.unsubscribe()


async def wait_until_settled(sender: Client) -> None:
    """Wait until all requests are settled, shortly after their events are published."""
    async with asyncio.timeout(WITHIN):
        # JetStream does not report the removal of a message.
        for queue in QUEUES:
            while (await sender.jetstream().stream_info(queue)).state.messages:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
