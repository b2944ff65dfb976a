"""Dead letters on a real server: listing, reading, and replays with interruptions."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from nats.js.api import RawStreamMsg
from nats.js.errors import NotFoundError

from consumer.bus.connection import Bus, BusUnavailable
from consumer.bus.dead_letters import listing as dead_letters
from consumer.bus.dead_letters import replay as replaying
from consumer.bus.dead_letters.listing import DeadLetterNotFound, DeadLetters, StoredDeadLetter
from consumer.bus.dead_letters.replay import NotReplayed, Replay, Replayer
from consumer.bus.delivery import JetStreamDelivery
from consumer.bus.reading import StoredMessage
from consumer.jobs.admission import Admission
from consumer.ports.bus import DeadLetter, ResultEvent
from generation_client import QueueFull
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    Failure,
    FailureCode,
    InvalidRequest,
    SucceededEvent,
    decode_request,
    request_digest,
)
from generation_contracts.examples import EVENTS
from generation_contracts.headers import (
    DEAD_LETTER_REQUEST_ID,
    DEAD_LETTER_SUBJECT,
    DEAD_LETTER_TRUNCATED,
    MESSAGE_ID,
)
from generation_contracts.queues import default_queues
from tests.integration.bus_installation import (
    DEAD_LETTERS,
    OTHER_REQUESTS,
    REQUESTS,
    RESULTS,
    TASK,
    Installation,
    Worker,
    measured,
    soon,
    take,
    until_connected,
)

ROOT = "generation.request.text_to_image"
BODY = b'{"prompt": "a", "request_id": "r-1"}'
DIGEST = request_digest(decode_request(TASK, BODY))
OTHER_DIGEST = "sha256:" + "0" * 64


class Interruption(Exception):  # noqa: N818 - not an error of the product
    """Interrupts a replay."""


def digest_of(delivery: JetStreamDelivery, installation: Installation) -> tuple[str, str]:
    """Return the id and the digest that a worker gives to a request."""
    admission = Admission(TASK, installation.subjects, ("_INBOX.",))
    job = admission.open(delivery)
    try:
        return job.request_id, request_digest(admission.request(delivery))
    except InvalidRequest:
        return job.request_id, job.digest


def failed(
    request_id: str, digest: str, code: FailureCode = FailureCode.MODEL_ERROR
) -> FailedEvent:
    event = EVENTS["failed_model_error"]
    assert isinstance(event, FailedEvent)
    changes = {"request_id": request_id, "request_digest": digest, "task": TASK}
    return event.model_copy(update={**changes, "failure": Failure.of(code, "no")})


def succeeded(request_id: str, digest: str) -> SucceededEvent:
    event = EVENTS["succeeded_image"]
    assert isinstance(event, SucceededEvent)
    return event.model_copy(update={"request_id": request_id, "request_digest": digest})


def cancelled(request_id: str, digest: str) -> CancelledEvent:
    event = EVENTS["cancelled"]
    assert isinstance(event, CancelledEvent)
    changes = {"request_id": request_id, "request_digest": digest, "task": TASK}
    return event.model_copy(update=changes)


class Setup:
    """An installation, a worker that fails its requests, and the operator's client."""

    def __init__(self, installation: Installation, worker: Worker) -> None:
        self.installation = installation
        self.worker = worker
        self.letters = DeadLetters(installation.bus, installation.subjects)
        self.replayer = Replayer(installation.bus, installation.subjects)
        self.jetstream = installation.plain.jetstream()

    async def dead_letter(self, delivery: JetStreamDelivery) -> StoredDeadLetter:
        """Store the dead letter of a delivery, as a worker does."""
        request_id, _ = digest_of(delivery, self.installation)
        letter = DeadLetter("model_error", "the model failed", request_id, "w-1")
        await self.installation.events.dead_letter(TASK, delivery, letter)
        return (await self.list_all())[-1]

    async def fail(self, *, letter: bool = True) -> str:
        """Take the next request and fail it; return the request's id."""
        delivery = await take(self.worker)
        if letter:
            await self.dead_letter(delivery)
        request_id, digest = digest_of(delivery, self.installation)
        assert await self.end(failed(request_id, digest))
        await delivery.term("model_error")
        return request_id

    async def end(self, event: ResultEvent) -> bool:
        """Publish a terminal event; return whether it is the stored one."""
        stored = await soon(self.installation.events.publish_result(event, trace_parent=None))
        return stored == event

    async def letter(
        self,
        body: bytes = BODY,
        *,
        request_id: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> StoredDeadLetter:
        """Publish a request, and fail it; return its dead letter with the body."""
        await self.installation.publish(body, request_id=request_id, headers=headers)
        await self.fail()
        return await self.letters.read((await self.list_all())[-1].sequence)

    async def forge(self, headers: dict[str, str], task: str = str(TASK)) -> StoredDeadLetter:
        """Publish a dead letter as another client would; return it with the body."""
        stored = await self.jetstream.publish(f"generation.dead.{task}", BODY, headers=headers)
        return await self.letters.read(stored.seq)

    async def list_all(self) -> list[StoredDeadLetter]:
        return [letter async for letter in self.letters.list_all()]

    async def event(self, request_id: str = "r-1") -> RawStreamMsg | None:
        """Return the stored terminal event."""
        try:
            return await self.jetstream.get_last_msg(
                RESULTS, f"generation.result.text_to_image.{request_id}"
            )
        except NotFoundError:
            return None

    async def counts(self) -> tuple[int, int, int]:
        """Return the numbers of requests, results and dead letters."""
        count = self.installation.count
        return await count(REQUESTS), await count(RESULTS), await count(DEAD_LETTERS)

    async def assert_refused(self, letter: StoredDeadLetter, reason: str) -> None:
        """Check that a replay of the letter is refused and changes nothing."""
        before = await self.counts()
        with pytest.raises(NotReplayed, match=reason):
            await self.replayer.replay(letter)
        assert await self.counts() == before


@pytest.fixture
async def setup(installation: Installation) -> Setup:
    return Setup(installation, await installation.worker())


# -- list -----------------------------------------------------------------------------------------


async def test_a_stream_without_dead_letters_gives_an_empty_list(setup: Setup) -> None:
    assert await setup.list_all() == []


async def test_a_listed_dead_letter_has_its_headers_and_no_body(setup: Setup) -> None:
    await setup.letter(b"\x00not json", request_id="r-1", headers={"Title": "Grüße"})
    (letter,) = await setup.list_all()
    assert (letter.sequence, letter.task, letter.request_id) == (1, TASK, "r-1")
    assert (letter.code, letter.reason) == ("model_error", "the model failed")
    assert (letter.attempts, letter.worker) == ("1", "w-1")
    assert letter.subject == f"{ROOT}.r-1"
    assert letter.originals == {"Title": "Grüße"}
    assert (letter.size, letter.body, letter.truncated) == (9, None, False)
    assert letter.stored_at.tzinfo is not None


CODE = {"Dead-Letter-Code": "model_error"}  # a header of every dead letter of a worker


@pytest.mark.parametrize("count", [2, 3, 4, 6, 7])
async def test_a_listing_with_several_pull_requests_is_complete(
    setup: Setup, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "BATCH", 3)
    for number in range(count):
        await setup.jetstream.publish(
            "generation.dead.text_to_image", b"%d" % number, headers=dict(CODE)
        )
    # A message without a code is a reply of the server to a request of a sender.
    await setup.jetstream.publish("generation.dead.text_to_image", b"reply")
    assert [letter.sequence for letter in await soon(setup.list_all())] == [*range(1, count + 1)]


async def test_a_listing_omits_later_dead_letters_and_leaves_no_consumer(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        dead_letters, "BATCH", 1
    )  # the next pull request would find the later dead letter
    await setup.forge(dict(CODE))
    sequences = []
    async for letter in setup.letters.list_all():
        sequences.append(letter.sequence)
        await setup.forge(dict(CODE))
    assert sequences == [1]
    assert await setup.jetstream.consumers_info(DEAD_LETTERS) == []


async def test_thousands_of_dead_letters_are_listed(setup: Setup) -> None:
    for number in range(3_000):
        await setup.installation.plain.publish(
            "generation.dead.text_to_image", b"x" * 1_000, headers=dict(CODE)
        )
        if number % 500 == 0:
            await setup.installation.plain.flush()
    await setup.forge(dict(CODE))
    started = asyncio.get_running_loop().time()
    assert len(await soon(setup.list_all())) == 3_001
    measured("list of 3,001 letters", asyncio.get_running_loop().time() - started)


# -- read -----------------------------------------------------------------------------------------


async def test_a_dead_letter_is_read_with_its_whole_body(setup: Setup) -> None:
    body = bytes(range(256))
    letter = await setup.letter(body, request_id="r-1", headers={"Title": "Grüße"})
    assert (letter.body, letter.size) == (body, 256)
    assert letter.originals == {"Title": "Grüße"}
    (listed,) = await setup.list_all()
    assert letter.headers == listed.headers
    # nats-py rounds one time to microseconds and truncates the other one.
    assert abs(letter.stored_at - listed.stored_at) <= timedelta(microseconds=1)


async def test_a_dead_letter_with_an_empty_body_is_read(setup: Setup) -> None:
    stored = await setup.jetstream.publish("generation.dead.text_to_image", b"")
    assert (await setup.letters.read(stored.seq)).body == b""


@pytest.mark.parametrize("sequence", [0, 1, 2**63, 2**64, -1])
async def test_an_unknown_sequence_is_not_found(setup: Setup, sequence: int) -> None:
    with pytest.raises(DeadLetterNotFound):
        await setup.letters.read(sequence)


@pytest.mark.parametrize("missing", [DEAD_LETTERS, REQUESTS, RESULTS])
async def test_a_missing_stream_is_reported_by_name(setup: Setup, missing: str) -> None:
    letter = await setup.letter()
    await setup.installation.api(f"STREAM.DELETE.{missing}")
    calls: list[Awaitable[object]] = [setup.replayer.replay(letter)]
    if missing == DEAD_LETTERS:
        calls += [setup.list_all(), setup.letters.read(1)]
    for call in calls:
        with pytest.raises(BusUnavailable, match=f"there is no stream {missing}; run `consumer"):
            await call


# -- replay ---------------------------------------------------------------------------------------


async def test_a_replay_deletes_the_event_and_publishes_the_request_again(
    setup: Setup,
) -> None:
    headers = {
        MESSAGE_ID: "m-1",
        "Nats-Expected-Last-Subject-Sequence": "0",
        "nats-ttl": "1h",
        "Reply-To": "_INBOX.x",
        "Title": "Grüße",
        "Original-Title": "twice",
    }
    letter = await setup.letter(headers=headers)
    assert await setup.counts() == (0, 1, 1)

    assert await setup.replayer.replay(letter) is Replay.PUBLISHED

    assert await setup.counts() == (1, 0, 0)
    again = await take(setup.worker)
    assert (again.subject, again.body, again.attempt) == (f"{ROOT}.r-1", BODY, 1)
    expected = {"Reply-To": "_INBOX.x", "Title": "Grüße", "Original-Title": "twice"}
    message_id = again.headers[MESSAGE_ID]
    assert again.headers == {**expected, MESSAGE_ID: message_id}
    assert message_id.startswith(f"{DEAD_LETTERS}-1-")
    assert message_id.endswith(".replay")


@pytest.mark.parametrize(
    ("body", "token", "headers"),
    [
        (BODY, None, {}),
        (b'{"prompt": "a"}', "r-1", {}),
        (b'{"prompt": "a"}', None, {MESSAGE_ID: "m-1"}),
        (b'{"prompt": "a"}', None, {MESSAGE_ID: "no id"}),
        (b'{"prompt": "a"}', None, {}),
        (b"nonsense", None, {}),
        (b"nonsense", "r-1", {}),
    ],
)
async def test_a_replayed_request_keeps_its_id(
    setup: Setup, body: bytes, token: str | None, headers: dict[str, str]
) -> None:
    letter = await setup.letter(body, request_id=token, headers=headers)
    await setup.replayer.replay(letter)
    assert await setup.fail() == letter.request_id
    assert await setup.event(letter.request_id) is not None


async def test_a_replay_publishes_to_the_original_subject(setup: Setup) -> None:
    letter = await setup.letter(BODY, request_id="r-2")
    assert letter.request_id == "r-2", "the id of the subject"
    await setup.replayer.replay(letter)
    assert (await take(setup.worker)).subject == f"{ROOT}.r-2"


async def test_a_replayed_request_gets_a_new_stored_result_within_the_duplicate_window(
    setup: Setup,
) -> None:
    letter = await setup.letter()
    await setup.replayer.replay(letter)
    request_id, digest = digest_of(await take(setup.worker), setup.installation)
    assert await setup.end(succeeded(request_id, digest))
    stored = await setup.event()
    assert stored is not None
    assert json.loads(stored.data or b"")["type"] == "generation.v1.succeeded"
    assert not await setup.end(failed(request_id, digest)), "a second event is not stored"


async def test_a_replay_is_published_although_a_sender_has_used_its_message_id(
    setup: Setup,
) -> None:
    """The stream reports a duplicate, which is another message."""
    letter = await setup.letter()
    await clear_results(setup)
    message_id = replaying._Attempt.of(
        letter, setup.installation.subjects, default_queues()
    ).message_id
    await setup.installation.publish(b"foreign", headers={MESSAGE_ID: message_id})
    assert await setup.replayer.replay(letter) is Replay.PUBLISHED
    await (await take(setup.worker)).ack()
    assert (await take(setup.worker)).body == letter.body


@pytest.mark.parametrize(
    "subject",
    ["$JS.API.STREAM.DELETE.GENERATION_RESULTS", "generation.dead.text_to_image", f"{ROOT}.*", ""],
)
async def test_a_replay_does_not_publish_to_a_forged_subject(setup: Setup, subject: str) -> None:
    letter = await setup.forge({DEAD_LETTER_REQUEST_ID: "r-1", DEAD_LETTER_SUBJECT: subject})
    assert await setup.replayer.replay(letter) is Replay.PUBLISHED
    assert (await take(setup.worker)).subject == f"{ROOT}.r-1"
    assert await setup.installation.count(DEAD_LETTERS) == 0


async def test_a_dead_letter_with_the_sequence_of_a_deleted_stream_is_replayed(
    setup: Setup,
) -> None:
    first = await setup.letter()
    await setup.replayer.replay(first)
    await (await take(setup.worker)).ack()
    config = (await setup.installation.api(f"STREAM.INFO.{DEAD_LETTERS}"))["config"]
    await setup.installation.api(f"STREAM.DELETE.{DEAD_LETTERS}")
    await setup.installation.api(f"STREAM.CREATE.{DEAD_LETTERS}", config)
    second = await setup.forge({DEAD_LETTER_REQUEST_ID: "r-2"})
    assert (second.sequence, first.sequence) == (1, 1)
    assert await setup.replayer.replay(second) is Replay.PUBLISHED
    assert (await take(setup.worker)).headers[MESSAGE_ID].endswith(".replay")


async def test_a_listed_dead_letter_without_its_body_cannot_be_replayed(setup: Setup) -> None:
    await setup.letter()
    (listed,) = await setup.list_all()
    with pytest.raises(ValueError, match="read"):
        await setup.replayer.replay(listed)


# -- refused replays ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "task", "reason"),
    [
        pytest.param(
            {DEAD_LETTER_REQUEST_ID: "r-1", DEAD_LETTER_TRUNCATED: "2000000"},
            TASK,
            "truncated",
            id="truncated",
        ),
        pytest.param({}, TASK, "the id of the request", id="no id"),
        pytest.param({DEAD_LETTER_REQUEST_ID: "*"}, TASK, "the id of the request", id="bad id"),
        pytest.param(
            {DEAD_LETTER_REQUEST_ID: "r"}, "other", "its queue does not exist", id="unknown queue"
        ),
    ],
)
async def test_an_incomplete_dead_letter_is_not_replayed(
    setup: Setup, headers: dict[str, str], task: str, reason: str
) -> None:
    await setup.assert_refused(await setup.forge(headers, task), reason)


