"""Example messages of every kind. Together they set every field of every message.

Each request type has a minimal and a full example. The schemas contain the examples, and the golden
files pin them, so the documentation and the wire format stay equal.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from generation_contracts.artifacts import (
    ArtifactReference,
    ImageArtifact,
    InlineImage,
    TextOutput,
)
from generation_contracts.base import Task
from generation_contracts.cancellation import CancelReply
from generation_contracts.envelope import ChainLink, Request
from generation_contracts.events import (
    CancelledEvent,
    ChainPlace,
    FailedEvent,
    ModelInfo,
    ProgressEvent,
    StartedEvent,
    SucceededEvent,
    Timings,
    decode_event,
)
from generation_contracts.failures import Failure, FailureCode
from generation_contracts.requests import request_digest
from generation_contracts.tasks import TASKS
from generation_contracts.tasks.image_to_text import ImageToTextRequest, ImageToTextStep
from generation_contracts.tasks.text_to_image import TextToImageRequest, TextToImageStep
from generation_contracts.uploads import UploadReply, UploadRequest

Event = StartedEvent | ProgressEvent | SucceededEvent | FailedEvent | CancelledEvent

TRACE_PARENT: Final = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

_PICTURE_ID = "poster-0001"
_TEXT_ID = "caption-0001"
_UPLOAD_KEY = "uploads/6f1d3c0b5e7a4f0e9a2b8c7d6e5f4a3b.jpg"
_TIME = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
_LATER = datetime(2026, 1, 3, 3, 4, 5, tzinfo=UTC)
_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mM4AQAAygDJNEIn8wAAAABJRU5ErkJggg=="
)
_JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAP//////////////////////////////////////////////////////"
    "////////////////////////////////wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAAv/EABQQAQAA"
    "AAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AT//Z"
)
_METADATA = {"customer": "Åsa", "order": "42"}

REQUESTS: Final[Mapping[str, Request]] = {
    "text_to_image_minimal": TextToImageRequest(prompt="a red circle on a blue background"),
    "text_to_image_full": TextToImageRequest(
        request_id=_PICTURE_ID,
        reply_to="generation.reply.posters",
        deadline=_LATER,
        metadata=_METADATA,
        prompt="a lighthouse at dusk, “oil on canvas”",
        negative_prompt="text, frame",
        width=1024,
        height=768,
        num_inference_steps=28,
        guidance_scale=4.5,
        num_images=2,
        seed=7,
        output_format="webp",
        preview=True,
        then=(
            ImageToTextStep(
                task="image_to_text", prompt="Describe each picture.", images="$outputs", each=True
            ),
            TextToImageStep(task="text_to_image", prompt="as a woodcut: $text", num_images=1),
        ),
    ),
    "text_to_image_adapters": TextToImageRequest(
        request_id="sketch-0001",
        prompt="a lighthouse at dusk",
        adapters={"pencil": 0.75, "storm_2": -0.5},
        then=(
            TextToImageStep(
                task="text_to_image", prompt="the same by night", adapters={"pencil": 1.0}
            ),
        ),
    ),
    "text_to_image_of_a_model": TextToImageRequest(
        request_id="sketch-0003",
        prompt="a lighthouse at dusk",
        model="stabilityai/sdxl-turbo",
        then=(
            ImageToTextStep(task="image_to_text", prompt="Describe it.", model="captions"),
            TextToImageStep(task="text_to_image", prompt="$text", model="sdxl-turbo"),
        ),
    ),
    "text_to_image_in_a_chain": TextToImageRequest(
        request_id="poster-0001-3-1",
        prompt="as a woodcut: a lighthouse",
        metadata=_METADATA,
        chain=ChainLink(id=_PICTURE_ID, step=3, branch="1"),
    ),
    "image_to_text_in_a_chain": ImageToTextRequest(
        request_id="poster-0001-2-1",
        prompt="Describe each picture.",
        images=(ArtifactReference(bucket="generation", key="text_to_image/poster-0001/1.png"),),
        metadata=_METADATA,
        then=(TextToImageStep(task="text_to_image", prompt="as a woodcut: $text"),),
        chain=ChainLink(id=_PICTURE_ID, step=2, branch="1"),
    ),
    "image_to_text_of_a_model": ImageToTextRequest(
        prompt="What is in this picture?",
        images=("s3://generation/text_to_image/poster-0001/0.png",),
        model="captions",
    ),
    "image_to_text_minimal": ImageToTextRequest(
        prompt="What is in this picture?",
        images=("s3://generation/text_to_image/poster-0001/0.png",),
    ),
    "image_to_text_full": ImageToTextRequest(
        request_id=_TEXT_ID,
        reply_to="_INBOX.Zx81kGq3.1",
        deadline=_LATER,
        metadata=_METADATA,
        prompt="What has changed between the first and the last picture?",
        images=(
            ArtifactReference(bucket="generation", key="text_to_image/poster-0001/0.png"),
            "s3://generation/text_to_image/poster-0001/1.png",
            InlineImage(base64=_PNG),
            f"data:image/png;base64,{_PNG}",
            "https://pictures.example/lighthouse.jpg",
        ),
        system="Answer in one sentence.",
        max_new_tokens=128,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        repetition_penalty=1.05,
        seed=7,
        stream=True,
        then=(
            TextToImageStep(
                task="text_to_image",
                prompt="$text",
                negative_prompt="text",
                width=512,
                height=512,
                num_inference_steps=20,
                guidance_scale=7.0,
                seed=8,
                output_format="jpeg",
            ),
            ImageToTextStep(
                task="image_to_text",
                prompt="Is it the same place?",
                images=("s3://generation/text_to_image/poster-0001/0.png",),
                system="Answer yes or no.",
                max_new_tokens=4,
                temperature=0.0,
                top_p=1.0,
                top_k=1,
                repetition_penalty=1.0,
                seed=9,
                stream=True,
            ),
        ),
    ),
    **{
        name: spec.request.model_validate_json(json.dumps(example))
        for spec in TASKS.values()
        for name, example in spec.examples.items()
    },
}

_WORKER = "text_to_image-7f9c"
_PICTURE_DIGEST = request_digest(REQUESTS["text_to_image_full"])
_PICTURE_MODEL = ModelInfo(
    id="black-forest-labs/FLUX.1-schnell",
    revision="741f7c3ce8b383c54771c7003378a50191e9efe9",
    family="Flux",
    dtype="bfloat16",
    device="cuda",
)

_TEXT_MODEL = ModelInfo(
    id="Qwen/Qwen2.5-VL-3B-Instruct", family="qwen2_5_vl", dtype="float32", device="cpu"
)

_DETAILS: Mapping[FailureCode, dict[str, Any]] = {
    FailureCode.INVALID_REQUEST: {
        "problems": [{"field": "width", "problem": "input should be less than or equal to 4096"}]
    },
    FailureCode.UNSUPPORTED_PARAMETER: {"parameter": "negative_prompt"},
}


def _failed(code: FailureCode, message: str, **details: Any) -> FailedEvent:
    return FailedEvent(
        request_id=_PICTURE_ID,
        task=Task.TEXT_TO_IMAGE,
        sequence=1,
        time=_TIME,
        worker=_WORKER,
        attempt=1,
        metadata=_METADATA,
        request_digest=_PICTURE_DIGEST,
        failure=Failure.of(code, message, **_DETAILS.get(code, {}), **details),
    )


_FAILURES = {
    FailureCode.INVALID_REQUEST: "width: input should be less than or equal to 4096",
    FailureCode.UNSUPPORTED_PARAMETER: "negative_prompt: this model has no such parameter",
    FailureCode.REQUEST_ID_CONFLICT: "another request with this id has been done already",
    FailureCode.INPUT_UNAVAILABLE: "images.0: there is no such object",
    FailureCode.DEADLINE_EXCEEDED: "the deadline passed before the request was done",
    FailureCode.OUT_OF_MEMORY: "the device's memory did not suffice",
    FailureCode.MODEL_ERROR: "the model failed: RuntimeError",
    FailureCode.WORKER_LOST: "the workers that ran this request were lost",
    FailureCode.QUEUE_FULL: "the queue is full: try again later",
    FailureCode.INTERNAL: "the worker failed",
}

_ALONE: Mapping[str, Event] = {
    "started": StartedEvent(
        request_id=_PICTURE_ID,
        task=Task.TEXT_TO_IMAGE,
        sequence=0,
        time=_TIME,
        worker=_WORKER,
        attempt=1,
        metadata=_METADATA,
        queued=0.25,
        model=_PICTURE_MODEL,
    ),
    "started_defaults": StartedEvent(
        request_id="sketch-0001",
        task=Task.TEXT_TO_IMAGE,
        sequence=0,
        time=_TIME,
        worker=_WORKER,
        attempt=1,
        queued=0.25,
        model=_PICTURE_MODEL,
        defaults={
            "width": 1024,
            "height": 1024,
            "num_inference_steps": 4,
            "guidance_scale": 0.0,
            "num_images": 1,
            "output_format": "png",
        },
    ),
    "progress_image": ProgressEvent(
        request_id=_PICTURE_ID,
        task=Task.TEXT_TO_IMAGE,
        sequence=5,
        time=_TIME,
        worker=_WORKER,
        attempt=1,
        metadata=_METADATA,
        step=14,
        of=28,
        seconds_per_step=0.125,
        eta=1.75,
        preview=_JPEG,
    ),
    "progress_text": ProgressEvent(
        request_id=_TEXT_ID,
        task=Task.IMAGE_TO_TEXT,
        sequence=3,
        time=_TIME,
        worker="image_to_text-1",
        attempt=2,
        step=12,
        of=128,
        text=" a red circle",
    ),
    "progress_begun_again": ProgressEvent(
        request_id=_TEXT_ID,
        task=Task.IMAGE_TO_TEXT,
        sequence=4,
        time=_TIME,
        worker="image_to_text-1",
        attempt=2,
        step=0,
        of=128,
    ),
    "succeeded_image": SucceededEvent(
        request_id=_PICTURE_ID,
        task=Task.TEXT_TO_IMAGE,
        sequence=9,
        time=_TIME,
        worker=_WORKER,
        attempt=1,
        metadata=_METADATA,
        request_digest=_PICTURE_DIGEST,
        outputs=(
            ImageArtifact(
                bucket="generation",
                key="text_to_image/poster-0001/0-ba7816bf.webp",
                url="https://pictures.example/generation/text_to_image/poster-0001/0-ba7816bf.webp?X-Amz-Signature=0",
                url_expires_at=_LATER,
                etag="9a0364b9e99bb480dd25e1f0284c8555",
                sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
                size=143_210,
                media_type="image/webp",
                width=1024,
                height=768,
                seed=7,
            ),
        ),
        model=_PICTURE_MODEL,
        timings=Timings(queued=0.25, inference=3.5, encode=0.125, upload=0.0625),
        warnings=("the prompt was cut to the model's 256 tokens",),
    ),
    "succeeded_text": SucceededEvent(
        request_id=_TEXT_ID,
        task=Task.IMAGE_TO_TEXT,
        sequence=12,
        time=_TIME,
        worker="image_to_text-1",
        attempt=2,
        request_digest=request_digest(REQUESTS["image_to_text_full"]),
        outputs=(
            TextOutput(
                text="The light is on: “at last”.",
                finish_reason="stop",
                prompt_tokens=911,
                completion_tokens=9,
            ),
        ),
        model=_TEXT_MODEL,
        timings=Timings(queued=0.5, inference=1.5),
    ),
    "succeeded_image_flagged": SucceededEvent(
        request_id="sketch-0001",
        task=Task.TEXT_TO_IMAGE,
        sequence=9,
        time=_TIME,
        worker=_WORKER,
        attempt=1,
        request_digest=request_digest(REQUESTS["text_to_image_adapters"]),
        outputs=(
            ImageArtifact(
                bucket="generation",
                key="text_to_image/sketch-0001/0-ba7816bf.png",
                url="https://pictures.example/generation/text_to_image/sketch-0001/0-ba7816bf.png?X-Amz-Signature=0",
                url_expires_at=_LATER,
                etag="9a0364b9e99bb480dd25e1f0284c8555",
                sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
                size=1_432_100,
                media_type="image/png",
                width=1024,
                height=1024,
                seed=4_019_283_746,
                flagged=False,
            ),
        ),
        model=_PICTURE_MODEL,
        parameters={
            "width": 1024,
            "height": 1024,
            "num_inference_steps": 4,
            "guidance_scale": 0.0,
            "adapters": {"pencil": 0.75, "storm_2": -0.5},
        },
        timings=Timings(queued=0.25, inference=3.5, encode=0.125, upload=0.0625),
    ),
    "succeeded_text_sampled": SucceededEvent(
        request_id=_TEXT_ID,
        task=Task.IMAGE_TO_TEXT,
        sequence=12,
        time=_TIME,
        worker="image_to_text-1",
        attempt=2,
        request_digest=request_digest(REQUESTS["image_to_text_full"]),
        outputs=(
            TextOutput(
                text="The light is on: “at last”.",
                finish_reason="stop",
                prompt_tokens=911,
                completion_tokens=9,
                seed=7,
            ),
        ),
        model=_TEXT_MODEL,
        parameters={
            "max_new_tokens": 128,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
            "repetition_penalty": 1.05,
        },
        timings=Timings(queued=0.5, inference=1.5),
    ),
    "failed_out_of_memory_tried": _failed(
        FailureCode.OUT_OF_MEMORY,
        "the device has too little memory for this request",
        tried=["decoding in tiles", "parts in main memory while they are not used"],
    ),
    **{f"failed_{code}": _failed(code, message) for code, message in _FAILURES.items()},
    "cancelled": CancelledEvent(
        request_id=_PICTURE_ID,
        task=Task.TEXT_TO_IMAGE,
        sequence=2,
        time=_TIME,
        worker=_WORKER,
        attempt=1,
        metadata=_METADATA,
        request_digest=_PICTURE_DIGEST,
    ),
}

# From a worker that marks its outputs, and reports the versions of its libraries.
_LIBRARIES = {"diffusers": "0.42.0", "torch": "2.15.0+cu128", "transformers": "5.23.0"}
_MARKED: Mapping[str, Event] = {
    "succeeded_image_marked": SucceededEvent(
        request_id="sketch-0002",
        task=Task.TEXT_TO_IMAGE,
        sequence=9,
        time=_TIME,
        worker=_WORKER,
        attempt=1,
        request_digest=request_digest(REQUESTS["text_to_image_minimal"]),
        outputs=(
            ImageArtifact(
                bucket="generation",
                key="text_to_image/sketch-0002/0-ba7816bf.png",
                url="https://pictures.example/generation/text_to_image/sketch-0002/0-ba7816bf.png?X-Amz-Signature=0",
                url_expires_at=_LATER,
                etag="9a0364b9e99bb480dd25e1f0284c8555",
                sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
                size=1_432_100,
                media_type="image/png",
                width=1024,
                height=1024,
                seed=4_019_283_746,
                marks=("iptc", "c2pa"),
            ),
        ),
        model=_PICTURE_MODEL.model_copy(update={"libraries": _LIBRARIES}),
        timings=Timings(queued=0.25, inference=3.5, encode=0.125, upload=0.0625),
        ai_generated=True,
    ),
    "succeeded_text_marked": SucceededEvent(
        request_id="caption-0002",
        task=Task.IMAGE_TO_TEXT,
        sequence=12,
        time=_TIME,
        worker="image_to_text-1",
        attempt=1,
        request_digest=request_digest(REQUESTS["image_to_text_minimal"]),
        outputs=(
            TextOutput(
                text="A red circle.", finish_reason="stop", prompt_tokens=911, completion_tokens=5
            ),
        ),
        model=_TEXT_MODEL,
        timings=Timings(queued=0.5, inference=1.5),
        ai_generated=True,
    ),
}

_ONE_OF_EACH = {
    "started": "started",
    "progress": "progress_image",
    "succeeded": "succeeded_image",
    "failed": "failed_internal",
    "cancelled": "cancelled",
}

EVENTS: Final[Mapping[str, Event]] = {
    **_ALONE,
    **_MARKED,
    **{
        name: decode_event(json.dumps(example).encode())
        for spec in TASKS.values()
        for name, example in spec.event_examples.items()
    },
    **{
        f"{kind}_in_a_chain": _ALONE[name].model_copy(
            update={"chain": ChainPlace(id=_PICTURE_ID, step=1, of=3)}
        )
        for kind, name in _ONE_OF_EACH.items()
    },
    **{
        f"{kind}_in_a_queue": _ALONE[name].model_copy(update={"queue": "sdxl-turbo"})
        for kind, name in _ONE_OF_EACH.items()
    },
}

REPLIES: Final[Mapping[str, CancelReply]] = {
    "cancel_reply": CancelReply(
        request_id=_PICTURE_ID, status="cancelled", result="generation.v1.cancelled"
    ),
    "cancel_reply_stopping": CancelReply(request_id=_PICTURE_ID, status="stopping"),
}

UPLOADS: Final[Mapping[str, UploadRequest | UploadReply]] = {
    "upload": UploadRequest(size=4_812_331, media_type="image/jpeg"),
    "upload_reply": UploadReply(
        url="https://s3.example.com/generation",
        fields={
            "key": _UPLOAD_KEY,
            "Content-Type": "image/jpeg",
            "policy": "eyJleHBpcmF0aW9uIjoi…",
            "x-amz-algorithm": "AWS4-HMAC-SHA256",
            "x-amz-credential": "generation/20260102/us-east-1/s3/aws4_request",
            "x-amz-date": "20260102T030405Z",
            "x-amz-signature": "0" * 64,
        },
        expires_at=_TIME + timedelta(minutes=10),
        bucket="generation",
        key=_UPLOAD_KEY,
    ),
}
