"""What a soak sends: every kind of request, good and bad, drawn from its seed.

Each sending says beforehand how it may end, so that the end can be checked.
"""

import contextlib
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from generation_contracts import (
    FailureCode,
    InvalidRequest,
    Subjects,
    Task,
    decode_request,
    request_digest,
)
from generation_contracts.headers import MESSAGE_ID, REPLY_TO
from generation_contracts.requests import digest_of_bytes
from tests.soak.fates import UNFATED, Fate, seed_with

SUCCEEDED = "succeeded"
CANCELLED = "cancelled"
LOST = str(FailureCode.WORKER_LOST)  # how any request may end whose workers were killed too often
FORMATS = ("png", "webp", "jpeg")
SIDES = (16, 32, 64)  # pixels
OTHER_WIDTH = 48  # pixels; of the same id with other content
SLOW_STEPS = 60
TWICE_STEPS = 60
SHORT_DEADLINE = 1.5  # seconds
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)

# Later steps of chains.
_DRAW = {"task": "text_to_image", "prompt": f"a chain {UNFATED}", "num_inference_steps": 2}
_READ = {"task": "image_to_text", "prompt": f"a chain {UNFATED}", "max_new_tokens": 2}

# How each fate ends when nothing else happens. Whose first run raises may be at its last attempt
# by then.
_ENDS: dict[Fate, frozenset[str]] = {
    Fate.RAISES: frozenset({FailureCode.MODEL_ERROR}),
    Fate.RAISES_ONCE: frozenset({SUCCEEDED, FailureCode.MODEL_ERROR}),
    Fate.OUT_OF_MEMORY: frozenset({FailureCode.OUT_OF_MEMORY}),
    Fate.KILLED: frozenset({LOST}),
}
# Of a hundred requests.
_FATES: dict[str, int] = {
    Fate.SLOW: 4,
    Fate.HOLDS_THE_GIL: 2,
    Fate.RAISES_ONCE: 4,
    Fate.RAISES: 4,
    Fate.OUT_OF_MEMORY_ONCE: 3,
    Fate.OUT_OF_MEMORY: 3,
    Fate.DEVICE_LOST_ONCE: 2,
    Fate.KILLED_ONCE: 2,
}
_COSTLY: dict[str, int] = {Fate.KILLED: 1, Fate.HANGS_ONCE: 1}  # each takes a worker for long
_OTHERS: dict[str, int] = {
    "without a seed": 10,
    "deadline past": 3,
    "deadline short": 4,
    "sent twice": 4,
    "other content": 4,
    "not JSON": 2,
    "unknown field": 2,
    "number too large": 2,
    "hostile reply subject": 2,
    "no request id": 2,
    "id of another subject": 2,
}
# On top of them, where there is an attacker: every way in which a request can be sent.
_WITH_ATTACKER: dict[str, int] = {
    "call": 6,
    "submitted": 6,
    "chain": 3,
    "chain of both tasks": 3,
    "cancelled": 3,
}


class Way(StrEnum):
    """How a request is sent."""

    PUBLISH = "publish"
    SUBMIT = "submit"  # by the client of this project
    CALL = "call"


@dataclass(frozen=True)
class Sending:
    """One message to be published.

    Attributes:
        at: Seconds after the beginning.
        kind: What people call it.
        request_id: Under which its one terminal event is stored.
        in_subject: What the subject's last token is; None sends it to the bare subject.
        ends: Every way it may end, `worker_lost` apart.
        cancel_after: Seconds from the stream's confirmation to its cancellation; None: never.
    """

    at: float
    kind: str
    request_id: str
    in_subject: str | None
    body: bytes
    headers: dict[str, str]
    ends: frozenset[str]
    way: Way = Way.PUBLISH
    cancel_after: float | None = None

    @property
    def message_id(self) -> str:
        """What makes a second try to publish it harmless."""
        return self.headers[MESSAGE_ID]

    @property
    def digests(self) -> frozenset[str]:
        """What its terminal event may say that it asks for: its content, or its bytes."""
        found = {digest_of_bytes(self.body)}
        with contextlib.suppress(InvalidRequest):
            found.add(request_digest(decode_request(Task.TEXT_TO_IMAGE, self.body)))
        return frozenset(found)


