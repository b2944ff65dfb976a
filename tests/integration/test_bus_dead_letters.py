"""Dead letters on a real server: listed, read, and replayed whatever comes in between."""

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


class Cut(Exception):  # noqa: N818 - what happens
    """The replay ends here."""


def digest_of(delivery: JetStreamDelivery, installation: Installation) -> tuple[str, str]:
    """The id and the digest that a worker gives to a request."""
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


class Office:
    """An installation, the worker that fails its requests, and the operator's side."""

    def __init__(self, installation: Installation, worker: Worker) -> None:
        self.installation = installation
        self.worker = worker
        self.letters = DeadLetters(installation.bus, installation.subjects)
        self.replayer = Replayer(installation.bus, installation.subjects)
        self.jetstream = installation.plain.jetstream()

    async def dead_letter(self, delivery: JetStreamDelivery) -> StoredDeadLetter:
        """What a worker does first with a request that no worker can handle."""
        request_id, _ = digest_of(delivery, self.installation)
        letter = DeadLetter("model_error", "the model failed", request_id, "w-1")
        await self.installation.events.dead_letter(TASK, delivery, letter)
        return (await self.list_all())[-1]

    async def fail(self, *, letter: bool = True) -> str:
        """A worker takes the next request and fails it; the request's id."""
        delivery = await take(self.worker)
        if letter:
            await self.dead_letter(delivery)
        request_id, digest = digest_of(delivery, self.installation)
        assert await self.end(failed(request_id, digest))
        await delivery.term("model_error")
        return request_id

    async def end(self, event: ResultEvent) -> bool:
        """A worker publishes a terminal event."""
        stored = await soon(self.installation.events.publish_result(event, trace_parent=None))
        return stored == event

    async def letter(
        self,
        body: bytes = BODY,
        *,
        request_id: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> StoredDeadLetter:
        """Publish a request, let it fail; its letter, read."""
        await self.installation.publish(body, request_id=request_id, headers=headers)
        await self.fail()
        return await self.letters.read((await self.list_all())[-1].sequence)

    async def forge(self, headers: dict[str, str], task: str = str(TASK)) -> StoredDeadLetter:
        """A letter by another hand."""
        stored = await self.jetstream.publish(f"generation.dead.{task}", BODY, headers=headers)
        return await self.letters.read(stored.seq)

    async def list_all(self) -> list[StoredDeadLetter]:
        return [letter async for letter in self.letters.list_all()]

    async def event(self, request_id: str = "r-1") -> RawStreamMsg | None:
        """The stored terminal event."""
        try:
            return await self.jetstream.get_last_msg(
                RESULTS, f"generation.result.text_to_image.{request_id}"
            )
        except NotFoundError:
            return None

    async def counts(self) -> tuple[int, int, int]:
        """How many requests, results and letters there are."""
        count = self.installation.count
        return await count(REQUESTS), await count(RESULTS), await count(DEAD_LETTERS)

    async def refused(self, letter: StoredDeadLetter, why: str) -> None:
        """The letter is not replayed, and nothing has changed."""
        before = await self.counts()
        with pytest.raises(NotReplayed, match=why):
            await self.replayer.replay(letter)
        assert await self.counts() == before


@pytest.fixture
async def office(installation: Installation) -> Office:
    return Office(installation, await installation.worker())


# -- list -----------------------------------------------------------------------------------------


async def test_no_letters_are_an_empty_list(office: Office) -> None:
    assert await office.list_all() == []


async def test_a_listing_says_what_it_is_about_and_leaves_the_body_out(office: Office) -> None:
    await office.letter(b"\x00not json", request_id="r-1", headers={"Title": "Grüße"})
    (letter,) = await office.list_all()
    assert (letter.sequence, letter.task, letter.request_id) == (1, TASK, "r-1")
    assert (letter.code, letter.reason) == ("model_error", "the model failed")
    assert (letter.attempts, letter.worker) == ("1", "w-1")
    assert letter.subject == f"{ROOT}.r-1"
    assert letter.originals == {"Title": "Grüße"}
    assert (letter.size, letter.body, letter.truncated) == (9, None, False)
    assert letter.stored_at.tzinfo is not None


CODE = {"Dead-Letter-Code": "model_error"}  # what every letter of a worker has


@pytest.mark.parametrize("count", [2, 3, 4, 6, 7])
async def test_a_listing_is_whole_however_many_pulls_it_takes(
    office: Office, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "BATCH", 3)
    for number in range(count):
        await office.jetstream.publish(
            "generation.dead.text_to_image", b"%d" % number, headers=dict(CODE)
        )
    # Without a code it is an answer of the server, to the reply subject of a sender's choice.
    await office.jetstream.publish("generation.dead.text_to_image", b"junk")
    assert [letter.sequence for letter in await soon(office.list_all())] == [*range(1, count + 1)]


async def test_a_listing_ends_with_what_was_there_and_leaves_no_consumer(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "BATCH", 1)  # the next pull finds what came meanwhile
    await office.forge(dict(CODE))
    sequences = []
    async for letter in office.letters.list_all():
        sequences.append(letter.sequence)
        await office.forge(dict(CODE))
    assert sequences == [1]
    assert await office.jetstream.consumers_info(DEAD_LETTERS) == []


async def test_thousands_of_letters_are_listed(office: Office) -> None:
    for number in range(3_000):
        await office.installation.plain.publish(
            "generation.dead.text_to_image", b"x" * 1_000, headers=dict(CODE)
        )
        if number % 500 == 0:
            await office.installation.plain.flush()
    await office.forge(dict(CODE))
    started = asyncio.get_running_loop().time()
    assert len(await soon(office.list_all())) == 3_001
    measured("list of 3,001 letters", asyncio.get_running_loop().time() - started)


# -- read -----------------------------------------------------------------------------------------


async def test_a_letter_is_read_with_every_byte_of_its_body(office: Office) -> None:
    body = bytes(range(256))
    letter = await office.letter(body, request_id="r-1", headers={"Title": "Grüße"})
    assert (letter.body, letter.size) == (body, 256)
    assert letter.originals == {"Title": "Grüße"}
    (listed,) = await office.list_all()
    assert letter.headers == listed.headers
    # nats-py rounds one of them to microseconds and cuts the other.
    assert abs(letter.stored_at - listed.stored_at) <= timedelta(microseconds=1)


async def test_an_empty_letter_is_read(office: Office) -> None:
    stored = await office.jetstream.publish("generation.dead.text_to_image", b"")
    assert (await office.letters.read(stored.seq)).body == b""


@pytest.mark.parametrize("sequence", [0, 1, 2**63, 2**64, -1])
async def test_a_letter_that_is_not_there_is_said_not_to_be(office: Office, sequence: int) -> None:
    with pytest.raises(DeadLetterNotFound):
        await office.letters.read(sequence)


@pytest.mark.parametrize("missing", [DEAD_LETTERS, REQUESTS, RESULTS])
async def test_a_missing_stream_is_one_clear_line(office: Office, missing: str) -> None:
    letter = await office.letter()
    await office.installation.api(f"STREAM.DELETE.{missing}")
    calls: list[Awaitable[object]] = [office.replayer.replay(letter)]
    if missing == DEAD_LETTERS:
        calls += [office.list_all(), office.letters.read(1)]
    for call in calls:
        with pytest.raises(BusUnavailable, match=f"there is no stream {missing}; run `consumer"):
            await call


# -- replay ---------------------------------------------------------------------------------------


async def test_a_replay_takes_the_event_away_and_publishes_the_request_again(
    office: Office,
) -> None:
    headers = {
        MESSAGE_ID: "m-1",
        "Nats-Expected-Last-Subject-Sequence": "0",
        "nats-ttl": "1h",
        "Reply-To": "_INBOX.x",
        "Title": "Grüße",
        "Original-Title": "twice",
    }
    letter = await office.letter(headers=headers)
    assert await office.counts() == (0, 1, 1)

    assert await office.replayer.replay(letter) is Replay.PUBLISHED

    assert await office.counts() == (1, 0, 0)
    again = await take(office.worker)
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
async def test_the_id_stays_the_same_wherever_it_came_from(
    office: Office, body: bytes, token: str | None, headers: dict[str, str]
) -> None:
    letter = await office.letter(body, request_id=token, headers=headers)
    await office.replayer.replay(letter)
    assert await office.fail() == letter.request_id
    assert await office.event(letter.request_id) is not None


async def test_a_request_that_contradicts_its_subject_does_so_again(office: Office) -> None:
    letter = await office.letter(BODY, request_id="r-2")
    assert letter.request_id == "r-2", "that of its subject"
    await office.replayer.replay(letter)
    assert (await take(office.worker)).subject == f"{ROOT}.r-2"


async def test_a_replayed_request_gets_a_new_stored_result_within_the_duplicate_window(
    office: Office,
) -> None:
    letter = await office.letter()
    await office.replayer.replay(letter)
    request_id, digest = digest_of(await take(office.worker), office.installation)
    assert await office.end(succeeded(request_id, digest))
    stored = await office.event()
    assert stored is not None
    assert json.loads(stored.data or b"")["type"] == "generation.v1.succeeded"
    assert not await office.end(failed(request_id, digest)), "and only one"


async def test_a_sender_cannot_occupy_the_id_of_a_replay(office: Office) -> None:
    """What the stream calls a duplicate may be something else."""
    letter = await office.letter()
    await clear_results(office)
    message_id = replaying._Attempt.of(letter, office.installation.subjects).message_id
    await office.installation.publish(b"foreign", headers={MESSAGE_ID: message_id})
    assert await office.replayer.replay(letter) is Replay.PUBLISHED
    await (await take(office.worker)).ack()
    assert (await take(office.worker)).body == letter.body


@pytest.mark.parametrize(
    "subject",
    ["$JS.API.STREAM.DELETE.GENERATION_RESULTS", "generation.dead.text_to_image", f"{ROOT}.*", ""],
)
async def test_a_forged_subject_is_not_published_to(office: Office, subject: str) -> None:
    letter = await office.forge({DEAD_LETTER_REQUEST_ID: "r-1", DEAD_LETTER_SUBJECT: subject})
    assert await office.replayer.replay(letter) is Replay.PUBLISHED
    assert (await take(office.worker)).subject == f"{ROOT}.r-1"
    assert await office.installation.count(DEAD_LETTERS) == 0


async def test_a_letter_of_one_stream_is_not_taken_for_that_of_an_earlier_one(
    office: Office,
) -> None:
    first = await office.letter()
    await office.replayer.replay(first)
    await (await take(office.worker)).ack()
    config = (await office.installation.api(f"STREAM.INFO.{DEAD_LETTERS}"))["config"]
    await office.installation.api(f"STREAM.DELETE.{DEAD_LETTERS}")
    await office.installation.api(f"STREAM.CREATE.{DEAD_LETTERS}", config)
    second = await office.forge({DEAD_LETTER_REQUEST_ID: "r-2"})
    assert (second.sequence, first.sequence) == (1, 1)
    assert await office.replayer.replay(second) is Replay.PUBLISHED
    assert (await take(office.worker)).headers[MESSAGE_ID].endswith(".replay")


async def test_a_letter_without_its_body_is_not_taken_for_an_empty_request(office: Office) -> None:
    await office.letter()
    (listed,) = await office.list_all()
    with pytest.raises(ValueError, match="read"):
        await office.replayer.replay(listed)


# -- what is not replayed -------------------------------------------------------------------------


async def test_a_truncated_letter_is_not_replayed(office: Office) -> None:
    headers = {DEAD_LETTER_REQUEST_ID: "r-1", DEAD_LETTER_TRUNCATED: "2000000"}
    await office.refused(await office.forge(headers), "truncated")


@pytest.mark.parametrize(
    ("headers", "task"),
    [({}, TASK), ({DEAD_LETTER_REQUEST_ID: "*"}, TASK), ({DEAD_LETTER_REQUEST_ID: "r"}, "other")],
)
async def test_a_letter_of_no_known_request_is_not_replayed(
    office: Office, headers: dict[str, str], task: str
) -> None:
    await office.refused(await office.forge(headers, task), "the id of the request")


async def test_a_request_that_has_succeeded_since_needs_no_replay(office: Office) -> None:
    letter = await office.letter()
    await clear_results(office)
    assert await office.end(succeeded("r-1", event_digest()))
    assert await office.replayer.replay(letter) is Replay.ALREADY_SUCCEEDED
    assert await office.counts() == (0, 1, 0)
    stored = await office.event()
    assert stored is not None
    assert b"succeeded" in (stored.data or b"")


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (succeeded("r-1", "sha256:" + "0" * 64), "another request with its id has succeeded"),
        (failed("r-1", "sha256:" + "0" * 64), "belongs to another request"),
        (cancelled("r-1", "sha256:" + "0" * 64), "cancelled since"),
    ],
)
async def test_an_event_of_another_request_or_a_cancellation_stays(
    office: Office, event: ResultEvent, why: str
) -> None:
    letter = await office.letter()
    await clear_results(office)
    assert await office.end(event)
    await office.refused(letter, why)


