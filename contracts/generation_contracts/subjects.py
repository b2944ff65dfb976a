"""Subjects, stream names and request ids, and which names are safe in them."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import StringConstraints

from generation_contracts.base import DEFAULT_QUEUES, Task, pattern_message

REQUEST_ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
# NATS accepts `*`, `>` and `a.b` in a published subject. So ids and reply subjects are checked
# before a subject is built from them.
QUEUE_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,31}$"
SUBJECT_PATTERN = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$"
MAX_SUBJECT = 200  # characters; a 5,000-character reply subject closes the worker's connection
HOLDER = "holder:"  # prefix of the request id in the last token of `Subjects.holder`
MAX_ROOT = 24  # characters; derived request ids begin with the root and have 64 characters

RequestId = Annotated[
    str,
    StringConstraints(pattern=REQUEST_ID_PATTERN),
    pattern_message("must be 1-64 characters of A-Z a-z 0-9 _ -"),
]
SubjectName = Annotated[
    str,
    StringConstraints(pattern=SUBJECT_PATTERN, min_length=1, max_length=MAX_SUBJECT),
    pattern_message("must be characters of A-Z a-z 0-9 _ - between dots"),
]

QueueName = Annotated[
    str,
    StringConstraints(pattern=QUEUE_PATTERN),
    pattern_message("must be 1-32 characters of a-z 0-9 _ -, the first a letter or digit"),
]

_REQUEST_ID = re.compile(REQUEST_ID_PATTERN.removesuffix("$") + r"\Z")
_QUEUE = re.compile(QUEUE_PATTERN.removesuffix("$") + r"\Z")
# The streams of the root `a.requests` are named A_REQUESTS_RESULTS and so on, and a queue of the
# root `a` must not have one of these names. The object keys of uploads begin with `uploads`.
_RESERVED_QUEUES = frozenset({"advisories", "releases", "results", "retries", "uploads"})
# Narrower than a subject, so that two roots never share a stream name.
_ROOT = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)*\Z")
_SUBJECT = re.compile(SUBJECT_PATTERN.removesuffix("$") + r"\Z")


class UnsafeReplySubject(ValueError):  # noqa: N818 - it describes the subject
    """A worker may not publish to this reply subject. The text may be shown to the sender."""


def is_request_id(value: str) -> bool:
    """Return whether a string is a request id: safe as a subject token and in object keys."""
    return _REQUEST_ID.match(value) is not None


def is_queue_name(value: str) -> bool:
    """Return whether a string is the name of a queue, of any task."""
    return value in set(Task) or (_QUEUE.match(value) is not None and value not in _RESERVED_QUEUES)


def require_queue_name(name: str, task: Task) -> None:
    """Validate the name of a queue that serves a task.

    The default queue of a task has the name of the task. The names of all other queues have no
    `_`, so that no two stream names are equal and no later task has the name of a queue.

    Raises:
        ValueError: The name cannot be used. The text is for people.
    """
    if name == task:
        return
    if name in set(Task):
        raise ValueError(f"is the default queue of the task {name}")
    if _QUEUE.match(name) is None or "_" in name:
        raise ValueError("must be 1-32 characters of a-z 0-9 -, the first a letter or digit")
    if name in _RESERVED_QUEUES:
        raise ValueError(f"must not be one of {', '.join(sorted(_RESERVED_QUEUES))}")


@dataclass(frozen=True)
class Subjects:
    """Every subject and stream name of one installation, derived from its root.

    A queue is named by a string. The default queue of a task has the name of the task.

    Attributes:
        root: First tokens of all subjects, for example `generation` or `team-a.generation`.
    """

    root: str = "generation"

    def __post_init__(self) -> None:
        if len(self.root) > MAX_ROOT or _ROOT.match(self.root) is None:
            raise ValueError("the subject root must be 1-24 characters of a-z 0-9 - between dots")

    def request(self, queue: str, request_id: str | None = None) -> str:
        """Return the subject of a request; a message with the id as last token is found by id."""
        subject = f"{self.root}.request.{queue}"
        return subject if request_id is None else f"{subject}.{_checked(request_id)}"

    def request_subjects(self, queue: str) -> tuple[str, str]:
        """Return the subjects of the request stream of a queue."""
        return self.request(queue), f"{self.root}.request.{queue}.*"

    def result(self, queue: str, request_id: str) -> str:
        """Return the subject of the one terminal event of a request."""
        return f"{self.root}.result.{queue}.{_checked(request_id)}"

    def progress(self, queue: str, request_id: str) -> str:
        """Return the subject of `started` and `progress` events: core NATS, not stored."""
        return f"{self.root}.progress.{queue}.{_checked(request_id)}"

    def dead_letter(self, queue: str) -> str:
        """Return the subject of dead letters: the original bytes of requests."""
        return f"{self.root}.dead.{queue}"

    def retry(self, queue: str, request_id: str) -> str:
        """Return the subject of a request that is queued again after a delay."""
        return f"{self.root}.retry.{queue}.{_checked(request_id)}"

    def releases(self, queue: str) -> str:
        """Return the prefix of attempt marks. Tokens for message, delivery and kind follow."""
        return f"{self.root}.released.{queue}"

    def cancellation_marks(self, queue: str) -> str:
        """Return the prefix of the marks on messages that were cancelled while in progress."""
        return f"{self.root}.withdrawn.{queue}"

    def interrupt(self, request_id: str) -> str:
        """Return the subject on which one worker asks all workers to stop a request."""
        return f"{self.root}.interrupt.{_checked(request_id)}"

    def holder(self, request_id: str) -> str:
        """Return the subject on which a worker asks the others whether a request is in progress.

        The last token is not a request id. So an earlier version, which reads this subject as an
        interrupt, finds nothing to stop.
        """
        return f"{self.root}.interrupt.{HOLDER}{_checked(request_id)}"

    @property
    def interrupts(self) -> str:
        """The wildcard subject of all interrupts, to which every worker subscribes."""
        return f"{self.root}.interrupt.*"

    @property
    def cancels(self) -> str:
        """The wildcard subject of all cancellations."""
        return f"{self.root}.cancel.*"

    def call(self, queue: str) -> str:
        """Return the subject of the request-reply endpoint of a queue."""
        return f"{self.root}.call.{queue}"

    def cancel(self, request_id: str) -> str:
        """Return the subject on which a sender cancels a request."""
        return f"{self.root}.cancel.{_checked(request_id)}"

    @property
    def upload(self) -> str:
        """The subject on which a sender asks for an address to upload an input image."""
        return f"{self.root}.upload"

    def requests_stream(self, queue: str) -> str:
        """Return the name of the work queue stream of a queue.

        Each queue has its own stream. In a shared stream the durables would need a filter, and then
        the server's cost of a delivery grows with the number of queued requests.
        """
        return self._stream(f"REQUESTS_{queue.upper()}")

    @property
    def results_stream(self) -> str:
        """Name of the stream of terminal events."""
        return self._stream("RESULTS")

    @property
    def dead_letters_stream(self) -> str:
        """Name of the stream of dead letters."""
        return self._stream("DEAD_LETTERS")

    @property
    def retries_stream(self) -> str:
        """Name of the stream of requests that wait for their next attempt."""
        return self._stream("RETRIES")

    @property
    def releases_stream(self) -> str:
        """Name of the stream of attempt marks and cancellation marks."""
        return self._stream("RELEASES")

    @property
    def advisories_stream(self) -> str:
        """Name of the stream of the server's max-deliver advisories about default queues."""
        return self._stream("ADVISORIES")

    def advisories_stream_of(self, queue: str) -> str:
        """Return the name of the stream of the server's max-deliver advisories about a queue.

        The default queues share a stream. Workers of earlier versions compare its subjects with
        those that they know, so it cannot have the advisories about other queues.
        """
        if queue in DEFAULT_QUEUES:
            return self.advisories_stream
        return self._stream(f"ADVISORIES_{queue.upper()}")

    def id_in(self, subject: str, queue: str) -> str | None:
        """Return the last token of a request subject, or None if the subject has no id."""
        prefix = f"{self.request(queue)}."
        return subject.removeprefix(prefix) if subject.startswith(prefix) else None

    def check_reply(self, subject: str, allowed_prefixes: tuple[str, ...]) -> None:
        """Validate a reply subject that a sender has chosen.

        A worker publishes with its own permissions. The reply subject `$JS.API.STREAM.DELETE.…`
        would delete a stream, and a request subject would loop the queue.

        Raises:
            UnsafeReplySubject: With a text that may be shown to the sender.
        """
        if len(subject) > MAX_SUBJECT or _SUBJECT.match(subject) is None:
            raise UnsafeReplySubject(
                f"reply_to: must be 1-{MAX_SUBJECT} characters of A-Z a-z 0-9 _ - between dots"
            )
        # Under the root, only <root>.reply.> is for replies, even if a configured prefix is wider.
        if _within(subject, self.root) and not _within(subject, f"{self.root}.reply"):
            raise UnsafeReplySubject("reply_to: is a subject of the daemon itself")
        if not subject.startswith(allowed_prefixes):
            raise UnsafeReplySubject("reply_to: is not under a prefix that this worker replies to")

    def _stream(self, suffix: str) -> str:
        return f"{self.root.replace('.', '_').upper()}_{suffix}"


def _checked(request_id: str) -> str:
    if not is_request_id(request_id):
        raise ValueError("a request id is 1-64 characters of A-Z a-z 0-9 _ -")
    return request_id


def _within(subject: str, parent: str) -> bool:
    return subject == parent or subject.startswith(f"{parent}.")