class Workload:
    """Draws sendings.

    Args:
        subjects: Of the installation.
        seed: Decides everything but the moments of the deadlines.
        seconds: Over which they are spread.
        costly: Whether there are some that take a worker for long.
        hostile: Whether there is an attacker: then each id is in its request's subject, where
            workers can see which of two requests was there first.
    """

    def __init__(
        self,
        subjects: Subjects,
        seed: int,
        *,
        seconds: float,
        costly: bool,
        hostile: bool = False,
    ) -> None:
        self._subjects = subjects
        self._draw = random.Random(f"{seed} workload")
        self._seconds = seconds
        self._hostile = hostile
        self._shares: dict[str, int] = {
            **_FATES,
            **(_COSTLY if costly else {}),
            **_OTHERS,
            **(_WITH_ATTACKER if hostile else {}),
        }

    def sendings(self, requests: int) -> list[Sending]:
        """So many requests, in the order of their moments; some of them are sent twice."""
        counts = Counter(
            {kind: max(1, round(requests * each / 100)) for kind, each in self._shares.items()}
        )
        counts[Fate.PLAIN] = max(0, requests - counts.total())
        kinds = list(counts.elements())
        self._draw.shuffle(kinds)
        made = [sending for kind in kinds[:requests] for sending in self._make(kind)]
        return sorted(made, key=lambda sending: sending.at)

    def _make(self, kind: str) -> list[Sending]:
        match kind:
            case "sent twice":
                return self._twice(kind, other_content=False)
            case "other content":
                return self._twice(kind, other_content=True)
            case Fate():
                made = self._valid(kind, seed=seed_with(kind, self._draw))
            case "without a seed":
                made = self._valid(kind)
            case "deadline past":
                ends = FailureCode.DEADLINE_EXCEEDED
                made = self._valid(kind, ends, deadline=LONG_AGO.isoformat())
            case "deadline short":
                made = self._with_short_deadline(kind)
            case kind if kind in _WITH_ATTACKER:
                made = self._otherwise(kind)
            case _:
                made = self._invalid(kind)
        return [made]

    # -- good ones --------------------------------------------------------------------------------

    def _valid(self, kind: str, *ends: str, at: float | None = None, **fields: Any) -> Sending:
        request_id = self._new_id()
        in_subject, in_body = self._draw.choice([(True, False), (False, True), (True, True)])
        in_subject = in_subject or self._hostile
        prompt = request_id if "seed" in fields else f"{request_id} {UNFATED}"
        body = {"prompt": prompt, **self._content(kind), **fields}
        if in_body:
            body["request_id"] = request_id
        as_fated = _ENDS.get(kind) if isinstance(kind, Fate) else None
        return Sending(
            at=self._moment() if at is None else at,
            kind=kind,
            request_id=request_id,
            in_subject=request_id if in_subject else None,
            body=json.dumps(body).encode(),
            headers={
                MESSAGE_ID: f"{request_id}.1",
                REPLY_TO: f"{self._subjects.root}.reply.{request_id}",
            },
            ends=frozenset(ends) or as_fated or frozenset({SUCCEEDED}),
        )

    def _content(self, kind: str) -> dict[str, Any]:
        return {
            "width": self._draw.choice(SIDES),
            "height": self._draw.choice(SIDES),
            "num_images": self._draw.choice([1, 1, 2, 3]),
            "output_format": self._draw.choice(FORMATS),
            "num_inference_steps": SLOW_STEPS if kind == Fate.SLOW else self._draw.randint(1, 20),
        }

    def _with_short_deadline(self, kind: str) -> Sending:
        # The one thing that cannot be drawn: when the sending's moment will be.
        at = self._moment()
        deadline = datetime.now(UTC) + timedelta(seconds=at + SHORT_DEADLINE)
        ends = SUCCEEDED, FailureCode.DEADLINE_EXCEEDED
        return self._valid(kind, *ends, at=at, deadline=deadline.isoformat())

    def _otherwise(self, kind: str) -> Sending:
        match kind:
            case "call":
                made = self._valid(kind)
                body = {**json.loads(made.body), "request_id": made.request_id}
                return replace(made, body=json.dumps(body).encode(), way=Way.CALL)
            case "submitted":
                return replace(self._valid(kind), way=Way.SUBMIT)
            case "chain":
                return self._valid(kind, then=[_DRAW, _DRAW])
            case "chain of both tasks":
                return self._valid(kind, then=[_READ, {**_DRAW, "prompt": f"$text {UNFATED}"}])
            case _:
                made = self._valid(kind, SUCCEEDED, CANCELLED, num_inference_steps=TWICE_STEPS)
                return replace(made, cancel_after=self._draw.uniform(0.0, 1.0))

    def _twice(self, kind: str, *, other_content: bool) -> list[Sending]:
        # Long enough for two workers to have one each.
        first = self._valid(kind, num_inference_steps=TWICE_STEPS)
        body = json.loads(first.body)
        if other_content:
            body["width"] = OTHER_WIDTH
        second = Sending(
            at=first.at + self._draw.choice([0.0, 0.0, 0.1, 5.0]),
            kind=kind,
            request_id=first.request_id,
            in_subject=first.in_subject,
            body=json.dumps(body).encode(),
            headers={**first.headers, MESSAGE_ID: f"{first.request_id}.2"},
            ends=first.ends,
        )
        return [first, second]

    # -- bad ones ---------------------------------------------------------------------------------

    def _invalid(self, kind: str) -> Sending:
        request_id = self._new_id()
        body: dict[str, Any] = {"prompt": "soak", "request_id": request_id}
        in_subject: str | None = request_id
        match kind:
            case "unknown field":
                body["colour"] = "red"
            case "number too large":
                body["seed"] = 2**40
            case "hostile reply subject":
                body["reply_to"] = f"$JS.API.STREAM.DELETE.{self._subjects.results_stream}"
            case "no request id":
                body["request_id"] = "../*/>"
            case "id of another subject":
                body["request_id"] = self._new_id()  # it must not end that one
        return Sending(
            at=self._moment(),
            kind=kind,
            request_id=request_id,
            in_subject=in_subject,
            body=b'{"prompt": "soak"' if kind == "not JSON" else json.dumps(body).encode(),
            headers={MESSAGE_ID: f"{request_id}.1"},
            ends=frozenset({FailureCode.INVALID_REQUEST}),
        )

    def _new_id(self) -> str:
        return f"{self._draw.getrandbits(64):016x}"

    def _moment(self) -> float:
        return self._draw.uniform(0.0, self._seconds)
