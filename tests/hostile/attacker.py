"""A sender with the publisher's key and bad intentions: what it knows, and how it publishes."""

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generation_contracts import Subjects, Task
from generation_contracts.base import DEFAULT_QUEUES
from tests.hostile.wire import Message, Wire, header_block
from tests.soak.fates import UNFATED

OWN = "evil-"  # first characters of the attacker's request ids
INBOX = "_INBOX_sender.evil"
RUNNING_WITHIN = 2.0  # seconds that an attack waits for a running request of another sender
RECONNECT_PAUSE = 0.1  # seconds

_MADE_FOR_A_CALL = re.compile("[0-9a-f]{32}(-.*)?")
_GONE = (OSError, TimeoutError)


@dataclass
class Count:
    """What has become of one attack.

    Attributes:
        made: How often it was made.
        messages: What was published.
        refused: Messages that the server has refused, and errors that it has answered with.
        answered: Other answers on the attacker's inbox.
        without_target: How often no request of another sender was running.
        cut: How often the connection was lost meanwhile.
    """

    made: int = 0
    messages: int = 0
    refused: int = 0
    answered: int = 0
    without_target: int = 0
    cut: int = 0


class NoTarget(Exception):  # noqa: N818 - a state of the others
    """No request of another sender is running."""


@dataclass(frozen=True)
class Id:
    """A request of another sender."""

    task: Task
    request_id: str


