"""What is seen of an installation beside `Scene`'s own: answers, objects, dead letters, leases."""

import hashlib
import json
from typing import Any, Self

from nats.aio.subscription import Subscription

from consumer.apply import apply
from consumer.settings import Settings
from tests.faults.scene import WITHIN, Event, Scene


class Answers:
    """What comes to a sender's inbox.

    Attributes:
        subject: For `reply_to`.
    """

    def __init__(self, scene: Scene, subscription: Subscription) -> None:
        self.subject = subscription.subject
        self._scene = scene
        self._subscription = subscription

    @classmethod
    async def listen(cls, scene: Scene) -> Self:
        return cls(scene, await scene.sender.subscribe(scene.sender.new_inbox()))

    async def next(self) -> Event:
        """The next answer, waited for."""
        event: Event = json.loads((await self._subscription.next_msg(WITHIN)).data)
        return event

    async def are_all_read(self) -> bool:
        """Whether nothing more has come by the time at which every request is settled."""
        await self._scene.emptied()
        # What the workers have published before is here before this.
        await self._scene.sender.publish(self.subject, b"{}")
        return await self.next() == {}


async def apply_with(scene: Scene, **settings: str) -> None:
    """`consumer apply` once more, with other settings."""
    values: dict[str, Any] = {**scene.settings(), **settings}
    await apply(Settings(**{name.lower(): value for name, value in values.items()}))


def promised(event: Event) -> dict[str, str]:
    """The sha256 of each output of an event, hex, by its key."""
    return {output["key"]: output["sha256"] for output in event["outputs"]}


async def stored(scene: Scene) -> dict[str, str]:
    """The sha256 of each object of this installation, hex, by its key."""
    bucket = scene.stack.store.bucket
    return {
        key: hashlib.sha256(await scene.object({"bucket": bucket, "key": key})).hexdigest()
        for key in await scene.keys()
    }


async def number_of_dead_letters(scene: Scene) -> int:
    info = await scene.sender.jetstream().stream_info(scene.subjects.dead_letters_stream)
    return int(info.state.messages)
