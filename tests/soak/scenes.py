"""What a soak runs on: an installation for several workers, with or without users."""

import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import nats
from nats.aio.client import Client

from consumer.devstack import DevStack
from consumer.turns import STAGES
from generation_contracts import Subjects, Task
from tests.hostile.attacker import Attacker, Id
from tests.hostile.users import Users
from tests.support.scene import Scene

CAUSE = "soak"
MAX_ATTEMPTS = 5  # so many that the chaos hardly ever makes a request `worker_lost`
DRAIN_GRACE = 2.0  # seconds; shorter than a slow run
STALL_TIMEOUT = 6.0  # seconds; longer than the GIL is held


@dataclass(frozen=True)
class Options:
    """What a soak is made of.

    Attributes:
        requests: Distinct request ids, good and bad.
        workers: Daemon processes.
        seconds: Over which requests are sent and processes killed.
        seed: Decides both.
        hostile: Whether one of the senders is an attacker.
        attacks: Patterns of the names of its attacks.
        chaos: Whether processes are killed.
        patience: Seconds without any progress after which a soak, or a sender, gives up.
    """

    requests: int
    workers: int
    seconds: float
    seed: int
    hostile: bool = False
    attacks: tuple[str, ...] = ("*",)
    chaos: bool = True
    patience: float = 120.0


class SoakScene(Scene):
    """An installation for several workers.

    Args:
        options: Of the soak.
    """

    def __init__(
        self, stack: DevStack, folder: Path, parts: AsyncExitStack, options: Options
    ) -> None:
        super().__init__(stack, folder, parts)
        self._options = options

    def settings(self) -> dict[str, str]:
        """The environment of a worker."""
        return {
            **super().settings(),
            "CONSUMER_MAX_ACK_PENDING": str(STAGES * self._options.workers),
            "CONSUMER_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "CONSUMER_DRAIN_GRACE": str(DRAIN_GRACE),
            "CONSUMER_STALL_TIMEOUT": str(STALL_TIMEOUT),
        }


class HostileScene(SoakScene):
    """An installation under the root that users.conf is written for; `sender` is the admin.

    Args:
        users: Whose keys the server knows.
    """

    def __init__(
        self,
        stack: DevStack,
        folder: Path,
        parts: AsyncExitStack,
        options: Options,
        users: Users,
    ) -> None:
        super().__init__(stack, folder, parts, options)
        self.subjects = Subjects()
        self._users = users

    async def open(self) -> None:
        """Connect the admin, make the streams, the durables and the bucket."""
        self.sender = await self.connect("admin")
        self._parts.push_async_callback(self._close)
        await self.apply()

    async def connect(self, role: str) -> Client:
        """A plain connection of a user."""

        async def quiet(_: Exception) -> None:
            """What the servers do here is not the sender's concern."""

        return await nats.connect(
            self.stack.nats.url,
            nkeys_seed=str(self._users.seed(role)),
            inbox_prefix=self._users.inbox(role).encode(),
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.05,
            error_cb=quiet,
        )

    async def apply(self, **settings: str) -> None:
        """`consumer apply` by the admin, for both tasks."""
        for task in Task:
            await super().apply(model_type=str(task), **self._users.settings("admin"), **settings)

    def settings(self) -> dict[str, str]:
        """The environment of a worker."""
        return {**super().settings(), **self._users.worker_settings()}

    def attacker(self, seed: int, planned: Sequence[Id]) -> Attacker:
        """An attacker with the publisher's key."""
        draw = random.Random(f"{seed} attacker")
        key = self._users.seed("publisher")
        return Attacker(self.stack.nats.url, key, self.subjects, draw, planned)