async def test_a_cancelled_request_is_not_replayed(office: Office) -> None:
    letter = await office.letter()
    await clear_results(office)
    assert await office.end(cancelled("r-1", event_digest()))
    await office.refused(letter, "has been cancelled since")


LATER = b'{"type":"generation.v9.done","request_id":"r-1","task":"text_to_image"}'


async def test_an_event_that_cannot_be_read_stays(office: Office) -> None:
    letter = await office.letter()
    await clear_results(office)
    await office.jetstream.publish("generation.result.text_to_image.r-1", LATER)
    await office.refused(letter, "cannot be read")


async def test_a_request_that_a_worker_still_has_is_not_replayed(office: Office) -> None:
    await office.installation.publish(BODY)
    delivery = await take(office.worker)
    letter = await office.letters.read((await office.dead_letter(delivery)).sequence)
    await office.refused(letter, "a worker has not settled the request yet")
    assert await office.end(failed("r-1", event_digest()))
    await office.refused(letter, "a worker has not settled the request yet")
    await delivery.term("model_error")
    assert await office.replayer.replay(letter) is Replay.PUBLISHED


async def test_another_request_in_its_place_of_a_stream_made_again_is_not_taken_for_it(
    office: Office,
) -> None:
    sequence = await office.installation.publish()
    headers = {DEAD_LETTER_REQUEST_ID: "r-1", MESSAGE_ID: f"{REQUESTS}-{sequence}-1a2b3c.dead"}
    assert await office.replayer.replay(await office.forge(headers)) is Replay.PUBLISHED


