"""Publishing a request, so that it is stored or the sender knows that it is not."""

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
from generation_contracts import Request, Subjects, Task, encode
from generation_contracts.headers import MESSAGE_ID, wire_size

PUBLISH_TIMEOUT = 5.0  # seconds
# js.publish raises these when the connection is lost under it, and when not the stream but one who
# listens to the subject has answered.
NO_PUB_ACK = (TypeError, AttributeError, ValueError, KeyError)


async def submit(
    client: Client,
    subjects: Subjects,
    task: Task,
    request: Request,
    *,
    secret: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Store a request durably; it must have an id, which makes a second submit harmless.

    Args:
        client: Connected.
        subjects: Where requests go.
        task: Whose queue.
        request: With an id.
        secret: Of the sender; see `message_id`. With None the message id is random, and the stream
            stores the request a second time, which is answered but not run.
        headers: In addition, or in the place of the usual `Nats-Msg-Id`.

    Raises:
        QueueFull: The stream is full.
        RequestTooLarge: The request does not fit the server's limit or the stream's.
        ServiceUnavailable: No server, or no stream for requests. The request may have been stored
            all the same; to submit it again is harmless.
    """
    if request.request_id is None:
        raise ValueError("a request that is submitted has an id")
    body = encode(request)
    sent = {MESSAGE_ID: message_id(secret or uuid.uuid4().bytes, task, request), **(headers or {})}
    # nats-py checks the body alone; over the limit the server drops the connection for good.
    if wire_size(body, sent) > client.max_payload:
        raise RequestTooLarge
    subject = subjects.request(task, request.request_id)
    try:
        await client.jetstream().publish(subject, body, timeout=PUBLISH_TIMEOUT, headers=sent)
    except NoStreamResponseError:
        raise ServiceUnavailable("NATS: there is no request stream; run `consumer apply`") from None
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


def message_id(secret: bytes, task: Task, request: Request) -> str:
    """Return the `Nats-Msg-Id` of a request: the same for the same request and secret.

    JetStream drops a message whose `Nats-Msg-Id` was stored before, whoever has sent the first one,
    and acknowledges it as a duplicate. So no other sender may be able to guess the id: only a
    second submit of the same request by the holder of the secret is then a duplicate.
    """
    content = f"{task}.{request.request_id}.".encode() + encode(request)
    return hmac.new(secret, content, hashlib.sha256).hexdigest()