async def test_a_request_with_a_result_needs_no_replay(setup: Setup) -> None:
    letter = await setup.letter()
    await clear_results(setup)
    assert await setup.end(succeeded("r-1", DIGEST))
    assert await setup.replayer.replay(letter) is Replay.ALREADY_SUCCEEDED
    assert await setup.counts() == (0, 1, 0)
    stored = await setup.event()
    assert stored is not None
    assert b"succeeded" in (stored.data or b"")


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        pytest.param(
            succeeded("r-1", OTHER_DIGEST),
            "another request with its id has succeeded",
            id="another request succeeded",
        ),
        pytest.param(
            failed("r-1", OTHER_DIGEST), "belongs to another request", id="another request failed"
        ),
        pytest.param(
            cancelled("r-1", OTHER_DIGEST), "cancelled since", id="another request cancelled"
        ),
        pytest.param(cancelled("r-1", DIGEST), "has been cancelled since", id="cancelled"),
    ],
)
async def test_a_request_with_a_foreign_or_cancelled_event_is_not_replayed(
    setup: Setup, event: ResultEvent, reason: str
) -> None:
    letter = await setup.letter()
    await clear_results(setup)
    assert await setup.end(event)
    await setup.assert_refused(letter, reason)


LATER = b'{"type":"generation.v9.done","request_id":"r-1","task":"text_to_image"}'


