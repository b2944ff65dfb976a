"""Reassembly of a streamed text from progress events that may be lost or start again."""

from http import HTTPStatus

from consumer.gateway.errors import ApiError
from generation_client import AnyEvent
from generation_contracts import ProgressEvent, StartedEvent


class TextStream:
    """Returns the parts of a text that a client has not received yet.

    Progress events are not stored. After a lost event the text has a gap, and nothing is sent until
    the result, whose text is complete. A new attempt restarts the text: nothing is sent until the
    text is longer than the sent text. The same seed and model generate the same text.
    """

    def __init__(self) -> None:
        self.sent = ""
        self._current = ""
        self._has_gap = True  # until the first event of an attempt
        self._attempt = 0
        self._sequence = 0  # of the last event

    def add(self, event: AnyEvent) -> str:
        """Add the next event and return the text to send.

        Raises:
            ApiError: The text of a new attempt differs from the sent text.
        """
        self._note_order(event)
        if not isinstance(event, ProgressEvent):
            return ""
        if event.step == 0:
            self._current, self._has_gap = "", False
        if self._has_gap:
            return ""
        self._current += event.text or ""
        return self._unsent(self._current)

    def end(self, text: str) -> str:
        """Add the complete text and return the remaining text to send.

        Raises:
            ApiError: The text differs from the sent text.
        """
        if not text.startswith(self.sent):
            raise _other_text()
        return self._unsent(text)

    def _note_order(self, event: AnyEvent) -> None:
        if event.attempt != self._attempt:
            self._attempt, self._current = event.attempt, ""
            self._has_gap = not (isinstance(event, StartedEvent) or event.sequence == 0)
        elif event.sequence != self._sequence + 1:
            self._has_gap = True
        self._sequence = event.sequence

    def _unsent(self, text: str) -> str:
        if self.sent.startswith(text):
            return ""
        if not text.startswith(self.sent):
            raise _other_text()
        added, self.sent = text[len(self.sent) :], text
        return added


def _other_text() -> ApiError:
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "another attempt generated a different text: send the request again without streaming",
        "text_changed",
    )
