"""The requests of a soak: every kind of valid and invalid request, drawn from a seed.

Each sending lists its allowed outcomes, which are checked after the soak.
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
LOST = str(FailureCode.WORKER_LOST)  # allowed for every request: its workers may all be killed
FORMATS = ("png", "webp", "jpeg")
SIDES = (16, 32, 64)  # pixels
OTHER_WIDTH = 48  # pixels; in the second request with one id
SLOW_STEPS = 60
LONG_RUN_STEPS = 60
SHORT_DEADLINE = 1.5  # seconds
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)

# Later steps of chains.
_DRAW = {"task": "text_to_image", "prompt": f"a chain {UNFATED}", "num_inference_steps": 2}
_READ = {"task": "image_to_text", "prompt": f"a chain {UNFATED}", "max_new_tokens": 2}

# The outcomes of each fate without other faults. A request that raises once may already be at its
# last attempt.
_OUTCOMES: dict[Fate, frozenset[str]] = {
    Fate.RAISES: frozenset({FailureCode.MODEL_ERROR}),
    Fate.RAISES_ONCE: frozenset({SUCCEEDED, FailureCode.MODEL_ERROR}),
    Fate.OUT_OF_MEMORY: frozenset({FailureCode.OUT_OF_MEMORY}),
    Fate.KILLED: frozenset({LOST}),
}
# Number in a hundred requests.
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
_COSTLY: dict[str, int] = {Fate.KILLED: 1, Fate.HANGS_ONCE: 1}  # each occupies a worker for long
_OTHER_KINDS: dict[str, int] = {
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
# Additional kinds with an attacker: every way to send a request.
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
    SUBMIT = "submit"  # with this project's client
    CALL = "call"


@dataclass(frozen=True)
class Sending:
    """One message to publish.

    Attributes:
        at: Seconds after the start of the soak.
        kind: Name of the kind in the report.
        request_id: Id of the terminal event.
        in_subject: Last token of the subject; None: the subject without an id.
        outcomes: All allowed outcomes except `worker_lost`.
        cancel_after: Seconds from the publish acknowledgement to the cancellation; None: never.
    """

    at: float
    kind: str
    request_id: str
    in_subject: str | None
    body: bytes
    headers: dict[str, str]
    outcomes: frozenset[str]
    way: Way = Way.PUBLISH
    cancel_after: float | None = None

    @property
    def message_id(self) -> str:
        """Return the id by which the stream discards a duplicate publish."""
        return self.headers[MESSAGE_ID]

    @property
    def digests(self) -> frozenset[str]:
        """Return the allowed digests of the terminal event: of the content and of the bytes."""
        digests = {digest_of_bytes(self.body)}
        with contextlib.suppress(InvalidRequest):
            digests.add(request_digest(decode_request(Task.TEXT_TO_IMAGE, self.body)))
        return frozenset(digests)


class Workload:
    """Draws sendings.

    Args:
        subjects: Subjects of the installation.
        seed: Determines everything except the deadlines.
        seconds: Duration over which the sendings are spread.
        costly: Whether to include requests that occupy a worker for long.
        hostile: Whether there is an attacker. Then each request has its id in the subject, so that
            workers can find the first of two requests with one id.
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
            **_OTHER_KINDS,
            **(_WITH_ATTACKER if hostile else {}),
        }

    def sendings(self, requests: int) -> list[Sending]:
        """Draw this number of requests, sorted by time; some are sent twice."""
        counts = Counter(
            {kind: max(1, round(requests * each / 100)) for kind, each in self._shares.items()}
        )
        counts[Fate.PLAIN] = max(0, requests - counts.total())
        kinds = list(counts.elements())
        self._draw.shuffle(kinds)
        drawn = [sending for kind in kinds[:requests] for sending in self._draw_kind(kind)]
        return sorted(drawn, key=lambda sending: sending.at)

    def _draw_kind(self, kind: str) -> list[Sending]:
        match kind:
            case "sent twice":
                return self._twice(kind, other_content=False)
            case "other content":
                return self._twice(kind, other_content=True)
            case Fate():
                sending = self._valid(kind, seed=seed_with(kind, self._draw))
            case "without a seed":
                sending = self._valid(kind)
            case "deadline past":
                outcomes = FailureCode.DEADLINE_EXCEEDED
                sending = self._valid(kind, outcomes, deadline=LONG_AGO.isoformat())
            case "deadline short":
                sending = self._with_short_deadline(kind)
            case kind if kind in _WITH_ATTACKER:
                sending = self._with_attacker(kind)
            case _:
                sending = self._invalid(kind)
        return [sending]

    # -- valid requests ---------------------------------------------------------------------------

    def _valid(self, kind: str, *outcomes: str, at: float | None = None, **fields: Any) -> Sending:
        request_id = self._new_id()
        in_subject, in_body = self._draw.choice([(True, False), (False, True), (True, True)])
        in_subject = in_subject or self._hostile
        prompt = request_id if "seed" in fields else f"{request_id} {UNFATED}"
        body = {"prompt": prompt, **self._content(kind), **fields}
        if in_body:
            body["request_id"] = request_id
        outcomes_of_fate = _OUTCOMES.get(kind) if isinstance(kind, Fate) else None
        return Sending(
            at=self._random_time() if at is None else at,
            kind=kind,
            request_id=request_id,
            in_subject=request_id if in_subject else None,
            body=json.dumps(body).encode(),
            headers={
                MESSAGE_ID: f"{request_id}.1",
                REPLY_TO: f"{self._subjects.root}.reply.{request_id}",
            },
            outcomes=frozenset(outcomes) or outcomes_of_fate or frozenset({SUCCEEDED}),
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
        # The only value that the seed does not determine: it depends on the current time.
        at = self._random_time()
        deadline = datetime.now(UTC) + timedelta(seconds=at + SHORT_DEADLINE)
        outcomes = SUCCEEDED, FailureCode.DEADLINE_EXCEEDED
        return self._valid(kind, *outcomes, at=at, deadline=deadline.isoformat())

    def _with_attacker(self, kind: str) -> Sending:
        match kind:
            case "call":
                sending = self._valid(kind)
                body = {**json.loads(sending.body), "request_id": sending.request_id}
                return replace(sending, body=json.dumps(body).encode(), way=Way.CALL)
            case "submitted":
                return replace(self._valid(kind), way=Way.SUBMIT)
            case "chain":
                return self._valid(kind, then=[_DRAW, _DRAW])
            case "chain of both tasks":
                return self._valid(kind, then=[_READ, {**_DRAW, "prompt": f"$text {UNFATED}"}])
            case _:
                sending = self._valid(
                    kind, SUCCEEDED, CANCELLED, num_inference_steps=LONG_RUN_STEPS
                )
                return replace(sending, cancel_after=self._draw.uniform(0.0, 1.0))

    def _twice(self, kind: str, *, other_content: bool) -> list[Sending]:
        # Long enough that two workers run the two requests at the same time.
        first = self._valid(kind, num_inference_steps=LONG_RUN_STEPS)
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
            outcomes=first.outcomes,
        )
        return [first, second]

    # -- invalid requests -------------------------------------------------------------------------

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
                body["request_id"] = self._new_id()  # must not affect the request with that id
        return Sending(
            at=self._random_time(),
            kind=kind,
            request_id=request_id,
            in_subject=in_subject,
            body=b'{"prompt": "soak"' if kind == "not JSON" else json.dumps(body).encode(),
            headers={MESSAGE_ID: f"{request_id}.1"},
            outcomes=frozenset({FailureCode.INVALID_REQUEST}),
        )

    def _new_id(self) -> str:
        return f"{self._draw.getrandbits(64):016x}"

    def _random_time(self) -> float:
        return self._draw.uniform(0.0, self._seconds)