async def test_a_request_with_an_unreadable_event_is_not_replayed(setup: Setup) -> None:
    letter = await setup.letter()
    await clear_results(setup)
    await setup.jetstream.publish("generation.result.text_to_image.r-1", LATER)
    await setup.assert_refused(letter, "cannot be read")


async def test_a_request_in_progress_is_not_replayed(setup: Setup) -> None:
    await setup.installation.publish(BODY)
    delivery = await take(setup.worker)
    letter = await setup.letters.read((await setup.dead_letter(delivery)).sequence)
    await setup.assert_refused(letter, "a worker has not settled the request yet")
    assert await setup.end(failed("r-1", DIGEST))
    await setup.assert_refused(letter, "a worker has not settled the request yet")
    await delivery.term("model_error")
    assert await setup.replayer.replay(letter) is Replay.PUBLISHED


async def test_another_request_with_its_sequence_does_not_block_a_replay(
    setup: Setup,
) -> None:
    sequence = await setup.installation.publish()
    headers = {DEAD_LETTER_REQUEST_ID: "r-1", MESSAGE_ID: f"{REQUESTS}-{sequence}-1a2b3c.dead"}
    assert await setup.replayer.replay(await setup.forge(headers)) is Replay.PUBLISHED


async def test_a_queued_request_is_not_replayed(setup: Setup) -> None:
    letter = await setup.letter()
    await setup.installation.publish(BODY, request_id="r-1")
    await setup.assert_refused(letter, "in the queue already")


