"""Whether a soak has held what is promised: pure, from what was sent and what is left."""

from collections import Counter
from collections.abc import Iterator, Sequence

from generation_contracts import FailureCode
from generation_contracts.headers import DEAD_LETTER_REQUEST_ID
from tests.soak.records import Records, Stored
from tests.soak.workload import LOST, SUCCEEDED, Sending

OTHER_CONTENT = "other content"
# How a request ends whose bytes are put aside.
PUT_ASIDE = {FailureCode.INVALID_REQUEST, FailureCode.MODEL_ERROR, FailureCode.WORKER_LOST}
# Exit codes that need no explanation: ended as asked, device lost or hanging, no server at the
# start, killed, and asked to end before Python could listen.
EXPECTED_ENDS = {0, 70, 69, -9, -15}


def problems(sendings: Sequence[Sending], records: Records) -> list[str]:
    """Every promise that was not kept, one line each."""
    return [
        *_terminal_events(sendings, records),
        *_objects(sendings, records),
        *_dead_letters(sendings, records),
        *_replies(sendings, records),
        *_workers(records),
    ]


def _terminal_events(sendings: Sequence[Sending], records: Records) -> Iterator[str]:
    wanted = {sending.request_id: sending for sending in sendings}
    counts = Counter(stored.request_id for stored in records.results)
    if counts != Counter(records.counts):
        yield "the server counts other terminal events than it has"
    for request_id, sending in wanted.items():
        if counts[request_id] != 1:
            yield f"{request_id} ({sending.kind}): {counts[request_id]} terminal events"
    for stored in records.results:
        sent = wanted.get(stored.request_id)
        if sent is None:
            yield f"{stored.request_id}: a terminal event of a request that was never sent"
        elif stored.outcome not in _possible(sent):
            yield f"{stored.request_id} ({sent.kind}): ended as {stored.outcome}"
    if records.left or records.unsettled:
        yield f"{records.left} requests left in the queue, {records.unsettled} unsettled"


def _possible(sending: Sending) -> frozenset[str]:
    invalid = FailureCode.INVALID_REQUEST in sending.ends
    return sending.ends if invalid else sending.ends | {LOST}


def _objects(sendings: Sequence[Sending], records: Records) -> Iterator[str]:
    explained = set()
    for stored in records.results:
        for output in stored.event.get("outputs", ()):
            explained.add(output["key"])
            found = records.objects.get(output["key"])
            if found is None:
                yield f"{stored.request_id}: {output['key']} does not exist"
            elif found != output["sha256"]:
                yield f"{stored.request_id}: {output['key']} has other content than its event says"
    may_have_uploaded = _may_have_left_objects(sendings, records.results)
    for key in set(records.objects) - explained:
        request_id = key.split("/")[-2]
        probe = key.rpartition("/")[2].startswith("probe-")  # of a worker killed while starting
        if not probe and request_id not in may_have_uploaded:
            yield f"{key} belongs to no succeeded request"


def _may_have_left_objects(sendings: Sequence[Sending], results: Sequence[Stored]) -> set[str]:
    # Those that were interrupted between the upload and the result, for good; and where two
    # requests share an id, the one that was too late.
    succeeded = {stored.request_id for stored in results if stored.outcome == SUCCEEDED}
    return {
        sending.request_id
        for sending in sendings
        if SUCCEEDED in sending.ends
        and (sending.kind == OTHER_CONTENT or sending.request_id not in succeeded)
    }


def _dead_letters(sendings: Sequence[Sending], records: Records) -> Iterator[str]:
    messages = Counter(sending.request_id for sending in sendings)
    letters = Counter(headers[DEAD_LETTER_REQUEST_ID] for headers in records.letters)
    put_aside = {stored.request_id for stored in records.results if stored.outcome in PUT_ASIDE}
    for request_id in put_aside - set(letters):
        yield f"{request_id}: no dead letter"
    for request_id in set(letters) - put_aside:
        yield f"{request_id}: a dead letter, and another end"
    for request_id, count in letters.items():
        if count > messages[request_id]:
            yield f"{request_id}: {count} dead letters of {messages[request_id]} messages"


def _replies(sendings: Sequence[Sending], records: Records) -> Iterator[str]:
    stored = {result.request_id: result.event for result in records.results}
    kinds = {sending.request_id: sending.kind for sending in sendings}
    for request_id, replies in records.replies.items():
        for reply in replies:
            code = reply.get("failure", {}).get("code")
            conflict = code == FailureCode.REQUEST_ID_CONFLICT
            if conflict and kinds.get(request_id) == OTHER_CONTENT:
                continue
            if reply != stored.get(request_id):
                yield f"{request_id}: a reply that is not the stored event"


def _workers(records: Records) -> Iterator[str]:
    for code in set(records.ends) - EXPECTED_ENDS:
        yield f"a worker ended with {code}"
    yield from records.cries
    if records.orphans:
        yield f"processes left behind by killed workers: {records.orphans}"