class Attacker:
    """One connection of the publisher's user, and what it has seen.

    Args:
        url: Of the server.
        seed: The publisher's.
        subjects: Of the installation.
        draw: Decides everything that is left to chance.
        planned: Ids that other senders will use.

    Attributes:
        subjects: Of the installation.
        draw: Decides everything that is left to chance.
        running: Requests of others that have started, read from their progress.
        finished: Requests of others that have ended.
        counts: What has become of each attack, by its name.
        last_sequence: Of the last message that the request stream of text_to_image has taken.
    """

    def __init__(
        self,
        url: str,
        seed: Path,
        subjects: Subjects,
        draw: random.Random,
        planned: Sequence[Id] = (),
    ) -> None:
        self._url = url
        self._seed = seed.read_bytes()
        self._wire: Wire | None = None
        self._planned = list(planned)
        self._current = Count()
        self._name = "none"
        self.subjects = subjects
        self.draw = draw
        self.running: dict[Id, None] = {}  # in the order in which they have started
        self.finished: dict[Id, None] = {}
        self.counts: dict[str, Count] = {}
        self.last_sequence = 0

    # -- what attacks are made of -----------------------------------------------------------------

    def publish(
        self,
        subject: str | bytes,
        body: bytes | dict[str, Any] = b"",
        *,
        reply: str | bytes = b"",
        headers: dict[str, str] | bytes = b"",
    ) -> None:
        """Publish anything. What the server does with it is counted when the attack is over."""
        if self._wire is None or self._wire.closed.is_set():
            raise ConnectionResetError
        self._current.messages += 1
        block = header_block(headers) if isinstance(headers, dict) else headers
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self._wire.write(Message(_bytes(subject), data, _bytes(reply), block))

    async def drain(self) -> None:
        """Wait until the server has read what was published."""
        if self._wire is None:
            raise ConnectionResetError
        self._current.refused += len(await self._wire.settled())

    def request(self, task: Task = Task.TEXT_TO_IMAGE, request_id: str | None = None) -> str:
        """The subject of a request."""
        return self.subjects.request(task, request_id)

    def own_id(self) -> str:
        """A new id of the attacker's own."""
        return f"{OWN}{self.draw.getrandbits(64):016x}"

    def own_body(self, **fields: Any) -> dict[str, Any]:
        """A short request of the attacker's own; valid where the fields are."""
        prompt = f"evil {UNFATED}" if "seed" not in fields else "evil"
        return {"prompt": prompt, "num_inference_steps": 1, "width": 16, "height": 16, **fields}

    @property
    def inbox(self) -> str:
        """Where the attacker may be answered; it says to which attack."""
        return f"{INBOX}.{self._name}.{self.draw.getrandbits(32):08x}"

    async def victim(self) -> Id:
        """A request of another sender that is running.

        Raises:
            NoTarget: There is none for some time.
        """
        until = time.monotonic() + RUNNING_WITHIN
        while not self.running:
            if time.monotonic() > until:
                raise NoTarget
            await asyncio.sleep(0.01)
        return list(self.running)[-1]

    def ids(self) -> list[Id]:
        """Requests of others: one that runs, one that has ended, one that is still to come."""
        kinds = [list(self.running)[-1:], list(self.finished)[-1:], self.future()[:1]]
        return [one for kind in kinds for one in kind]

    def future(self) -> list[Id]:
        """Requests that other senders have not sent yet, as far as is known; the next one first."""
        seen = self.running | self.finished
        return [one for one in self._planned if one not in seen]

    def forbidden(self) -> list[str]:
        """Subjects where no sender may make anything appear, through anyone."""
        subjects, requests = self.subjects, self.subjects.requests_stream(Task.TEXT_TO_IMAGE)
        results = [subjects.result(one.task, one.request_id) for one in self.ids()]
        running = [one.request_id for one in list(self.running)[-1:]]
        api = [
            f"$JS.API.STREAM.{verb}.{stream}"
            for verb in ("PURGE", "DELETE")
            for stream in (subjects.results_stream, requests, subjects.dead_letters_stream)
        ]
        return [
            *results,
            *(subjects.interrupt(request_id) for request_id in running),
            *(subjects.progress(Task.TEXT_TO_IMAGE, request_id) for request_id in running),
            subjects.dead_letter(Task.TEXT_TO_IMAGE),
            *self.marks(),
            f"{subjects.root}.retry.{Task.TEXT_TO_IMAGE}.{self.own_id()}",
            self.request(Task.TEXT_TO_IMAGE, self.own_id()),
            *api,
            f"$JS.API.CONSUMER.DELETE.{requests}.{Task.TEXT_TO_IMAGE}",
            f"$JS.API.CONSUMER.MSG.NEXT.{requests}.{Task.TEXT_TO_IMAGE}",
        ]

    def marks(self) -> list[str]:
        """Subjects of notes on messages near the last one: given back, or withdrawn."""
        now, task = int(time.time()), Task.TEXT_TO_IMAGE
        places = [
            f"{sequence}-{second:x}"
            for sequence in range(max(1, self.last_sequence - 2), self.last_sequence + 3)
            for second in (now - 1, now)
        ]
        released = f"{self.subjects.root}.released.{task}"
        withdrawn = f"{self.subjects.root}.withdrawn.{task}"
        return [
            *(f"{withdrawn}.{place}" for place in places),
            *(f"{released}.{place}.1.released" for place in places),
        ]

    # -- its connection ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def attacking(self, name: str) -> Iterator[Count]:
        """Count what is published meanwhile for one attack."""
        self._name, self._current = name, self.counts.setdefault(name, Count())
        try:
            yield self._current
        finally:
            self._current.made += 1

    async def connected(self) -> None:
        """Return once there is a connection."""
        while self._wire is None or self._wire.closed.is_set():
            try:
                self._wire = await Wire.connect(self._url, self._seed)
            except _GONE:
                await asyncio.sleep(RECONNECT_PAUSE)
            else:
                self._wire.subscribe(f"{self.subjects.root}.progress.>", self._see_progress)
                self._wire.subscribe(f"{self.subjects.root}.result.>", self._see_result)
                self._wire.subscribe(f"{INBOX}.>", self._see_answer)

    async def close(self) -> None:
        """Close the connection."""
        if self._wire is not None:
            await self._wire.close()

    def _see_progress(self, subject: str, _: bytes) -> None:
        if (one := self._id_in(subject)) is not None and one not in self.finished:
            self.running[one] = None

    def _see_result(self, subject: str, body: bytes) -> None:
        one = self._id_in(subject)
        if one is not None and b'"generation.v1.' in body:  # else it is junk of this attacker
            self.running.pop(one, None)
            self.finished[one] = None

    def _id_in(self, subject: str) -> Id | None:
        *_, task, request_id = subject.split(".")
        if task not in set(DEFAULT_QUEUES) or is_attackers(request_id, self.subjects):
            return None
        return Id(Task(task), request_id)

    def _see_answer(self, subject: str, body: bytes) -> None:
        name = subject.removeprefix(f"{INBOX}.").partition(".")[0]
        count = self.counts.get(name, self._current)
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and "error" in answer:
            count.refused += 1
            return
        count.answered += 1
        stream = self.subjects.requests_stream(Task.TEXT_TO_IMAGE)
        if isinstance(answer, dict) and answer.get("stream") == stream:
            self.last_sequence = max(self.last_sequence, answer.get("seq") or 0)


@asynccontextmanager
async def attacker(
    url: str,
    seed: Path,
    subjects: Subjects | None = None,
    *,
    number: int = 0,
    planned: Sequence[Id] = (),
) -> AsyncIterator[Attacker]:
    """An attacker that is connected; `number` is the seed of its chances."""
    draw = random.Random(f"{number} attacker")
    one = Attacker(url, seed, subjects or Subjects(), draw, planned)
    await one.connected()
    try:
        yield one
    finally:
        await one.close()


def is_attackers(request_id: str, subjects: Subjects) -> bool:
    """Whether a request is the attacker's: its own id, or one that was made for it.

    Honest senders give each request an id, and none that looks like those.
    """
    derived = tuple(subjects.requests_stream(task) for task in DEFAULT_QUEUES)
    return (
        request_id.startswith((OWN.rstrip("-"), *derived))
        or _MADE_FOR_A_CALL.fullmatch(request_id) is not None
    )


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text