async def test_a_dead_letter_of_another_task_is_compared_with_the_queue_of_that_task(
    setup: Setup,
) -> None:
    stored = await setup.jetstream.publish("generation.request.image_to_text.r-1", BODY)
    request = await setup.jetstream.get_msg(OTHER_REQUESTS, stored.seq)
    assert request.time is not None
    message_id = f"{OTHER_REQUESTS}-{stored.seq}-{int(request.time.timestamp()):x}.dead"
    identified = {DEAD_LETTER_REQUEST_ID: "r-1"}
    letter = await setup.forge({**identified, MESSAGE_ID: message_id}, "image_to_text")
    await setup.assert_refused(letter, "a worker has not settled the request yet")
    letter = await setup.forge(identified, "image_to_text")
    await setup.assert_refused(letter, "in the queue already")
    await setup.installation.api(f"STREAM.PURGE.{OTHER_REQUESTS}")
    assert await setup.replayer.replay(letter) is Replay.PUBLISHED
    count = setup.installation.count
    assert (await count(OTHER_REQUESTS), await count(REQUESTS)) == (1, 0)


@pytest.mark.parametrize("limits", [{"max_msgs": 2}, {"max_bytes": 600}])
async def test_a_replay_into_a_full_queue_changes_nothing(
    setup: Setup, limits: dict[str, int]
) -> None:
    letter = await setup.letter()
    await limit(setup, REQUESTS, **limits)
    for _ in range(2):
        await setup.installation.publish(b"x" * 200)
    before = await setup.counts()
    with pytest.raises(QueueFull):
        await setup.replayer.replay(letter)
    assert await setup.counts() == before == (2, 1, 1)
    await setup.installation.api(f"STREAM.PURGE.{REQUESTS}")
    assert await setup.replayer.replay(letter) is Replay.PUBLISHED


