"""A client for senders: submit, follow, wait, cancel. Needs the extra `client`.

async with GenerationClient("nats://127.0.0.1:4222") as client:
    result = await client.text_to_image("a red circle")
    file = await client.download(result.outputs[0])
"""

from generation_client.client import GenerationClient, new_request_id, task_of
from generation_client.errors import (
    DownloadFailed,
    GenerationError,
    NoWorker,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    RequestIdTaken,
    RequestInvalid,
    RequestTooLarge,
    ServiceUnavailable,
    UnsupportedMessage,
    UploadFailed,
)
from generation_client.images import ImageLike, Images
from generation_client.lookup import AnyEvent
from generation_client.submitting import submit

__all__ = [
    "AnyEvent",
    "DownloadFailed",
    "GenerationClient",
    "GenerationError",
    "ImageLike",
    "Images",
    "NoWorker",
    "QueueFull",
    "RequestCancelled",
    "RequestFailed",
    "RequestIdTaken",
    "RequestInvalid",
    "RequestTooLarge",
    "ServiceUnavailable",
    "UnsupportedMessage",
    "UploadFailed",
    "new_request_id",
    "submit",
    "task_of",
]
