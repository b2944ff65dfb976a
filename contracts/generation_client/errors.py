"""The exceptions of the client. Their texts may be shown to a user."""

from generation_contracts import CancelledEvent, FailedEvent


class GenerationError(Exception):
    """Base of the exceptions of this package."""


class ServiceUnavailable(GenerationError):
    """NATS, its streams or the object store cannot be reached or used."""


class QueueFull(ServiceUnavailable):
    """The request stream is full. The request was not stored."""

    def __init__(self) -> None:
        super().__init__("the queue is full: try again later")


class NoWorker(ServiceUnavailable):
    """No worker is running that could process a cancellation."""


class RequestTooLarge(GenerationError):
    """The request exceeds a limit of the server or the stream. Pass its images as s3:// URIs."""


class DownloadFailed(GenerationError):
    """An output cannot be fetched, or its digest differs from the event."""


class RequestFailed(GenerationError):
    """The request has failed.

    Attributes:
        event: The terminal event. `event.failure` has the code, and whether a retry makes sense.
    """

    def __init__(self, event: FailedEvent) -> None:
        super().__init__(f"{event.failure.code}: {event.failure.message}")
        self.event = event


class RequestCancelled(GenerationError):
    """The request was cancelled.

    Attributes:
        event: The terminal event.
    """

    def __init__(self, event: CancelledEvent) -> None:
        super().__init__("the request was cancelled")
        self.event = event


class RequestIdTaken(GenerationError):
    """The stored result under the request id belongs to another request."""


class UnsupportedMessage(GenerationError):
    """A message of the daemon that this version of the package cannot decode.

    Attributes:
        type: The type of the message, for example `generation.v2.failed`.
        body: The message.
    """

    def __init__(self, type: str, body: bytes, field: str = "") -> None:  # noqa: A002 - the field's name
        place = f" ({field})" if field else ""
        super().__init__(
            f"this version of generation_client cannot read {type[:100]}{place}: update it"
        )
        self.type = type
        self.body = body