async def test_a_request_that_is_queued_already_is_not_replayed(office: Office) -> None:
    letter = await office.letter()
    await office.installation.publish(BODY, request_id="r-1")
    await office.refused(letter, "in the queue already")


async def test_a_letter_of_the_other_task_is_held_against_that_tasks_queue(office: Office) -> None:
    stored = await office.jetstream.publish("generation.request.image_to_text.r-1", BODY)
    request = await office.jetstream.get_msg(OTHER_REQUESTS, stored.seq)
    assert request.time is not None
    place = f"{OTHER_REQUESTS}-{stored.seq}-{int(request.time.timestamp()):x}.dead"
    of_it = {DEAD_LETTER_REQUEST_ID: "r-1"}
    letter = await office.forge({**of_it, MESSAGE_ID: place}, "image_to_text")
    await office.refused(letter, "a worker has not settled the request yet")
    letter = await office.forge(of_it, "image_to_text")
    await office.refused(letter, "in the queue already")
    await office.installation.api(f"STREAM.PURGE.{OTHER_REQUESTS}")
    assert await office.replayer.replay(letter) is Replay.PUBLISHED
    count = office.installation.count
    assert (await count(OTHER_REQUESTS), await count(REQUESTS)) == (1, 0)


@pytest.mark.parametrize("limits", [{"max_msgs": 2}, {"max_bytes": 600}])
async def test_a_full_queue_leaves_everything_as_it_is(
    office: Office, limits: dict[str, int]
) -> None:
    letter = await office.letter()
    await limit(office, REQUESTS, **limits)
    for _ in range(2):
        await office.installation.publish(b"x" * 200)
    before = await office.counts()
    with pytest.raises(QueueFull):
        await office.replayer.replay(letter)
    assert await office.counts() == before == (2, 1, 1)
    await office.installation.api(f"STREAM.PURGE.{REQUESTS}")
    assert await office.replayer.replay(letter) is Replay.PUBLISHED


