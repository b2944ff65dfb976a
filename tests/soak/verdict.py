"""Whether a soak has held what is promised: pure, from what was sent and what is left."""

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
# How a request ends whose bytes are put aside.
PUT_ASIDE = {FailureCode.INVALID_REQUEST, FailureCode.MODEL_ERROR, FailureCode.WORKER_LOST}
# Exit codes that need no explanation: ended as asked, device lost or hanging, no server at the
# start, killed, and asked to end before Python could listen.
EXPECTED_ENDS = {0, 70, 69, -9, -15}
# What a reply may say of another request that has the id and the reply subject of this one.
_OF_A_COPY = {FailureCode.REQUEST_ID_CONFLICT, FailureCode.INVALID_REQUEST}


@dataclass(frozen=True)
class Expected:
    """What is promised of one request.

    Attributes:
        kind: What people call it.
        ends: Every way it may end.
        digests: What its terminal event may say that it asks for.
        chain: The id of its chain's first request, which is its own where there is no chain.
    """

    kind: str
    task: Task
    ends: frozenset[str]
    digests: frozenset[str]
    chain: str


def problems(sendings: Sequence[Sending], records: Records, *, hostile: bool = False) -> list[str]:
    """Every promise that was not kept, one line each.

    Args:
        sendings: What honest senders have sent.
        records: What is left of it.
        hostile: Whether others have sent copies under the same ids, which may be put aside, and
            may be answered on the reply subjects of the honest ones.
    """
    wanted = expected(sendings, records.results)
    if hostile:
        records = _without_other_tasks(wanted, records)
    return [
        *_terminal_events(wanted, records),
        *_promises_of_answers(records),
        *_objects(sendings, wanted, records),
        *_dead_letters(sendings, records, hostile=hostile),
        *_replies(wanted, records, hostile=hostile),
        *_workers(records),
    ]


def expected(sendings: Sequence[Sending], results: Sequence[Stored]) -> dict[str, Expected]:
    """What is promised of each request, by its id: also of the later steps of chains.

    Those follow from the stored events of the steps before: a step that has failed has none.
    """
    wanted: dict[str, Expected] = {}
    task = Task.TEXT_TO_IMAGE
    events = {stored.place: stored.event for stored in results}
    for sending in sendings:
        one = sending.request_id
        digests = sending.digests | (wanted[one].digests if one in wanted else frozenset())
        wanted[one] = Expected(sending.kind, task, _possible(sending), digests, chain=one)
        if b'"then"' in sending.body:
            _follow(decode_request(task, sending.body), one, wanted[one], events, wanted)
    return wanted


def _without_other_tasks(wanted: Mapping[str, Expected], records: Records) -> Records:
    # Under the same id each task has requests of its own, here those of the attacker.
    def kept(task: str, request_id: str) -> bool:
        return request_id not in wanted or wanted[request_id].task == task

    return replace(
        records,
        results=[one for one in records.results if kept(one.task, one.request_id)],
        counts={key: count for key, count in records.counts.items() if kept(*key.split("."))},
    )


def _follow(
    request: Request,
    request_id: str,
    first: Expected,
    events: Mapping[str, Event],
    wanted: dict[str, Expected],
) -> None:
    event = events.get(f"{wanted[request_id].task}.{request_id}")
    if event is None or event["type"] != "generation.v1.succeeded":
        return
    result = SucceededEvent.model_validate(event)
    for task, following in next_requests(request, request_id, result):
        one = str(following.request_id)
        wanted[one] = replace(first, task=task, digests=frozenset({request_digest(following)}))
        _follow(following, one, first, events, wanted)


def _terminal_events(wanted: Mapping[str, Expected], records: Records) -> Iterator[str]:
    counts = Counter(stored.request_id for stored in records.results)
    if Counter(stored.place for stored in records.results) != Counter(records.counts):
        yield "the server counts other terminal events than it has"
    for request_id, one in wanted.items():
        if counts[request_id] != 1:
            yield f"{request_id} ({one.kind}): {counts[request_id]} terminal events"
    for stored in records.results:
        sent = wanted.get(stored.request_id)
        if sent is None:
            yield f"{stored.request_id}: a terminal event of a request that was never sent"
        elif stored.outcome not in sent.ends:
            yield f"{stored.request_id} ({sent.kind}): ended as {stored.outcome}"
        elif stored.event["request_digest"] not in sent.digests:
            yield f"{stored.request_id} ({sent.kind}): ended with the event of another request"
    if records.left or records.unsettled:
        yield f"{records.left} requests left in the queue, {records.unsettled} unsettled"


