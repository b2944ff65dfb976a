"""Admission of a delivery: the request id, the reply subject, the trace context, the request."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.jobs.admission import Admission
from consumer.jobs.states import IllegalTransition, State
from generation_contracts import InvalidRequest, Subjects, Task, TextToImageRequest
from generation_contracts.base import DEFAULT_QUEUES
from generation_contracts.subjects import is_request_id
from tests.support.memory_ports import MemoryDelivery, MemoryQueue, Outage

SUBJECTS = Subjects()
SUBJECT = "generation.request.text_to_image"
ADMISSION = Admission(Task.TEXT_TO_IMAGE, SUBJECTS, ("_INBOX.", "generation.reply."))
STORED_AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@dataclass
class Arrival:
    """The data of a delivery."""

    body: bytes = b'{"prompt":"a red circle"}'
    subject: str = SUBJECT
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: str = "GENERATION_REQUESTS_TEXT_TO_IMAGE"
    stream_sequence: int = 7
    deliveries: int = 1
    stored_at: datetime = STORED_AT

    def delivery(self) -> MemoryDelivery:
        return MemoryDelivery(queue=MemoryQueue([], Outage()), **vars(self))


def body(**fields: Any) -> bytes:
    return json.dumps({"prompt": "a red circle", **fields}).encode()


def read_id(**arrival: Any) -> str:
    return ADMISSION.open(Arrival(**arrival).delivery()).request_id


def refusal(**arrival: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        ADMISSION.request(Arrival(**arrival).delivery())
    return refused.value


# -- the id ---------------------------------------------------------------------------------------

ID_SOURCES: dict[str, dict[str, Any]] = {
    "body": {"body": body(request_id="body-1")},
    "subject": {"subject": f"{SUBJECT}.subject-1"},
    "header": {"headers": {"Nats-Msg-Id": "header-1"}},
}


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (("body", "subject", "header"), "subject-1"),
        (("body", "header"), "body-1"),
        (("subject", "header"), "subject-1"),
        (("header",), "header-1"),
        (("subject",), "subject-1"),
        (("body",), "body-1"),
    ],
)
def test_request_id_comes_from_subject_then_body_then_header(
    present: tuple[str, ...], expected: str
) -> None:
    """A request with different ids in subject and body is refused under the id of the subject."""
    arrival = {name: value for source in present for name, value in ID_SOURCES[source].items()}
    assert read_id(**arrival) == expected


def test_derived_id_is_equal_at_every_delivery_of_a_request() -> None:
    first, second = read_id(deliveries=1), read_id(deliveries=2)
    assert first == second
    assert first.startswith("GENERATION_REQUESTS_TEXT_TO_IMAGE-7-")
    assert is_request_id(first)


@pytest.mark.parametrize(
    "other",
    [
        {"stream_sequence": 8},
        {"stream": "GENERATION_REQUESTS_IMAGE_TO_TEXT"},
        {"stream": "OTHER_REQUESTS_TEXT_TO_IMAGE"},
        {"stored_at": STORED_AT + timedelta(seconds=1)},  # the stream was deleted and recreated
    ],
)
def test_derived_ids_of_two_requests_differ(other: dict[str, Any]) -> None:
    assert read_id() != read_id(**other)


@given(
    st.from_regex(r"[a-z0-9][a-z0-9-]{0,23}", fullmatch=True),
    st.integers(1, 2**64 - 1),
    st.datetimes(datetime(2020, 1, 1), datetime(9999, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
def test_derived_id_is_valid_and_contains_the_sequence_under_every_root(
    root: str, sequence: int, at: datetime
) -> None:
    for task in DEFAULT_QUEUES:
        stream = Subjects(root).requests_stream(task)
        derived = read_id(stream=stream, stream_sequence=sequence, stored_at=at)
        assert is_request_id(derived)
        # Truncation to 64 characters removes characters of the root only.
        assert derived.endswith(f"_REQUESTS_{task.upper()}-{sequence}-{int(at.timestamp()):x}")


ILLEGAL_IDS = ["a.b", "*", ">", "", "a b", "ä", "x" * 65, "a\n", "$JS", 7, None, ["a"], {}]


@pytest.mark.parametrize("bad", ILLEGAL_IDS, ids=repr)
def test_invalid_id_in_the_body_is_replaced_by_the_header(bad: object) -> None:
    assert read_id(body=body(request_id=bad), headers={"Nats-Msg-Id": "header-1"}) == "header-1"


@pytest.mark.parametrize("bad", [bad for bad in ILLEGAL_IDS if bad is not None], ids=repr)
def test_invalid_id_in_the_body_is_an_invalid_request(bad: object) -> None:
    assert "request_id" in str(refusal(body=body(request_id=bad)))


@pytest.mark.parametrize("bad", [bad for bad in ILLEGAL_IDS if isinstance(bad, str)], ids=repr)
def test_invalid_id_in_the_headers_is_ignored(bad: str) -> None:
    # A sender may set Nats-Msg-Id to any value. An invalid request id there is not an error.
    assert read_id(headers={"Nats-Msg-Id": bad}) == read_id()
    ADMISSION.request(Arrival(headers={"Nats-Msg-Id": bad}).delivery())


@pytest.mark.parametrize("bad", ["a.b", "*", "x" * 65])
def test_invalid_id_in_the_subject_is_an_invalid_request(bad: str) -> None:
    subject = f"{SUBJECT}.{bad}"
    assert "the subject's last token" in str(refusal(subject=subject))
    assert read_id(subject=subject) == read_id()


def test_ids_in_body_and_subject_must_agree() -> None:
    subject = f"{SUBJECT}.a"
    assert "differs" in str(refusal(body=body(request_id="b"), subject=subject))
    delivery = Arrival(body=body(request_id="a"), subject=subject).delivery()
    assert ADMISSION.request(delivery).request_id == "a"
    ADMISSION.request(Arrival(subject=subject).delivery())


# -- the reply ------------------------------------------------------------------------------------

UNSAFE_REPLIES = [
    pytest.param("$JS.API.STREAM.DELETE.GENERATION_REQUESTS_TEXT_TO_IMAGE", id="deletes a stream"),
    pytest.param(
        "$JS.ACK.GENERATION_REQUESTS_TEXT_TO_IMAGE.text_to_image.1.1.1.1.0", id="settles another"
    ),
    pytest.param("$SYS.REQ.SERVER.PING", id="system"),
    pytest.param("_INBOX." + "a" * 5_000, id="closes the connection"),
    pytest.param("_INBOX." + "a" * 194, id="201 characters"),
    pytest.param("generation.request.text_to_image", id="loops the queue"),
    pytest.param("generation.request.text_to_image.a", id="loops the queue by id"),
    pytest.param("generation.request.image_to_text", id="feeds the other queue"),
    pytest.param("generation.result.text_to_image.a", id="forges a result"),
    pytest.param("generation.dead.text_to_image", id="forges a dead letter"),
    pytest.param("generation.cancel.a", id="cancels another"),
    pytest.param("other.subject", id="not on the list"),
    pytest.param("_INBOX", id="the bare prefix"),
    pytest.param("_INBOXES.a", id="more than the prefix"),
    pytest.param("_INBOX.*", id="wildcard"),
    pytest.param("_INBOX.>", id="full wildcard"),
    pytest.param("_INBOX..a", id="empty token"),
    pytest.param("_INBOX.a b", id="white space"),
    pytest.param("_INBOX.a\r\nPUB x 0\r\n", id="another command"),
    pytest.param("", id="empty"),
]


@pytest.mark.parametrize("reply", UNSAFE_REPLIES)
def test_unsafe_reply_in_the_body_is_refused_and_never_used(reply: str) -> None:
    arrival = Arrival(body=body(reply_to=reply))
    assert ADMISSION.open(arrival.delivery()).envelope.reply_to is None
    refused = refusal(body=body(reply_to=reply))
    assert "reply_to" in str(refused)
    assert not reply or reply not in str(refused)


@pytest.mark.parametrize("reply", UNSAFE_REPLIES)
def test_unsafe_reply_in_the_headers_is_refused_and_never_used(reply: str) -> None:
    arrival = Arrival(headers={"Reply-To": reply})
    assert ADMISSION.open(arrival.delivery()).envelope.reply_to is None
    refused = refusal(headers={"Reply-To": reply})
    assert [problem["field"] for problem in refused.problems] == ["reply_to"]
    assert not reply or reply not in str(refused)


@pytest.mark.parametrize(
    ("in_body", "in_header", "expected"),
    [
        ("_INBOX.body", "_INBOX.header", "_INBOX.body"),
        (None, "_INBOX.header", "_INBOX.header"),
        ("generation.reply.x", None, "generation.reply.x"),
        (None, None, None),
    ],
)
def test_reply_subject_comes_from_body_then_header(
    in_body: str | None, in_header: str | None, expected: str | None
) -> None:
    headers = {} if in_header is None else {"Reply-To": in_header}
    delivery = Arrival(body=body(reply_to=in_body), headers=headers).delivery()
    assert ADMISSION.open(delivery).envelope.reply_to == expected
    ADMISSION.request(delivery)


def test_invalid_request_uses_its_valid_reply_subject() -> None:
    delivery = Arrival(body=body(reply_to="$SYS.x"), headers={"Reply-To": "_INBOX.a"}).delivery()
    assert ADMISSION.open(delivery).envelope.reply_to == "_INBOX.a"


# -- the rest of the envelope ---------------------------------------------------------------------


def test_trace_parent_is_passed_on() -> None:
    delivery = Arrival(headers={"traceparent": TRACE}).delivery()
    assert ADMISSION.open(delivery).envelope.trace_parent == TRACE


@pytest.mark.parametrize("bad", ["", "x", TRACE.upper(), TRACE + "\r\nNats-Msg-Id: x", TRACE[:-1]])
def test_malformed_trace_parent_is_dropped(bad: str) -> None:
    delivery = Arrival(headers={"traceparent": bad}).delivery()
    assert ADMISSION.open(delivery).envelope.trace_parent is None


def test_queue_time_is_never_negative() -> None:
    now = datetime.now(UTC)
    ahead = ADMISSION.open(Arrival(stored_at=now + timedelta(hours=1)).delivery())
    behind = ADMISSION.open(Arrival(stored_at=now - timedelta(hours=1)).delivery())
    assert ahead.queued == 0
    assert behind.queued >= 3600


def test_job_refuses_a_state_that_cannot_follow() -> None:
    job = ADMISSION.open(Arrival().delivery())
    with pytest.raises(IllegalTransition):
        job.advance(State.SETTLED)
    assert job.state is State.RECEIVED


# -- arbitrary bytes ------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
_fields = st.fixed_dictionaries(
    {},
    optional={"request_id": _json, "reply_to": _json, "prompt": _json, "deadline": _json},
)
_bodies = (
    st.binary(max_size=80)
    | _json.map(lambda value: json.dumps(value).encode())
    | _fields.map(lambda value: json.dumps(value).encode())
    | st.sampled_from(
        [
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"9" * 10_000,
            b'{"request_id":' + b"9" * 10_000 + b"}",
            b'{"request_id":"\\ud800"}',
            b"\xef\xbb\xbf{}",
            b"NaN",
            b"",
        ]
    )
)
_headers = st.dictionaries(
    st.sampled_from(["Reply-To", "Nats-Msg-Id", "traceparent", "other"]), st.text(max_size=40)
)
_subjects = (
    st.just(SUBJECT) | st.text(max_size=20) | st.text(max_size=80).map(f"{SUBJECT}.".__add__)
)


@given(_bodies, _headers, _subjects)
def test_arbitrary_bytes_open_a_job_with_a_valid_id_and_a_safe_reply(
    body: bytes, headers: dict[str, str], subject: str
) -> None:
    delivery = Arrival(body=body, headers=headers, subject=subject).delivery()
    job = ADMISSION.open(delivery)
    assert is_request_id(job.request_id)
    if job.envelope.reply_to is not None:
        SUBJECTS.check_reply(job.envelope.reply_to, ADMISSION.reply_prefixes)
    try:
        request = ADMISSION.request(delivery)
    except InvalidRequest as error:
        assert len(str(error)) < 500  # noqa: PT017 - both outcomes are correct
    else:
        assert isinstance(request, TextToImageRequest)
        assert request.request_id in {None, job.request_id}


def test_request_of_the_other_task_is_refused() -> None:
    fields = body(images=["s3://generation/a.png"])
    assert "images: there is no such field" in str(refusal(body=fields))
