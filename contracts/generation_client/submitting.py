"""Publishing of a request, with confirmation that the stream has stored it."""

import hashlib
import hmac
import uuid
from collections.abc import Mapping

from nats.aio.client import Client
from nats.errors import Error
from nats.js.errors import APIError, NoStreamResponseError

from generation_client.codes import STREAM_FULL, TOO_LARGE_FOR_STREAM
from generation_client.errors import QueueFull, RequestTooLarge, ServiceUnavailable
from generation_client.lookup import refusal
from generation_contracts import Request, Subjects, encode
from generation_contracts.headers import MESSAGE_ID, wire_size

PUBLISH_TIMEOUT = 5.0  # seconds
MAX_REQUEST = 1_040_384  # bytes with headers: max_msg_size of the request streams
# js.publish raises these when the connection is lost meanwhile, and when another subscriber of the
# subject replies instead of the stream.
NO_PUB_ACK = (TypeError, AttributeError, ValueError, KeyError)


async def submit(
    client: Client,
    subjects: Subjects,
    queue: str,
    request: Request,
    *,
    secret: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Store a request in the request stream. Repeating the call is safe.

    Args:
        client: Connected.
        subjects: Subjects of the installation.
        queue: Queue for the request.
        request: A request with an id.
        secret: Secret of the sender; see `message_id`. With None the message id is random. Then a
            repeated request is stored again, and a worker replies to it without a second run.
        headers: Additional headers. They may replace the computed `Nats-Msg-Id`.

    Raises:
        QueueFull: The stream is full.
        RequestTooLarge: The request exceeds a limit of the server or the stream.
        ServiceUnavailable: No server, no request stream, or no confirmation. The request may have
            been stored nevertheless.
    """
    if request.request_id is None:
        raise ValueError("a request that is submitted has an id")
    body = encode(request)
    sent = {MESSAGE_ID: message_id(secret or uuid.uuid4().bytes, queue, request), **(headers or {})}
    # nats-py checks the body without the headers, and the server closes the connection over it.
    if wire_size(body, sent) > client.max_payload:
        raise RequestTooLarge
    subject = subjects.request(queue, request.request_id)
    try:
        await client.jetstream().publish(subject, body, timeout=PUBLISH_TIMEOUT, headers=sent)
    except NoStreamResponseError:
        raise ServiceUnavailable(
            f"NATS: there is no request stream for {queue}; run `consumer apply`"
        ) from None
    except APIError as error:
        if error.err_code == STREAM_FULL:
            raise QueueFull from None
        if error.err_code == TOO_LARGE_FOR_STREAM:
            raise RequestTooLarge from None
        raise ServiceUnavailable(f"NATS: the request is refused: {error.description}") from None
    except (Error, OSError, *NO_PUB_ACK) as error:
        if refused := refusal(client, subject):
            raise ServiceUnavailable(refused) from None
        reason = str(error) or type(error).__name__
        raise ServiceUnavailable(f"NATS: the request is not confirmed: {reason}") from None


def message_id(secret: bytes, queue: str, request: Request) -> str:
    """Return the `Nats-Msg-Id` of a request, derived from the request and the secret.

    JetStream drops a message whose `Nats-Msg-Id` it has stored before, from any sender, and
    acknowledges it as a duplicate. With the secret, no other sender can guess the id. So only a
    repetition by the same sender is a duplicate.
    """
    content = f"{queue}.{request.request_id}.".encode() + encode(request)
    return hmac.new(secret, content, hashlib.sha256).hexdigest()