async def test_a_dead_letter_is_kept_if_the_queue_is_full_at_the_publish(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await setup.letter()

    async def fill() -> None:
        await limit(setup, REQUESTS, max_msgs=1)
        await setup.installation.publish()

    before_call(setup, monkeypatch, "publish", fill)
    with pytest.raises(QueueFull):
        await setup.replayer.replay(letter)
    assert await setup.counts() == (1, 0, 1)
    monkeypatch.undo()
    await setup.installation.api(f"STREAM.PURGE.{REQUESTS}")
    assert await setup.replayer.replay(letter) is Replay.PUBLISHED
    assert await setup.counts() == (1, 0, 0)


async def test_a_request_that_is_too_large_with_its_new_id_is_not_replayed(
    setup: Setup,
) -> None:
    await limit(setup, REQUESTS, max_msg_size=len(BODY))
    await setup.assert_refused(await setup.letter(), "too large")


async def test_a_dead_letter_is_kept_if_the_request_is_too_large_at_the_publish(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await setup.letter()

    async def shrink() -> None:
        await limit(setup, REQUESTS, max_msg_size=len(BODY))

    before_call(setup, monkeypatch, "publish", shrink)
    with pytest.raises(NotReplayed, match="too large"):
        await setup.replayer.replay(letter)
    assert await setup.installation.count(DEAD_LETTERS) == 1


# -- interrupted and concurrent replays -----------------------------------------------------------


@pytest.mark.parametrize("call", ["delete_msg", "publish"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_interrupted_replay_is_finished_by_the_next_one(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, call: str, when: str
) -> None:
    letter = await setup.letter()
    interrupt_at(setup, monkeypatch, call, when)
    with pytest.raises(Interruption):
        await setup.replayer.replay(letter)
    monkeypatch.undo()
    assert await setup.replayer.replay(letter) is Replay.PUBLISHED
    assert await setup.counts() == (1, 0, 0)


@pytest.mark.parametrize("with_letter", [True, False])
async def test_a_request_that_failed_after_an_interrupted_replay_is_replayed(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, with_letter: bool
) -> None:
    """The stream drops the second copy by its message id, although the first copy has ended."""
    letter = await setup.letter()
    interrupt_at(setup, monkeypatch, "publish", "after")
    with pytest.raises(Interruption):
        await setup.replayer.replay(letter)
    monkeypatch.undo()
    await setup.fail(letter=with_letter)

    assert await setup.replayer.replay(letter) is Replay.PUBLISHED

    requests, results, _ = await setup.counts()
    assert (requests, results) == (1, 0)
    assert await setup.fail() == "r-1"
    assert await setup.installation.count(RESULTS) == 1


async def test_a_replay_that_is_interrupted_twice_is_finished_by_the_third_one(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await setup.letter()
    for call in ("publish", "delete_msg"):
        interrupt_at(setup, monkeypatch, call, "after")
        with pytest.raises(Interruption):
            await setup.replayer.replay(letter)
        monkeypatch.undo()
        if call == "publish":
            await setup.fail(letter=False)
    assert await setup.counts() == (0, 0, 1)
    assert await setup.replayer.replay(letter) is Replay.PUBLISHED
    assert await setup.counts() == (1, 0, 0)


async def test_a_request_that_succeeded_after_an_interrupted_replay_needs_no_replay(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await setup.letter()
    interrupt_at(setup, monkeypatch, "publish", "after")
    with pytest.raises(Interruption):
        await setup.replayer.replay(letter)
    monkeypatch.undo()
    delivery = await take(setup.worker)
    assert await setup.end(succeeded(*digest_of(delivery, setup.installation)))
    await delivery.ack()
    assert await setup.replayer.replay(letter) is Replay.ALREADY_SUCCEEDED
    assert await setup.counts() == (0, 1, 0)


async def test_a_replay_does_not_delete_an_event_that_is_stored_after_the_read(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await setup.letter()
    read, was_read = replaying.read_message, asyncio.Event()

    async def read_message(bus: Bus, stream: str, **selector: Any) -> StoredMessage | None:
        found = await read(bus, stream, **selector)
        if stream == RESULTS and not was_read.is_set():
            was_read.set()
            await clear_results(setup)
            events = setup.installation.events_of(setup.worker)
            event = succeeded("r-1", DIGEST)
            assert await soon(events.publish_result(event, trace_parent=None))
        return found

    monkeypatch.setattr(replaying, "read_message", read_message)
    await setup.replayer.replay(letter)
    assert was_read.is_set()
    stored = await setup.event()
    assert stored is not None
    assert b"succeeded" in (stored.data or b"")


async def test_a_request_that_failed_after_a_concurrent_replay_is_replayed(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await setup.letter()
    deliveries: list[JetStreamDelivery] = []

    async def concurrently() -> None:
        other = Replayer(setup.worker.bus, setup.installation.subjects)
        assert await other.replay(letter) is Replay.PUBLISHED
        deliveries.append(await take(setup.worker))
        assert await setup.end(failed("r-1", DIGEST))

    before_call(setup, monkeypatch, "stream_info", concurrently)
    assert await setup.replayer.replay(letter) is Replay.PUBLISHED
    await deliveries[0].term("model_error")
    requests, results, _ = await setup.counts()
    assert (requests, results) == (1, 0)


async def test_a_copy_that_a_concurrent_replay_has_queued_is_not_queued_again(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await setup.letter()
    await clear_results(setup)

    async def concurrently() -> None:
        other = Replayer(setup.worker.bus, setup.installation.subjects)
        assert await other.replay(letter) is Replay.PUBLISHED

    before_call(setup, monkeypatch, "publish", concurrently)
    assert await setup.replayer.replay(letter) is Replay.PUBLISHED
    assert await setup.counts() == (1, 0, 0)


async def test_two_concurrent_replays_leave_no_dead_letter_and_no_event(setup: Setup) -> None:
    letter = await setup.letter()
    other = Replayer(setup.worker.bus, setup.installation.subjects)
    done = await asyncio.gather(setup.replayer.replay(letter), other.replay(letter))
    assert set(done) == {Replay.PUBLISHED}
    requests, results, letters = await setup.counts()
    assert requests in {1, 2}  # a worker answers a second copy with the event of the first one
    assert (results, letters) == (0, 0)


async def test_an_older_dead_letter_of_a_queued_request_is_not_replayed(setup: Setup) -> None:
    older = await setup.letter()
    await clear_results(setup)
    newer = await setup.letter()
    assert await setup.replayer.replay(newer) is Replay.PUBLISHED
    await setup.assert_refused(older, "in the queue already")


async def test_a_lost_server_is_reported_and_the_dead_letter_is_kept(setup: Setup) -> None:
    letter = await setup.letter()
    await setup.installation.kill_server()
    replaying = asyncio.create_task(setup.replayer.replay(letter))
    with pytest.raises(BusUnavailable, match="NATS: "):
        await soon(replaying)
    await setup.installation.start_server()
    await until_connected(setup.installation.bus, setup.worker.bus)
    assert await setup.replayer.replay(letter) is Replay.PUBLISHED
    assert await setup.counts() == (1, 0, 0)


# -- helpers --------------------------------------------------------------------------------------


async def clear_results(setup: Setup) -> None:
    await setup.installation.api(f"STREAM.PURGE.{RESULTS}")


async def limit(setup: Setup, stream: str, **limits: int) -> None:
    config = (await setup.installation.api(f"STREAM.INFO.{stream}"))["config"]
    await setup.installation.api(f"STREAM.UPDATE.{stream}", {**config, **limits})


def before_call(
    setup: Setup,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    act: Callable[[], Awaitable[None]],
) -> None:
    """Call `act` before the first call of a method of the operator's client."""
    jetstream = setup.installation.bus.jetstream
    original, acted = getattr(jetstream, name), asyncio.Event()

    async def call(*arguments: Any, **named: Any) -> Any:
        if not acted.is_set():
            acted.set()
            await act()
        return await original(*arguments, **named)

    monkeypatch.setattr(jetstream, name, call)


def interrupt_at(setup: Setup, monkeypatch: pytest.MonkeyPatch, name: str, when: str) -> None:
    """Interrupt the operator's client before a call, or after a call and before its answer."""
    jetstream = setup.installation.bus.jetstream
    original = getattr(jetstream, name)

    async def call(*arguments: Any, **named: Any) -> Any:
        if when == "after":
            await original(*arguments, **named)
        raise Interruption

    monkeypatch.setattr(jetstream, name, call)