async def test_a_queue_that_fills_up_at_the_last_moment_keeps_the_letter(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await office.letter()

    async def fill() -> None:
        await limit(office, REQUESTS, max_msgs=1)
        await office.installation.publish()

    before_call(office, monkeypatch, "publish", fill)
    with pytest.raises(QueueFull):
        await office.replayer.replay(letter)
    assert await office.counts() == (1, 0, 1)
    monkeypatch.undo()
    await office.installation.api(f"STREAM.PURGE.{REQUESTS}")
    assert await office.replayer.replay(letter) is Replay.PUBLISHED
    assert await office.counts() == (1, 0, 0)


async def test_a_request_that_would_be_too_large_with_its_new_id_keeps_its_event(
    office: Office,
) -> None:
    await limit(office, REQUESTS, max_msg_size=len(BODY))
    await office.refused(await office.letter(), "too large")


async def test_a_limit_that_is_set_at_the_last_moment_keeps_the_letter(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await office.letter()

    async def shrink() -> None:
        await limit(office, REQUESTS, max_msg_size=len(BODY))

    before_call(office, monkeypatch, "publish", shrink)
    with pytest.raises(NotReplayed, match="too large"):
        await office.replayer.replay(letter)
    assert await office.installation.count(DEAD_LETTERS) == 1


# -- interrupted, and two at once -----------------------------------------------------------------


@pytest.mark.parametrize("call", ["delete_msg", "publish"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_interrupted_replay_is_finished_by_the_next(
    office: Office, monkeypatch: pytest.MonkeyPatch, call: str, when: str
) -> None:
    letter = await office.letter()
    cut_at(office, monkeypatch, call, when)
    with pytest.raises(Cut):
        await office.replayer.replay(letter)
    monkeypatch.undo()
    assert await office.replayer.replay(letter) is Replay.PUBLISHED
    assert await office.counts() == (1, 0, 0)


@pytest.mark.parametrize("with_letter", [True, False])
async def test_an_attempt_that_failed_after_an_interruption_is_not_left_without_an_event(
    office: Office, monkeypatch: pytest.MonkeyPatch, with_letter: bool
) -> None:
    """The stream drops the second copy by its id, although the first one is done with."""
    letter = await office.letter()
    cut_at(office, monkeypatch, "publish", "after")
    with pytest.raises(Cut):
        await office.replayer.replay(letter)
    monkeypatch.undo()
    await office.fail(letter=with_letter)

    assert await office.replayer.replay(letter) is Replay.PUBLISHED

    requests, results, _ = await office.counts()
    assert (requests, results) == (1, 0)
    assert await office.fail() == "r-1"
    assert await office.installation.count(RESULTS) == 1


async def test_nor_when_it_is_interrupted_again_before_it_is_published(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await office.letter()
    for call in ("publish", "delete_msg"):
        cut_at(office, monkeypatch, call, "after")
        with pytest.raises(Cut):
            await office.replayer.replay(letter)
        monkeypatch.undo()
        if call == "publish":
            await office.fail(letter=False)
    assert await office.counts() == (0, 0, 1)
    assert await office.replayer.replay(letter) is Replay.PUBLISHED
    assert await office.counts() == (1, 0, 0)


async def test_an_attempt_that_succeeded_after_an_interruption_ends_the_letter(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await office.letter()
    cut_at(office, monkeypatch, "publish", "after")
    with pytest.raises(Cut):
        await office.replayer.replay(letter)
    monkeypatch.undo()
    delivery = await take(office.worker)
    assert await office.end(succeeded(*digest_of(delivery, office.installation)))
    await delivery.ack()
    assert await office.replayer.replay(letter) is Replay.ALREADY_SUCCEEDED
    assert await office.counts() == (0, 1, 0)


async def test_what_is_stored_after_the_look_is_never_deleted(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await office.letter()
    look, looked = replaying.read_message, asyncio.Event()

    async def read_message(bus: Bus, stream: str, **place: Any) -> StoredMessage | None:
        found = await look(bus, stream, **place)
        if stream == RESULTS and not looked.is_set():
            looked.set()
            await clear_results(office)
            events = office.installation.events_of(office.worker)
            event = succeeded("r-1", event_digest())
            assert await soon(events.publish_result(event, trace_parent=None))
        return found

    monkeypatch.setattr(replaying, "read_message", read_message)
    await office.replayer.replay(letter)
    assert looked.is_set()
    stored = await office.event()
    assert stored is not None
    assert b"succeeded" in (stored.data or b"")


async def test_an_event_that_another_replay_has_led_to_is_not_lost_before_it_is_settled(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await office.letter()
    deliveries: list[JetStreamDelivery] = []

    async def meanwhile() -> None:
        other = Replayer(office.worker.bus, office.installation.subjects)
        assert await other.replay(letter) is Replay.PUBLISHED
        deliveries.append(await take(office.worker))
        assert await office.end(failed("r-1", event_digest()))

    before_call(office, monkeypatch, "stream_info", meanwhile)
    assert await office.replayer.replay(letter) is Replay.PUBLISHED
    await deliveries[0].term("model_error")
    requests, results, _ = await office.counts()
    assert (requests, results) == (1, 0)


async def test_a_copy_that_another_replay_has_queued_is_not_queued_again(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await office.letter()
    await clear_results(office)

    async def meanwhile() -> None:
        other = Replayer(office.worker.bus, office.installation.subjects)
        assert await other.replay(letter) is Replay.PUBLISHED

    before_call(office, monkeypatch, "publish", meanwhile)
    assert await office.replayer.replay(letter) is Replay.PUBLISHED
    assert await office.counts() == (1, 0, 0)


async def test_two_at_once_leave_no_letter_and_no_event(office: Office) -> None:
    letter = await office.letter()
    other = Replayer(office.worker.bus, office.installation.subjects)
    done = await asyncio.gather(office.replayer.replay(letter), other.replay(letter))
    assert set(done) == {Replay.PUBLISHED}
    requests, results, letters = await office.counts()
    assert requests in {1, 2}  # a second copy is answered with the first one's event
    assert (results, letters) == (0, 0)


async def test_an_older_letter_of_the_same_request_waits_for_the_newer_one(office: Office) -> None:
    older = await office.letter()
    await clear_results(office)
    newer = await office.letter()
    assert await office.replayer.replay(newer) is Replay.PUBLISHED
    await office.refused(older, "in the queue already")


async def test_a_server_that_is_gone_is_one_line_and_the_letter_is_kept(office: Office) -> None:
    letter = await office.letter()
    await office.installation.kill_server()
    replaying = asyncio.create_task(office.replayer.replay(letter))
    with pytest.raises(BusUnavailable, match="NATS: "):
        await soon(replaying)
    await office.installation.start_server()
    await until_connected(office.installation.bus, office.worker.bus)
    assert await office.replayer.replay(letter) is Replay.PUBLISHED
    assert await office.counts() == (1, 0, 0)


# -- parts ----------------------------------------------------------------------------------------


def event_digest() -> str:
    """The digest of `BODY`."""
    return request_digest(decode_request(TASK, BODY))


async def clear_results(office: Office) -> None:
    await office.installation.api(f"STREAM.PURGE.{RESULTS}")


async def limit(office: Office, stream: str, **limits: int) -> None:
    config = (await office.installation.api(f"STREAM.INFO.{stream}"))["config"]
    await office.installation.api(f"STREAM.UPDATE.{stream}", {**config, **limits})


def before_call(
    office: Office,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    act: Callable[[], Awaitable[None]],
) -> None:
    """Do something right before the operator's client makes a call for the first time."""
    jetstream = office.installation.bus.jetstream
    original, acted = getattr(jetstream, name), asyncio.Event()

    async def call(*arguments: Any, **named: Any) -> Any:
        if not acted.is_set():
            acted.set()
            await act()
        return await original(*arguments, **named)

    monkeypatch.setattr(jetstream, name, call)


def cut_at(office: Office, monkeypatch: pytest.MonkeyPatch, name: str, when: str) -> None:
    """End the operator's process before a call, or before its answer is heard."""
    jetstream = office.installation.bus.jetstream
    original = getattr(jetstream, name)

    async def call(*arguments: Any, **named: Any) -> Any:
        if when == "after":
            await original(*arguments, **named)
        raise Cut

    monkeypatch.setattr(jetstream, name, call)
