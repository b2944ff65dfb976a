"""Checks of every guarantee after a soak, from the sendings and the records. No I/O."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from generation_contracts import (
    FailureCode,
    Request,
    SucceededEvent,
    Task,
    decode_request,
    next_requests,
    request_digest,
)
from generation_contracts.headers import DEAD_LETTER_REQUEST_ID
from tests.soak.records import Event, Records, Stored
from tests.soak.workload import CANCELLED, LOST, SUCCEEDED, Sending

OTHER_CONTENT = "other content"
# Outcomes of requests whose message becomes a dead letter.
DEAD_LETTERED = {FailureCode.INVALID_REQUEST, FailureCode.MODEL_ERROR, FailureCode.WORKER_LOST}
# Expected exit codes: stopped by SIGTERM, device lost or stalled, no server at the start, killed,
# and SIGTERM before Python installed its handler.
EXPECTED_EXIT_CODES = {0, 70, 69, -9, -15}
# Failure codes of replies to another request with the same id and reply subject.
_CODES_OF_COPIES = {FailureCode.REQUEST_ID_CONFLICT, FailureCode.INVALID_REQUEST}


@dataclass(frozen=True)
class Expected:
    """The guarantees for one request.

    Attributes:
        kind: Name of the kind in the report.
        outcomes: All allowed outcomes.
        digests: The allowed request digests of the terminal event.
        chain: The id of the first request of the chain, or of the request without a chain.
    """

    kind: str
    task: Task
    outcomes: frozenset[str]
    digests: frozenset[str]
    chain: str


def problems(sendings: Sequence[Sending], records: Records, *, hostile: bool = False) -> list[str]:
    """Return every violated guarantee, one line each.

    Args:
        sendings: The messages of honest senders.
        records: The state after the soak.
        hostile: Whether an attacker has sent copies under the same ids. The copies may become dead
            letters, and may get replies on the reply subjects of the honest requests.
    """
    expectations = expected(sendings, records.results)
    if hostile:
        records = _without_other_tasks(expectations, records)
    return [
        *_terminal_events(expectations, records),
        *_cancellations(records),
        *_objects(sendings, expectations, records),
        *_dead_letters(sendings, records, hostile=hostile),
        *_replies(expectations, records, hostile=hostile),
        *_workers(records),
    ]


def expected(sendings: Sequence[Sending], results: Sequence[Stored]) -> dict[str, Expected]:
    """Return the guarantees for each request by id, including later steps of chains.

    The later steps follow from the stored events. A failed step has no next step.
    """
    expectations: dict[str, Expected] = {}
    task = Task.TEXT_TO_IMAGE
    events = {stored.subject_tail: stored.event for stored in results}
    for sending in sendings:
        one = sending.request_id
        digests = sending.digests | (
            expectations[one].digests if one in expectations else frozenset()
        )
        expectations[one] = Expected(
            sending.kind, task, _allowed_outcomes(sending), digests, chain=one
        )
        if b'"then"' in sending.body:
            _follow(
                decode_request(task, sending.body), one, expectations[one], events, expectations
            )
    return expectations


def _without_other_tasks(expectations: Mapping[str, Expected], records: Records) -> Records:
    # Each task has separate request ids; requests of the other task are the attacker's.
    def of_this_task(task: str, request_id: str) -> bool:
        return request_id not in expectations or expectations[request_id].task == task

    return replace(
        records,
        results=[one for one in records.results if of_this_task(one.task, one.request_id)],
        counts={
            key: count for key, count in records.counts.items() if of_this_task(*key.split("."))
        },
    )


def _follow(
    request: Request,
    request_id: str,
    first: Expected,
    events: Mapping[str, Event],
    expectations: dict[str, Expected],
) -> None:
    event = events.get(f"{expectations[request_id].task}.{request_id}")
    if event is None or event["type"] != "generation.v1.succeeded":
        return
    result = SucceededEvent.model_validate(event)
    for task, following in next_requests(request, request_id, result):
        one = str(following.request_id)
        expectations[one] = replace(
            first, task=task, digests=frozenset({request_digest(following)})
        )
        _follow(following, one, first, events, expectations)


def _terminal_events(expectations: Mapping[str, Expected], records: Records) -> Iterator[str]:
    counts = Counter(stored.request_id for stored in records.results)
    if Counter(stored.subject_tail for stored in records.results) != Counter(records.counts):
        yield "the server's count of terminal events differs from its messages"
    for request_id, one in expectations.items():
        if counts[request_id] != 1:
            yield f"{request_id} ({one.kind}): {counts[request_id]} terminal events"
    for stored in records.results:
        sent = expectations.get(stored.request_id)
        if sent is None:
            yield f"{stored.request_id}: a terminal event of a request that was never sent"
        elif stored.outcome not in sent.outcomes:
            yield f"{stored.request_id} ({sent.kind}): ended as {stored.outcome}"
        elif stored.event["request_digest"] not in sent.digests:
            yield f"{stored.request_id} ({sent.kind}): ended with the event of another request"
    if records.remaining or records.unsettled:
        yield f"{records.remaining} requests left in the queue, {records.unsettled} unsettled"


def _cancellations(records: Records) -> Iterator[str]:
    for request_id in records.unsent:
        yield f"{request_id}: could not be sent"
    for request_id, status in records.cancellations.items():
        outcomes = {stored.outcome for stored in records.results if stored.request_id == request_id}
        if status == CANCELLED and outcomes != {CANCELLED}:
            yield f"{request_id}: reply `cancelled`, but the outcome is {', '.join(outcomes)}"


def _allowed_outcomes(sending: Sending) -> frozenset[str]:
    invalid = FailureCode.INVALID_REQUEST in sending.outcomes
    return sending.outcomes if invalid else sending.outcomes | {LOST}


def _objects(
    sendings: Sequence[Sending], expectations: Mapping[str, Expected], records: Records
) -> Iterator[str]:
    referenced = set()
    for stored in records.results:
        for output in stored.event.get("outputs", ()):
            if "key" not in output:  # a text
                continue
            referenced.add(output["key"])
            found = records.objects.get(output["key"])
            if found is None:
                yield f"{stored.request_id}: {output['key']} does not exist"
            elif found != output["sha256"]:
                yield f"{stored.request_id}: {output['key']} has another SHA-256 than in its event"
    may_have_uploaded = _may_have_left_objects(sendings, expectations, records.results)
    for key in set(records.objects) - referenced:
        request_id = key.split("/")[-2]
        probe = key.rpartition("/")[2].startswith("probe-")  # from a worker killed during its start
        if not probe and request_id not in may_have_uploaded:
            yield f"{key} belongs to no succeeded request"


def _may_have_left_objects(
    sendings: Sequence[Sending], expectations: Mapping[str, Expected], results: Sequence[Stored]
) -> set[str]:
    # A request without success may have been interrupted between the upload and the result. Of two
    # requests with one id, the later one may have uploaded too.
    succeeded = {stored.request_id for stored in results if stored.outcome == SUCCEEDED}
    shared = {sending.request_id for sending in sendings if sending.kind == OTHER_CONTENT}
    return {
        request_id
        for request_id, one in expectations.items()
        if SUCCEEDED in one.outcomes and (request_id in shared or request_id not in succeeded)
    }


def _dead_letters(sendings: Sequence[Sending], records: Records, *, hostile: bool) -> Iterator[str]:
    messages = Counter(sending.request_id for sending in sendings)
    letters = Counter(headers.get(DEAD_LETTER_REQUEST_ID, "") for headers in records.letters)
    dead_lettered = {
        stored.request_id for stored in records.results if stored.outcome in DEAD_LETTERED
    }
    for request_id in dead_lettered - set(letters):
        yield f"{request_id}: no dead letter"
    if "" in letters:
        yield f"{letters['']} dead letters without a request id"
    if hostile:
        return  # the attacker's copies become dead letters under the same ids
    for request_id in set(letters) - dead_lettered:
        yield f"{request_id}: a dead letter, but another outcome"
    for request_id, count in letters.items():
        if count > messages[request_id]:
            yield f"{request_id}: {count} dead letters of {messages[request_id]} messages"


def _replies(
    expectations: Mapping[str, Expected], records: Records, *, hostile: bool
) -> Iterator[str]:
    stored = {result.request_id: result.event for result in records.results}
    for request_id, replies in records.replies.items():
        for reply in replies:
            one = expectations.get(reply["request_id"])
            if hostile and (one is None or one.chain != request_id):
                continue  # has another request id, which a client checks
            if reply != stored.get(reply["request_id"]) and not _is_for_a_copy(reply, one, hostile):
                yield f"{request_id}: a reply that is not the stored event"


def _is_for_a_copy(reply: Event, one: Expected | None, hostile: bool) -> bool:
    code = reply.get("failure", {}).get("code")
    if one is not None and one.kind == OTHER_CONTENT:
        return bool(code == FailureCode.REQUEST_ID_CONFLICT)
    other_digest = one is not None and reply["request_digest"] not in one.digests
    return hostile and code in _CODES_OF_COPIES and other_digest


def _workers(records: Records) -> Iterator[str]:
    for code in set(records.exit_codes) - EXPECTED_EXIT_CODES:
        yield f"a worker exited with {code}"
    yield from records.forbidden_lines
    if records.orphans:
        yield f"processes left behind by killed workers: {records.orphans}"
