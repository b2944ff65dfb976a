"""A text as it grows, out of progress events that may be lost or begin anew."""

from http import HTTPStatus

from consumer.gateway.errors import ApiError
from generation_client import AnyEvent
from generation_contracts import ProgressEvent, StartedEvent


class TextStream:
    """Makes the parts of a text that a client has not received yet.

    Progress events are not stored: after a lost one the text has a gap, and nothing more is sent
    until the result, whose text is complete. Another attempt restarts the text: nothing
    is sent until it is longer than what was sent. With the same seed and model it is the same text.
    """

    def __init__(self) -> None:
        self.sent = ""
        self._current = ""
        self._has_gap = True  # until the first event of an attempt
        self._attempt = 0
        self._sequence = 0  # of the last event

    def add(self, event: AnyEvent) -> str:
        """Take the next event; return what to send.

        Raises:
            ApiError: The text of a new attempt is not the one that was sent.
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
        """Take the complete text; return what to send.

        Raises:
            ApiError: It is not the text that was sent.
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
        "another attempt has written another text: send the request again without streaming",
        "text_changed",
    )
