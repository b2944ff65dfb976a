"""What senders can ask for, what a run can come to, and where a job can be: of every kind."""

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
from tests.support.behaviour import INBOX, request_body
from tests.support.memory_ports import BUCKET, Script, make, out_of_memory, raising

MAX_PAYLOAD = 6_000  # bytes: more than any event without the sender's metadata
BULKY = {str(number): "x" * 512 for number in range(16)}  # what makes an event larger

# What a reply must never go to: the result of the first request.
FORBIDDEN = {task: Subjects().result(task, "r1") for task in Task}

Kind = Literal["valid", "malformed", "unsupported", "missing"]
Ending = Literal[
    "made", "varied", "nothing", "odd", "raised", "broken", "memory", "lost", "refused"
]

SCRIPTS: dict[Ending, Script] = {
    "made": make,
    "nothing": lambda _: RunnerOutput(),
    "odd": lambda _: RunnerOutput(images=(GeneratedImage(None, seed=0),)),  # type: ignore[arg-type]
    "raised": raising(lambda: ModelError("ValueError")),
    "broken": raising(lambda: KeyError("secret")),
    "memory": raising(out_of_memory),
    "lost": raising(DeviceLost),
    "refused": raising(lambda: UnsupportedParameter("width", "width: not this one")),
}
ENDINGS = st.sampled_from(["made", "made", "made", "varied", *SCRIPTS])


def within(ending: Ending, task: Task) -> Ending:
    """The end that a task's model can come to: texts are made one way only, and never odd."""
    only_pictures: dict[Ending, Ending] = {"varied": "made", "odd": "nothing"}
    return ending if task is Task.TEXT_TO_IMAGE else only_pictures.get(ending, ending)


def script(ending: Ending, number: int) -> Script:
    """What a run does.

    Args:
        ending: What it comes to.
        number: Of the run; no two give the same output where it varies.
    """
    if ending != "varied":
        return SCRIPTS[ending]
    picture = Image.new("RGB", (4, 4), (number & 255, number >> 8 & 255, 255))
    return lambda _: RunnerOutput(images=(GeneratedImage(picture, seed=0),))


@dataclass(frozen=True)
class Sent:
    """A request as it was published."""

    request_id: str
    digest: str
    kind: Kind
    deadline: datetime | None
    reply: bool  # whether the sender waits for an answer


@dataclass(frozen=True)
class Wish:
    """What a sender asks for.

    Attributes:
        again: Which request before this one has the same id; None for another id.
        kind: "refused" is what cannot be done for a reason that the task has.
        seconds: Until the deadline.
        bulky: Whether events that say its metadata are too large for the bus.
        reply: Where the answer is to go.
    """

    again: int | None
    prompt: str
    kind: Literal["valid", "malformed", "refused"]
    seconds: int | None
    bulky: bool
    reply: Literal["nowhere", "inbox", "forbidden"]

    def sent(self, task: Task, now: datetime, number: int) -> tuple[bytes, Sent]:
        """The request's bytes, and what to remember of it.

        Args:
            task: Of the workers.
            now: What the deadline is counted from.
            number: Of the request; from 1.
        """
        fields: dict[str, Any] = {"prompt": self.prompt}
        kind = self._unlike_others(task, fields)
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
        answered = self.reply == "inbox"
        body = request_body(name, **fields)
        if kind == "malformed":
            digest, deadline = f"sha256:{hashlib.sha256(body).hexdigest()}", None
        else:
            digest = request_digest(decode_request(task, body))
        return body, Sent(name, digest, kind, deadline, answered)

    def _unlike_others(self, task: Task, fields: dict[str, Any]) -> Kind:
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


class Place(NamedTuple):
    """Some point in some job.

    Attributes:
        which: Of the workers that have a job or can take one.
        calls: How many calls it makes until then; the end of a run is one.
        ending: What a run on the way comes to; None: it goes no further than to the run.
    """

    which: int
    calls: int
    ending: Ending | None


WHICH = st.integers(0, 5)
CALLS = st.integers(0, 24)  # a job makes some 10, with a stop before and after each
PLACES = st.builds(Place, WHICH, CALLS, ENDINGS)
WISHES = st.builds(
    Wish,
    again=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 11)),
    prompt=st.sampled_from(["a circle", "a circle", "a square"]),
    kind=st.sampled_from(["valid", "valid", "valid", "valid", "malformed", "refused"]),
    seconds=st.sampled_from([None, None, None, -1, 5, 20]),
    bulky=st.sampled_from([False, False, False, False, False, True]),
    reply=st.sampled_from(["nowhere", "inbox", "inbox", "inbox", "forbidden"]),
)
