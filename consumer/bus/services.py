"""Which workers there are: their answers to `$SRV.INFO`."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error

from consumer.bus.connection import Bus, BusUnavailable
from consumer.bus.endpoint_connection import SERVICE
from consumer.bus.server_texts import NO_RESPONDERS

ANSWERS_WITHIN = 1.0  # seconds for all answers together
QUIET = 0.2  # seconds without a further answer, after the first one, to expect no more
MAX_ANSWERS = 1_000

Metadata = Mapping[str, str]


async def worker_metadata(bus: Bus) -> list[Metadata]:
    """Ask all workers for the metadata of their services.

    Returns:
        The metadata of each worker that has answered: `worker`, `task`, `id` of the model, ….

    Raises:
        BusUnavailable: The question could not be sent, or there are workers and none has answered.
    """
    inbox = bus.client.new_inbox()
    answers: list[Metadata] = []
    try:
        subscription = await bus.client.subscribe(inbox)
    except (Error, OSError) as error:
        raise BusUnavailable(f"NATS: workers cannot be asked: {type(error).__name__}") from None
    try:
        await bus.client.publish(f"$SRV.INFO.{SERVICE}", reply=inbox)
        until = time.monotonic() + ANSWERS_WITHIN
        while len(answers) < MAX_ANSWERS and (left := until - time.monotonic()) > 0:
            # A busy worker answers late.
            message = await subscription.next_msg(timeout=min(QUIET, left) if answers else left)
            if (message.headers or {}).get("Status") == NO_RESPONDERS:
                return []
            if (metadata := _metadata(message)) is not None:
                answers.append(metadata)
    except TimeoutError:  # those of nats-py are TimeoutErrors too
        pass
    except (Error, OSError) as error:
        raise BusUnavailable(f"NATS: workers cannot be asked: {type(error).__name__}") from None
    finally:
        await _unsubscribed(subscription)
    if not answers:
        # Without a connection nats-py keeps the question and sends it later.
        raise BusUnavailable(f"NATS: no worker has answered within {ANSWERS_WITHIN:g} s")
    return answers


async def _unsubscribed(subscription: Any) -> None:
    with suppress(Error, OSError):  # the connection is lost, and the subscription with it
        await subscription.unsubscribe()


def _metadata(message: Msg) -> Metadata | None:
    """Return the metadata in an answer; None where it is not a worker's."""
    try:
        answer: Any = json.loads(message.data)
    except ValueError:
        return None
    found = answer.get("metadata") if isinstance(answer, dict) else None
    if not isinstance(found, dict):
        return None
    return {str(name): value for name, value in found.items() if isinstance(value, str)}
