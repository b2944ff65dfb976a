"""Writes the golden files: every example message in wire format, with subject and headers.

Rewrite them, after a change of the contract that is meant, with

    uv run python -m tests.contracts.rewrite_golden

and read the difference: whatever changes in a file that was there before is a new version.
"""

import json
from pathlib import Path
from typing import Any

from generation_contracts import (
    CancelReply,
    Subjects,
    Task,
    TerminalEvent,
    UploadReply,
    UploadRequest,
    encode,
)
from generation_contracts.events import EventBase
from generation_contracts.examples import EVENTS, REPLIES, REQUESTS, TRACE_PARENT, UPLOADS
from generation_contracts.headers import event_headers

GOLDEN = Path(__file__).parent / "golden"
MESSAGES = {**REQUESTS, **EVENTS, **REPLIES, **UPLOADS}


def task_of(message: Any) -> Task:
    task: Task = message.task
    return task


def golden(message: Any) -> dict[str, Any]:
    """Subject, headers (the daemon writes them for events only) and body of a message."""
    if isinstance(message, CancelReply | UploadReply):
        return {"body": json.loads(encode(message))}  # on the inbox of the caller
    if isinstance(message, UploadRequest):
        return {"subject": Subjects().upload, "body": json.loads(encode(message))}
    task, body = task_of(message), json.loads(encode(message))
    if not isinstance(message, EventBase):
        return {"subject": Subjects().request(task, message.request_id), "body": body}
    subject = Subjects().result if isinstance(message, TerminalEvent) else Subjects().progress
    return {
        "subject": subject(message.queue_name, message.request_id),
        "headers": event_headers(message, trace_parent=TRACE_PARENT),
        "body": body,
    }


def render(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.json"):
        old.unlink()
    for name, message in MESSAGES.items():
        (GOLDEN / f"{name}.json").write_text(render(golden(message)), encoding="utf-8")


if __name__ == "__main__":
    main()
