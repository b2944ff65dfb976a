"""The state after a soak, read from the servers and the files of the workers."""

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
from generation_contracts.base import DEFAULT_QUEUES
from generation_contracts.headers import DEAD_LETTER_CODE, DEAD_LETTER_REQUEST_ID
from tests.soak.fates import RUNS
from tests.support.quick_runner import FOLDER
from tests.support.scene import Scene

Event = dict[str, Any]
IsHonest = Callable[[str], bool]

JUNK = "junk"  # outcome of a message that is no terminal event of the request in its subject
# Words that no worker may log, even when processes are killed.
FORBIDDEN_WORDS = (
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
    def subject_tail(self) -> str:
        """Return the last two tokens of the subject."""
        return f"{self.task}.{self.request_id}"

    @property
    def outcome(self) -> str:
        """Return `succeeded`, `cancelled`, the failure code, or `junk`."""
        kind: str = self.event["type"].rpartition(".")[2]
        code: str = self.event["failure"]["code"] if kind == "failed" else kind
        return code


@dataclass(frozen=True)
class Records:
    """The input of the checks.

    Attributes:
        results: Every message of the results stream, in order.
        counts: The server's number of messages of each result subject, by its last two tokens.
        letters: The headers of every dead letter.
        objects: SHA-256 in hex of every object, by key.
        run_starts: Request id and time of every run of the model, in seconds since the epoch.
        replies: The received replies, by request id.
        remaining: Number of messages in the requests stream.
        unsettled: Number of deliveries without an acknowledgement.
        exit_codes: Exit codes of the workers, in no order.
        forbidden_lines: Lines of the workers' logs with a forbidden word.
        orphans: Ids of child processes that outlived their worker.
        cancellations: Status in the reply to each cancellation, by request id.
        unsent: Ids of requests that could not be sent.
    """

    results: Sequence[Stored] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    letters: Sequence[Mapping[str, str]] = ()
    objects: Mapping[str, str] = field(default_factory=dict)
    run_starts: Sequence[tuple[str, float]] = ()
    replies: Mapping[str, Sequence[Event]] = field(default_factory=dict)
    remaining: int = 0
    unsettled: int = 0
    exit_codes: Sequence[int] = ()
    forbidden_lines: Sequence[str] = ()
    orphans: Sequence[int] = ()
    cancellations: Mapping[str, str] = field(default_factory=dict)
    unsent: Sequence[str] = ()


async def read(
    scene: Scene,
    *,
    exit_codes: Sequence[int],
    replies: Mapping[str, Sequence[Event]],
    is_honest: IsHonest = lambda _: True,
) -> Records:
    """Read the state after the workers have been stopped.

    Args:
        scene: The installation.
        exit_codes: Exit codes of the workers.
        replies: The received replies, by request id.
        is_honest: Whether a request id belongs to an honest sender; others are ignored.
    """
    keys = [key for key in sorted(await scene.keys()) if _is_honest_key(key, is_honest)]
    bucket = scene.stack.store.bucket
    return Records(
        results=await _results(scene, is_honest),
        counts=await _counts(scene, is_honest),
        letters=[one for one in await scene.dead_letters() if _is_letter_of(one, is_honest)],
        objects={
            key: hashlib.sha256(await scene.object({"bucket": bucket, "key": key})).hexdigest()
            for key in keys
        },
        run_starts=[_run_start(line) for line in scene.notes(RUNS) if is_honest(line.split()[0])],
        replies=replies,
        remaining=await scene.pending(),
        unsettled=await _unsettled(scene),
        exit_codes=exit_codes,
        forbidden_lines=await asyncio.to_thread(_forbidden_lines, scene),
        orphans=processes_of(scene.folder),
    )


def processes_of(folder: Path) -> list[int]:
    """Return the ids of all worker processes of a soak, found by their inherited environment.

    Returns an empty list on a system without /proc.
    """
    mark = f"{FOLDER}={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
        except OSError:  # the process has exited, or belongs to another user
            continue
        if mark in environment.split(b"\0"):
            found.append(int(process.name))
    return found


async def _unsettled(scene: Scene) -> int:
    jetstream = scene.sender.jetstream()
    streams = [scene.subjects.requests_stream(task) for task in DEFAULT_QUEUES]
    durables = [one for stream in streams for one in await jetstream.consumers_info(stream)]
    return sum(durable.num_ack_pending or 0 for durable in durables)


def _is_honest_key(key: str, is_honest: IsHonest) -> bool:
    return is_honest(key.split("/")[-2])


def _is_letter_of(headers: Mapping[str, str], is_honest: IsHonest) -> bool:
    # A response of the server has no code, and `consumer dead-letters` does not show it.
    return DEAD_LETTER_CODE in headers and is_honest(headers.get(DEAD_LETTER_REQUEST_ID, ""))


async def _results(scene: Scene, is_honest: IsHonest) -> list[Stored]:
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
        if is_honest(request_id):
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


async def _counts(scene: Scene, is_honest: IsHonest) -> dict[str, int]:
    # The server responds in pages, and nats-py requests the first page only.
    counts: dict[str, int] = {}
    offset = 0
    while True:
        api_call = {"subjects_filter": f"{scene.subjects.root}.result.>", "offset": offset}
        response = await scene.sender.request(
            f"$JS.API.STREAM.INFO.{scene.subjects.results_stream}",
            json.dumps(api_call).encode(),
            timeout=_API_WITHIN,
        )
        page = json.loads(response.data)
        more: dict[str, int] = page["state"].get("subjects") or {}
        offset += len(more)
        for subject, count in more.items():
            *_, task, request_id = subject.split(".")
            if is_honest(request_id):
                counts[f"{task}.{request_id}"] = count
        if not more or offset >= page.get("total", 0):
            return counts


def _run_start(line: str) -> tuple[str, float]:
    request_id, at = line.split()
    return request_id, float(at)


def _forbidden_lines(scene: Scene) -> list[str]:
    found = []
    for worker in scene.workers:
        lines = ["", *worker.log.read_text(errors="replace").splitlines()]
        for previous, line in pairwise(lines):
            # From tasks of nats-py, when a process exits during a reconnect.
            ignored = previous.startswith("Exception ignored in")
            if any(word in line for word in FORBIDDEN_WORDS) and not ignored:
                found.append(f"{worker.name}: {line}")
    return found
