"""The messages of the generation consumer, for senders and readers. Pydantic only, no I/O."""

from generation_contracts.artifacts import (
    ArtifactReference,
    FileArtifact,
    ImageArtifact,
    InlineImage,
    JsonOutput,
    StoredArtifact,
    TextOutput,
)
from generation_contracts.base import Task
from generation_contracts.cancellation import CancelReply, decode_cancel_reply
from generation_contracts.chains import check_routing_slip, next_requests
from generation_contracts.envelope import ChainLink, Request, Step
from generation_contracts.events import (
    CancelledEvent,
    ChainPlace,
    FailedEvent,
    ModelInfo,
    ProgressEvent,
    StartedEvent,
    SucceededEvent,
    TerminalEvent,
    Timings,
    decode_event,
    decode_result,
)
from generation_contracts.failures import Failure, FailureCode
from generation_contracts.requests import (
    InvalidRequest,
    decode_request,
    encode,
    request_digest,
)
from generation_contracts.subjects import Subjects, UnsafeReplySubject
from generation_contracts.tasks import TASKS, TaskSpec
from generation_contracts.tasks.custom import CustomRequest, CustomStep
from generation_contracts.tasks.image_to_text import ImageToTextRequest, ImageToTextStep
from generation_contracts.tasks.text_to_image import TextToImageRequest, TextToImageStep
from generation_contracts.uploads import (
    UploadReply,
    UploadRequest,
    decode_upload_reply,
    decode_upload_request,
)

__all__ = [
    "TASKS",
    "ArtifactReference",
    "CancelReply",
    "CancelledEvent",
    "ChainLink",
    "ChainPlace",
    "CustomRequest",
    "CustomStep",
    "FailedEvent",
    "Failure",
    "FailureCode",
    "FileArtifact",
    "ImageArtifact",
    "ImageToTextRequest",
    "ImageToTextStep",
    "InlineImage",
    "InvalidRequest",
    "JsonOutput",
    "ModelInfo",
    "ProgressEvent",
    "Request",
    "StartedEvent",
    "Step",
    "StoredArtifact",
    "Subjects",
    "SucceededEvent",
    "Task",
    "TaskSpec",
    "TerminalEvent",
    "TextOutput",
    "TextToImageRequest",
    "TextToImageStep",
    "Timings",
    "UnsafeReplySubject",
    "UploadReply",
    "UploadRequest",
    "check_routing_slip",
    "decode_cancel_reply",
    "decode_event",
    "decode_request",
    "decode_result",
    "decode_upload_reply",
    "decode_upload_request",
    "encode",
    "next_requests",
    "request_digest",
]
