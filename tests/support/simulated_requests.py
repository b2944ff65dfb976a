"""Hypothesis strategies: requests of senders, ends of runs, and positions in jobs."""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from hypothesis import strategies as st
from PIL import Image

from consumer.ports.model import (
    DeviceLost,
    GeneratedImage,
    ModelError,
    RunnerOutput,
    UnsupportedParameter,
)
from generation_contracts import Subjects, Task, decode_request, request_digest
from generation_contracts.base import DEFAULT_QUEUES
from tests.support.behaviour import INBOX, request_body
from tests.support.memory_ports import BUCKET, Script, make, out_of_memory, raising

MAX_PAYLOAD = 6_000  # bytes; larger than any event without the sender's metadata
BULKY = {str(number): "x" * 512 for number in range(16)}  # metadata that exceeds MAX_PAYLOAD

# No worker may publish a reply on this subject, which is the result subject of a request.
FORBIDDEN = {task: Subjects().result(task, "r1") for task in DEFAULT_QUEUES}

Kind = Literal["valid", "malformed", "unsupported", "missing"]
Ending = Literal[
    "success",
    "varied",
    "no output",
    "invalid output",
    "raised",
    "internal error",
    "out of memory",
    "device lost",
    "unsupported",
]

SCRIPTS: dict[Ending, Script] = {
    "success": make,
    "no output": lambda _: RunnerOutput(),
    "invalid output": lambda _: RunnerOutput(outputs=(GeneratedImage(None, seed=0),)),  # type: ignore[arg-type]
    "raised": raising(lambda: ModelError("ValueError")),
    "internal error": raising(lambda: KeyError("secret")),
    "out of memory": raising(out_of_memory),
    "device lost": raising(DeviceLost),
    "unsupported": raising(lambda: UnsupportedParameter("width", "width: not this one")),
}
ENDINGS = st.sampled_from(["success", "success", "success", "varied", *SCRIPTS])


def possible_ending(ending: Ending, task: Task) -> Ending:
    """Return an ending that the model of a task can have: some endings exist only for images."""
    of_texts: dict[Ending, Ending] = {"varied": "success", "invalid output": "no output"}
    return ending if task is Task.TEXT_TO_IMAGE else of_texts.get(ending, ending)


def script(ending: Ending, number: int) -> Script:
    """Return the script of a run.

    Args:
        ending: The ending of the run.
        number: Number of the run. The output of a "varied" run depends on it.
    """
    if ending != "varied":
        return SCRIPTS[ending]
    image = Image.new("RGB", (4, 4), (number & 255, number >> 8 & 255, 255))
    return lambda _: RunnerOutput(outputs=(GeneratedImage(image, seed=0),))


@dataclass(frozen=True)
class Sent:
    """A published request."""

    request_id: str
    digest: str
    kind: Kind
    deadline: datetime | None
    reply: bool  # whether the sender expects a reply


@dataclass(frozen=True)
class RequestDraft:
    """A request that a sender publishes.

    Attributes:
        again: Number of an earlier request whose id this request repeats, or None for a new id.
        kind: "refused" is an unsupported parameter or a missing input, depending on the task.
        seconds: Seconds until the deadline.
        bulky: Whether its metadata makes the events too large for the bus.
        reply: The kind of reply subject.
    """

    again: int | None
    prompt: str
    kind: Literal["valid", "malformed", "refused"]
    seconds: int | None
    bulky: bool
    reply: Literal["nowhere", "inbox", "forbidden"]

    def sent(self, task: Task, now: datetime, number: int) -> tuple[bytes, Sent]:
        """Return the body of the request, and its properties.

        Args:
            task: The task of the workers.
            now: The current time.
            number: Number of the request, from 1.
        """
        fields: dict[str, Any] = {"prompt": self.prompt}
        kind = self._set_kind(task, fields)
        if self.bulky:
            fields["metadata"] = BULKY
        match self.reply:
            case "inbox":
                fields["reply_to"] = INBOX
            case "forbidden":
                fields["reply_to"] = FORBIDDEN[task]
                kind = "malformed"
        deadline = None if self.seconds is None else now + timedelta(seconds=self.seconds)
        if deadline is not None:
            fields["deadline"] = deadline.isoformat()
        name = f"r{number if self.again is None else self.again % number + 1}"
        replied = self.reply == "inbox"
        body = request_body(name, **fields)
        if kind == "malformed":
            digest, deadline = f"sha256:{hashlib.sha256(body).hexdigest()}", None
        else:
            digest = request_digest(decode_request(task, body))
        return body, Sent(name, digest, kind, deadline, replied)

    def _set_kind(self, task: Task, fields: dict[str, Any]) -> Kind:
        if task is Task.IMAGE_TO_TEXT:
            key = "gone" if self.kind == "refused" else "one"
            fields["images"] = [{"bucket": BUCKET, "key": key}]
        if self.kind == "malformed":
            fields["colour"] = "red"
            return "malformed"
        if self.kind == "valid":
            return "valid"
        if task is Task.IMAGE_TO_TEXT:
            return "missing"
        fields["negative_prompt"] = "text"
        return "unsupported"


class JobPosition(NamedTuple):
    """A position in a job.

    Attributes:
        which: Index of a worker that has a job or can take a job.
        calls: Number of calls until the position. The end of a run counts as a call.
        ending: The ending of a run before the position. With None, the position is at the run.
    """

    which: int
    calls: int
    ending: Ending | None


WHICH = st.integers(0, 5)
CALLS = st.integers(0, 24)  # a job makes about 10 calls, with a stop before and after each
JOB_POSITIONS = st.builds(JobPosition, WHICH, CALLS, ENDINGS)
DRAFTS = st.builds(
    RequestDraft,
    again=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 11)),
    prompt=st.sampled_from(["a circle", "a circle", "a square"]),
    kind=st.sampled_from(["valid", "valid", "valid", "valid", "malformed", "refused"]),
    seconds=st.sampled_from([None, None, None, -1, 5, 20]),
    bulky=st.sampled_from([False, False, False, False, False, True]),
    reply=st.sampled_from(["nowhere", "inbox", "inbox", "inbox", "forbidden"]),
)
