"""What can go wrong for a sender, as exceptions; their texts may be shown."""

from generation_contracts import CancelledEvent, FailedEvent


class GenerationError(Exception):
    """Base of everything that this package raises of its own accord."""


class ServiceUnavailable(GenerationError):
    """NATS, its streams or the object store cannot be reached or used."""


class QueueFull(ServiceUnavailable):
    """The request stream takes no more; the request was not stored."""

    def __init__(self) -> None:
        super().__init__("the queue is full: try again later")


class NoWorker(ServiceUnavailable):
    """Nobody is there who could answer a cancellation."""


class RequestTooLarge(GenerationError):
    """The request does not fit the server's limit or the stream's: name its pictures by s3://."""


class DownloadFailed(GenerationError):
    """An output cannot be fetched, or is not what its event says."""


class RequestFailed(GenerationError):
    """The request was not done and will not be.

    Attributes:
        event: Its `failure` says why, and whether a retry makes sense.
    """

    def __init__(self, event: FailedEvent) -> None:
        super().__init__(f"{event.failure.code}: {event.failure.message}")
        self.event = event


class RequestCancelled(GenerationError):
    """The request was withdrawn.

    Attributes:
        event: Its terminal event.
    """

    def __init__(self, event: CancelledEvent) -> None:
        super().__init__("the request was cancelled")
        self.event = event


class RequestIdTaken(GenerationError):
    """The result under the request's id is that of another request."""


class UnsupportedMessage(GenerationError):
    """The daemon has answered in a form that this version of the package cannot decode.

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
