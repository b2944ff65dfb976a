"""The installation of a soak: several workers, with or without NATS users."""

import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import nats
from nats.aio.client import Client

from consumer.devstack import DevStack
from consumer.jobs.in_flight import STAGES
from generation_contracts import Subjects
from generation_contracts.base import DEFAULT_QUEUES
from tests.hostile.attacker import Attacker, Id
from tests.hostile.users import Users
from tests.support.scene import Scene

CAUSE = "soak"
MAX_ATTEMPTS = 5  # enough that killed processes seldom cause `worker_lost`
DRAIN_GRACE = 2.0  # seconds; shorter than a slow run
STALL_TIMEOUT = 6.0  # seconds; longer than the model holds the GIL


@dataclass(frozen=True)
class Options:
    """The options of a soak.

    Attributes:
        requests: Number of distinct request ids, of valid and invalid requests.
        workers: Number of daemon processes.
        seconds: Duration of sending and of killing processes.
        seed: Seed of both.
        hostile: Whether one of the senders is an attacker.
        attacks: Patterns of the names of the attacks.
        chaos: Whether processes are killed.
        progress_timeout: Seconds without progress after which a soak, or a sender, gives up.
    """

    requests: int
    workers: int
    seconds: float
    seed: int
    hostile: bool = False
    attacks: tuple[str, ...] = ("*",)
    chaos: bool = True
    progress_timeout: float = 120.0


class SoakScene(Scene):
    """An installation for several workers.

    Args:
        options: Options of the soak.
    """

    def __init__(
        self, stack: DevStack, folder: Path, parts: AsyncExitStack, options: Options
    ) -> None:
        super().__init__(stack, folder, parts)
        self._options = options

    def settings(self) -> dict[str, str]:
        """Return the environment of a worker."""
        return {
            **super().settings(),
            "CONSUMER_MAX_ACK_PENDING": str(STAGES * self._options.workers),
            "CONSUMER_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "CONSUMER_DRAIN_GRACE": str(DRAIN_GRACE),
            "CONSUMER_STALL_TIMEOUT": str(STALL_TIMEOUT),
        }


class HostileScene(SoakScene):
    """An installation with the subject root of users.conf; `sender` is the admin.

    Args:
        users: Users with keys on the server.
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
        """Connect the admin; create the streams, the durables and the bucket."""
        self.sender = await self.connect("admin")
        self._parts.push_async_callback(self._close)
        await self.apply()

    async def connect(self, role: str) -> Client:
        """Open a plain connection of a user."""

        async def ignore(_: Exception) -> None:
            """Ignore errors: servers are killed on purpose."""

        return await nats.connect(
            self.stack.nats.url,
            nkeys_seed=str(self._users.seed(role)),
            inbox_prefix=self._users.inbox(role).encode(),
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.05,
            error_cb=ignore,
        )

    async def apply(self, **settings: str) -> None:
        """Run `consumer apply` as the admin, for both tasks."""
        for task in DEFAULT_QUEUES:
            await super().apply(model_type=str(task), **self._users.settings("admin"), **settings)

    def settings(self) -> dict[str, str]:
        """Return the environment of a worker."""
        return {**super().settings(), **self._users.worker_settings()}

    def attacker(self, seed: int, planned: Sequence[Id]) -> Attacker:
        """Return an attacker with the publisher's key."""
        draw = random.Random(f"{seed} attacker")
        key = self._users.seed("publisher")
        return Attacker(self.stack.nats.url, key, self.subjects, draw, planned)
