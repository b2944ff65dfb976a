"""Request a description of every new image: a subscriber in plain nats-py.

    python docs/examples/chain_by_hand.py

The server is `NATS_URL`, by default nats://127.0.0.1:4222. The program does what `then` does inside
the workers. It reads the results stream with its own durable consumer. The first start creates the
durable, for results from then on; later starts miss no result that was stored meanwhile.

A request that is published twice after a crash has the same id, and the second copy is not run. It
has no `Nats-Msg-Id`: a sender that guesses that header and publishes first makes the server drop
this request as a duplicate.
"""

import asyncio
import json
import os
from typing import Any

import nats
from nats.errors import TimeoutError as NothingNew
from nats.js.api import ConsumerConfig, DeliverPolicy

ROOT = "generation"


async def main(server: str, question: str = "Describe this image.") -> None:
    """Ask a question about the images of every result, until the program is stopped."""
    client = await nats.connect(server)
    jetstream = client.jetstream()
    results = await jetstream.pull_subscribe(
        f"{ROOT}.result.text_to_image.*",
        durable="describer",
        stream=f"{ROOT.upper()}_RESULTS",
        config=ConsumerConfig(deliver_policy=DeliverPolicy.NEW),
    )
    print("waiting for results", flush=True)
    while True:
        try:
            (message,) = await results.fetch(1, timeout=5)
        except NothingNew:
            continue
        event = succeeded(message.data, message.subject.rpartition(".")[2])
        if event is not None:
            request_id = f"{event['request_id'][:54]}-described"
            images = [{"bucket": one["bucket"], "key": one["key"]} for one in event["outputs"]]
            await jetstream.publish(
                f"{ROOT}.request.image_to_text.{request_id}",
                json.dumps({"prompt": question, "images": images}).encode(),
            )
        await message.ack_sync()


def succeeded(body: bytes, request_id: str) -> dict[str, Any] | None:
    """Return the event of a request that has succeeded; None for all else, also for junk."""
    try:
        event: Any = json.loads(body)
    except ValueError:
        return None
    if not isinstance(event, dict) or event.get("request_id") != request_id:
        return None
    return event if event.get("type") == "generation.v1.succeeded" else None


if __name__ == "__main__":
    asyncio.run(main(os.environ.get("NATS_URL", "nats://127.0.0.1:4222")))
