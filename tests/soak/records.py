"""What a soak has left behind, read from the servers and the workers' files."""

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from nats.js.errors import NotFoundError
from pydantic import ValidationError

from generation_contracts import Task, decode_result
from generation_contracts.headers import DEAD_LETTER_CODE, DEAD_LETTER_REQUEST_ID
from tests.soak.fates import RUNS
from tests.support.quick_runner import FOLDER
from tests.support.scene import Scene

Event = dict[str, Any]
Ours = Callable[[str], bool]

JUNK = "junk"  # outcome of what is no terminal event of the request under whose id it is stored
# What no worker may ever log, whatever is killed around it.
CRIES = (
    "daemon_failed",
    "job_abandoned",
    "worker_failed",
    "result_too_large",
    "settlement_abandoned",
    "lease_guard_ended",
    "Traceback",
)
_API_WITHIN = 10.0  # seconds


@dataclass(frozen=True)
class Stored:
    """One message of the results stream.

    Attributes:
        at: Seconds since the epoch.
    """

    request_id: str
    at: float
    event: Event
    task: str = Task.TEXT_TO_IMAGE

    @property
    def place(self) -> str:
        """The last two tokens of its subject."""
        return f"{self.task}.{self.request_id}"

    @property
    def outcome(self) -> str:
        """`succeeded`, `cancelled`, the failure's code, or `junk`."""
        kind: str = self.event["type"].rpartition(".")[2]
        code: str = self.event["failure"]["code"] if kind == "failed" else kind
        return code


@dataclass(frozen=True)
class Records:
    """Everything that the verdict is made of.

    Attributes:
        results: Every message of the results stream, in order.
        counts: How many messages each result subject has, as the server counts them, by its last
            two tokens.
        letters: The headers of every dead letter.
        objects: SHA-256 in hex of every object, by key.
        begun: Request id and moment of every run of the model, in seconds since the epoch.
        replies: Every reply that was heard, by request id.
        left: Messages in the requests stream.
        unsettled: Deliveries that the durable still waits for.
        ends: Exit codes of the workers, in no order.
        cries: Lines of the workers' logs that must not be there.
        orphans: Process ids that a worker has left behind.
        cancellations: What was said of each request that was cancelled, by its id.
        given_up: Requests that could not be sent.
    """

    results: Sequence[Stored] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    letters: Sequence[Mapping[str, str]] = ()
    objects: Mapping[str, str] = field(default_factory=dict)
    begun: Sequence[tuple[str, float]] = ()
    replies: Mapping[str, Sequence[Event]] = field(default_factory=dict)
    left: int = 0
    unsettled: int = 0
    ends: Sequence[int] = ()
    cries: Sequence[str] = ()
    orphans: Sequence[int] = ()
    cancellations: Mapping[str, str] = field(default_factory=dict)
    given_up: Sequence[str] = ()


async def read(
    scene: Scene,
    *,
    ends: Sequence[int],
    replies: Mapping[str, Sequence[Event]],
    ours: Ours = lambda _: True,
) -> Records:
    """Read everything; the workers have been stopped.

    Args:
        scene: The installation.
        ends: Exit codes of the workers.
        replies: What was heard.
        ours: Whether a request is of an honest sender; what belongs to others is left out.
    """
    keys = [key for key in sorted(await scene.keys()) if _is_ours(key, ours)]
    bucket = scene.stack.store.bucket
    return Records(
        results=await _results(scene, ours),
        counts=await _counts(scene, ours),
        letters=[one for one in await scene.dead_letters() if _is_letter_of(one, ours)],
        objects={
            key: hashlib.sha256(await scene.object({"bucket": bucket, "key": key})).hexdigest()
            for key in keys
        },
        begun=[_begun(line) for line in scene.notes(RUNS) if ours(line.split()[0])],
        replies=replies,
        left=await scene.pending(),
        unsettled=await _unsettled(scene),
        ends=ends,
        cries=await asyncio.to_thread(_cries, scene),
        orphans=processes_of(scene.folder),
    )


def processes_of(folder: Path) -> list[int]:
    """Every process of a soak's workers, by the environment that they have inherited.

    Where the system has no /proc it finds none.
    """
    mark = f"{FOLDER}={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
        except OSError:  # it has ended, or is not ours
            continue
        if mark in environment.split(b"\0"):
            found.append(int(process.name))
    return found


async def _unsettled(scene: Scene) -> int:
    jetstream = scene.sender.jetstream()
    streams = [scene.subjects.requests_stream(task) for task in Task]
    durables = [one for stream in streams for one in await jetstream.consumers_info(stream)]
    return sum(durable.num_ack_pending or 0 for durable in durables)


def _is_ours(key: str, ours: Ours) -> bool:
    return ours(key.split("/")[-2])


def _is_letter_of(headers: Mapping[str, str], ours: Ours) -> bool:
    # An answer of the server has no code, and `consumer dead-letters` does not show it.
    return DEAD_LETTER_CODE in headers and ours(headers.get(DEAD_LETTER_REQUEST_ID, ""))


async def _results(scene: Scene, ours: Ours) -> list[Stored]:
    jetstream, stream = scene.sender.jetstream(), scene.subjects.results_stream
    info = await jetstream.stream_info(stream)
    found = []
    for sequence in range(info.state.first_seq, info.state.last_seq + 1):
        try:
            message = await jetstream.get_msg(stream, sequence)
        except NotFoundError:
            continue
        assert message.time is not None
        at: datetime = message.time
        *_, task, request_id = str(message.subject).split(".")
        if ours(request_id):
            event = _event(request_id, message.data or b"")
            found.append(Stored(request_id, at.timestamp(), event, task))
    return found


def _event(request_id: str, body: bytes) -> Event:
    try:
        if decode_result(body).request_id != request_id:
            return {"type": JUNK, "body": repr(body[:200])}
    except ValidationError:
        return {"type": JUNK, "body": repr(body[:200])}
    event: Event = json.loads(body)
    return event


async def _counts(scene: Scene, ours: Ours) -> dict[str, int]:
    # The server answers with a part at a time; nats-py asks for the first one only.
    counts: dict[str, int] = {}
    offset = 0
    while True:
        question = {"subjects_filter": f"{scene.subjects.root}.result.>", "offset": offset}
        answer = await scene.sender.request(
            f"$JS.API.STREAM.INFO.{scene.subjects.results_stream}",
            json.dumps(question).encode(),
            timeout=_API_WITHIN,
        )
        page = json.loads(answer.data)
        more: dict[str, int] = page["state"].get("subjects") or {}
        offset += len(more)
        for subject, count in more.items():
            *_, task, request_id = subject.split(".")
            if ours(request_id):
                counts[f"{task}.{request_id}"] = count
        if not more or offset >= page.get("total", 0):
            return counts


def _begun(line: str) -> tuple[str, float]:
    request_id, at = line.split()
    return request_id, float(at)


def _cries(scene: Scene) -> list[str]:
    found = []
    for worker in scene.workers:
        lines = ["", *worker.log.read_text(errors="replace").splitlines()]
        for before, line in pairwise(lines):
            # Of nats-py's tasks, when a process ends in the moment of a reconnect.
            ignored = before.startswith("Exception ignored in")
            if any(cry in line for cry in CRIES) and not ignored:
                found.append(f"{worker.name}: {line}")
    return found