def _promises_of_answers(records: Records) -> Iterator[str]:
    for request_id in records.given_up:
        yield f"{request_id}: could not be sent"
    for request_id, status in records.cancellations.items():
        ends = {stored.outcome for stored in records.results if stored.request_id == request_id}
        if status == CANCELLED and ends != {CANCELLED}:
            yield f"{request_id}: is said to be cancelled, and ended as {', '.join(ends)}"


def _possible(sending: Sending) -> frozenset[str]:
    invalid = FailureCode.INVALID_REQUEST in sending.ends
    return sending.ends if invalid else sending.ends | {LOST}


def _objects(
    sendings: Sequence[Sending], wanted: Mapping[str, Expected], records: Records
) -> Iterator[str]:
    explained = set()
    for stored in records.results:
        for output in stored.event.get("outputs", ()):
            if "key" not in output:  # a text
                continue
            explained.add(output["key"])
            found = records.objects.get(output["key"])
            if found is None:
                yield f"{stored.request_id}: {output['key']} does not exist"
            elif found != output["sha256"]:
                yield f"{stored.request_id}: {output['key']} has other content than its event says"
    may_have_uploaded = _may_have_left_objects(sendings, wanted, records.results)
    for key in set(records.objects) - explained:
        request_id = key.split("/")[-2]
        probe = key.rpartition("/")[2].startswith("probe-")  # of a worker killed while starting
        if not probe and request_id not in may_have_uploaded:
            yield f"{key} belongs to no succeeded request"


def _may_have_left_objects(
    sendings: Sequence[Sending], wanted: Mapping[str, Expected], results: Sequence[Stored]
) -> set[str]:
    # Those that were interrupted between the upload and the result, for good; and where two
    # requests share an id, the one that was too late.
    succeeded = {stored.request_id for stored in results if stored.outcome == SUCCEEDED}
    shared = {sending.request_id for sending in sendings if sending.kind == OTHER_CONTENT}
    return {
        request_id
        for request_id, one in wanted.items()
        if SUCCEEDED in one.ends and (request_id in shared or request_id not in succeeded)
    }


def _dead_letters(sendings: Sequence[Sending], records: Records, *, hostile: bool) -> Iterator[str]:
    messages = Counter(sending.request_id for sending in sendings)
    letters = Counter(headers.get(DEAD_LETTER_REQUEST_ID, "") for headers in records.letters)
    dead_lettered = {stored.request_id for stored in records.results if stored.outcome in PUT_ASIDE}
    for request_id in dead_lettered - set(letters):
        yield f"{request_id}: no dead letter"
    if "" in letters:
        yield f"{letters['']} dead letters that no worker has written"
    if hostile:
        return  # copies of others are put aside under the same ids
    for request_id in set(letters) - dead_lettered:
        yield f"{request_id}: a dead letter, and another end"
    for request_id, count in letters.items():
        if count > messages[request_id]:
            yield f"{request_id}: {count} dead letters of {messages[request_id]} messages"


def _replies(wanted: Mapping[str, Expected], records: Records, *, hostile: bool) -> Iterator[str]:
    stored = {result.request_id: result.event for result in records.results}
    for request_id, replies in records.replies.items():
        for reply in replies:
            one = wanted.get(reply["request_id"])
            if hostile and (one is None or one.chain != request_id):
                continue  # of somebody else; it says so, and a client looks at it
            if reply != stored.get(reply["request_id"]) and not _of_a_copy(reply, one, hostile):
                yield f"{request_id}: a reply that is not the stored event"


def _of_a_copy(reply: Event, one: Expected | None, hostile: bool) -> bool:
    code = reply.get("failure", {}).get("code")
    if one is not None and one.kind == OTHER_CONTENT:
        return bool(code == FailureCode.REQUEST_ID_CONFLICT)
    another = one is not None and reply["request_digest"] not in one.digests
    return hostile and code in _OF_A_COPY and another


def _workers(records: Records) -> Iterator[str]:
    for code in set(records.ends) - EXPECTED_ENDS:
        yield f"a worker ended with {code}"
    yield from records.cries
    if records.orphans:
        yield f"processes left behind by killed workers: {records.orphans}"
