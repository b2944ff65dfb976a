"""The exceptions of the client. Their texts may be shown to a user."""

from typing import Self

from pydantic import ValidationError

from generation_contracts import CancelledEvent, FailedEvent, InvalidRequest
from generation_contracts.requests import invalid_request


class GenerationError(Exception):
    """Base of the exceptions of this package."""


class RequestInvalid(GenerationError, InvalidRequest):
    """The request or one of its images is against the contract. Nothing was sent.

    Attributes:
        problems: One `{"field": …, "problem": …}` for each error, without the values.
    """

    @classmethod
    def of(cls, error: ValidationError | InvalidRequest) -> Self:
        """Return the exception for an error of `generation_contracts`."""
        found = invalid_request(error) if isinstance(error, ValidationError) else error
        return cls(str(found), found.problems)


class ServiceUnavailable(GenerationError):
    """NATS, its streams or the object store cannot be reached or used."""


class QueueFull(ServiceUnavailable):
    """The request stream is full. The request was not stored."""

    def __init__(self) -> None:
        super().__init__("the queue is full: try again later")


class NoWorker(ServiceUnavailable):
    """No worker is running that could process a cancellation or an upload."""


class RequestTooLarge(GenerationError):
    """The request exceeds a limit of the server or the stream."""

    def __init__(self) -> None:
        super().__init__(
            "the request is too large for NATS: upload its images and refer to them by s3://"
        )


class UploadFailed(GenerationError):
    """An image cannot be uploaded: a worker or the store has refused it, or the store is away."""


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
