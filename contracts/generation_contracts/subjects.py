"""Subjects, stream names and ids: where each message goes, and which names are safe in them."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import StringConstraints

from generation_contracts.base import Task, says

REQUEST_ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
# NATS takes `*`, `>` and `a.b` as literal subjects when published to, so ids and reply subjects are
# checked before any subject is built from them.
SUBJECT_PATTERN = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$"
MAX_SUBJECT = 200  # characters; a 5,000-character reply subject closes the worker's connection
HOLDER = "holder:"  # before the request id, in the last token of `Subjects.holder`
MAX_ROOT = 24  # characters; derived request ids begin with it, and have 64 in all

RequestId = Annotated[
    str,
    StringConstraints(pattern=REQUEST_ID_PATTERN),
    says("must be 1-64 characters of A-Z a-z 0-9 _ -"),
]
SubjectName = Annotated[
    str,
    StringConstraints(pattern=SUBJECT_PATTERN, min_length=1, max_length=MAX_SUBJECT),
    says("must be characters of A-Z a-z 0-9 _ - between dots"),
]

_REQUEST_ID = re.compile(REQUEST_ID_PATTERN.removesuffix("$") + r"\Z")
# Narrower than a subject, so that two roots never share a stream name.
_ROOT = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)*\Z")
_SUBJECT = re.compile(SUBJECT_PATTERN.removesuffix("$") + r"\Z")


class UnsafeReplySubject(ValueError):  # noqa: N818 - it names the subject, not the program's error
    """The reply subject is not one that a worker may publish to; the text may be shown."""


def is_request_id(value: str) -> bool:
    """Whether a string may be a request id, and so a subject token and part of object keys."""
    return _REQUEST_ID.match(value) is not None


@dataclass(frozen=True)
class Subjects:
    """Every subject and stream name of one installation, derived from its root.

    Attributes:
        root: First tokens of all subjects, for example `generation` or `team-a.generation`.
    """

    root: str = "generation"

    def __post_init__(self) -> None:
        if len(self.root) > MAX_ROOT or _ROOT.match(self.root) is None:
            raise ValueError("the subject root must be 1-24 characters of a-z 0-9 - between dots")

    def request(self, task: Task, request_id: str | None = None) -> str:
        """Where a request is published; with its id as the last token it can be found by it."""
        subject = f"{self.root}.request.{task}"
        return subject if request_id is None else f"{subject}.{_checked(request_id)}"

    def request_subjects(self, task: Task) -> tuple[str, str]:
        """What the request stream of a task stores."""
        return self.request(task), f"{self.root}.request.{task}.*"

    def result(self, task: Task, request_id: str) -> str:
        """Where the one terminal event of a request is stored."""
        return f"{self.root}.result.{task}.{_checked(request_id)}"

    def progress(self, task: Task, request_id: str) -> str:
        """Where `started` and `progress` are published, by core NATS: they are not stored."""
        return f"{self.root}.progress.{task}.{_checked(request_id)}"

    def dead_letter(self, task: Task) -> str:
        """Where the original bytes of a request go that no worker can handle."""
        return f"{self.root}.dead.{task}"

    def retry(self, task: Task, request_id: str) -> str:
        """Where a request waits that is published to its request subject again later."""
        return f"{self.root}.retry.{task}.{_checked(request_id)}"

    def releases(self, task: Task) -> str:
        """Where attempt marks are stored; message, delivery and kind follow as tokens."""
        return f"{self.root}.released.{task}"

    def withdrawals(self, task: Task) -> str:
        """Where it is stored, per message, that a request was cancelled while a worker had it."""
        return f"{self.root}.withdrawn.{task}"

    def interrupt(self, request_id: str) -> str:
        """Where all workers are asked to stop a request, by the one that was told to cancel it."""
        return f"{self.root}.interrupt.{_checked(request_id)}"

    def holder(self, request_id: str) -> str:
        """Where all workers are asked whether they have a request, which goes on.

        The last token cannot be a request id, so an earlier version that takes this subject for an
        interrupt has nothing to stop.
        """
        return f"{self.root}.interrupt.{HOLDER}{_checked(request_id)}"

    @property
    def interrupts(self) -> str:
        """What every worker listens to."""
        return f"{self.root}.interrupt.*"

    @property
    def cancels(self) -> str:
        """All of `cancel`."""
        return f"{self.root}.cancel.*"

    def call(self, task: Task) -> str:
        """The front door for request-reply."""
        return f"{self.root}.call.{task}"

    def cancel(self, request_id: str) -> str:
        """Where a cancellation is asked for."""
        return f"{self.root}.cancel.{_checked(request_id)}"

    def requests_stream(self, task: Task) -> str:
        """Name of the work queue stream of a task.

        Each has its own: what a durable with a filter costs the server for each delivery grows with
        the number of requests that wait, and without one it does not.
        """
        return self._stream(f"REQUESTS_{task.upper()}")

    @property
    def results_stream(self) -> str:
        """Name of the stream that keeps every terminal event."""
        return self._stream("RESULTS")

    @property
    def dead_letters_stream(self) -> str:
        """Name of the stream that keeps what could not be handled."""
        return self._stream("DEAD_LETTERS")

    @property
    def retries_stream(self) -> str:
        """Name of the stream that keeps requests until their next attempt is due."""
        return self._stream("RETRIES")

    @property
    def releases_stream(self) -> str:
        """Name of the stream that keeps the marks on requests: not an attempt, or cancelled."""
        return self._stream("RELEASES")

    @property
    def advisories_stream(self) -> str:
        """Name of the stream that keeps what the server says of its own accord."""
        return self._stream("ADVISORIES")

    def id_in(self, subject: str, task: Task) -> str | None:
        """The request id in a request's subject, or None in the form without one."""
        prefix = f"{self.request(task)}."
        return subject.removeprefix(prefix) if subject.startswith(prefix) else None

    def check_reply(self, subject: str, allowed_prefixes: tuple[str, ...]) -> None:
        """Make sure that publishing to a subject of the sender's choice can do no harm.

        A worker publishes with its own permissions: `$JS.API.STREAM.DELETE.…` as a reply subject
        deleted a stream, a request subject loops the queue.

        Raises:
            UnsafeReplySubject: With a text that may be shown to the sender.
        """
        if len(subject) > MAX_SUBJECT or _SUBJECT.match(subject) is None:
            raise UnsafeReplySubject(
                f"reply_to: must be 1-{MAX_SUBJECT} characters of A-Z a-z 0-9 _ - between dots"
            )
        # Only replies live under <root>.reply.; all else under the root belongs to the daemon, even
        # where a generous prefix would allow it.
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
