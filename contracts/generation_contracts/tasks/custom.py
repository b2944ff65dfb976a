"""The task custom: requests to a runner of the operator, see `generation_runner`."""

from typing import Any, ClassVar, Literal

from pydantic import Field, JsonValue

from generation_contracts.base import RequestPart, Task
from generation_contracts.envelope import TEXT, Request, Step
from generation_contracts.fields import Images, Seed, StepImages
from generation_contracts.tasks.spec import TaskSpec


class CustomParameters(RequestPart):
    """Parameters of a custom runner."""

    parameters: dict[str, JsonValue] = Field(
        default_factory=dict, description="validated by the runner of the worker"
    )
    seed: Seed | None = Field(
        default=None, description="absent: chosen by the worker, reported in the result"
    )


class CustomStep(CustomParameters, Step):
    """A later step of a routing slip that is processed by a custom runner.

    `$text` in the values of `parameters` stands for the text of the previous step.
    """

    text_field: ClassVar[str] = "parameters"
    task: Literal["custom"]
    images: StepImages | None = Field(
        default=None, description="`$outputs` (the images of the previous step) or a list"
    )

    @property
    def uses_text(self) -> bool:
        """See `Step`."""
        return any(TEXT in each for each in self.parameters.values() if isinstance(each, str))

    def with_text(self, text: str) -> dict[str, Any]:
        """See `Step`."""
        if self.uses_text and not text.strip():
            raise ValueError(f"{self.text_field}: the previous step returned an empty text")
        replaced = {
            name: value.replace(TEXT, text) if isinstance(value, str) else value
            for name, value in self.parameters.items()
        }
        return {"parameters": replaced}


class CustomRequest(CustomParameters, Request):
    """Run a custom runner."""

    task: ClassVar[Task] = Task.CUSTOM
    images: Images | None = Field(
        default=None, description="as many as the runner of the worker takes"
    )


SPEC = TaskSpec(
    title="custom",
    request=CustomRequest,
    parameters=CustomParameters,
    step=CustomStep,
    output="file",
    image_fields=("images",),
    examples={
        "custom_minimal": {"parameters": {"frequency": 440}},
        "custom_in_a_chain": {
            "request_id": "poster-0001-2",
            "images": ["s3://generation/text_to_image/poster-0001/0.png"],
            "chain": {"id": "poster-0001", "step": 2},
        },
        "custom_full": {
            "request_id": "upscaled-0001",
            "reply_to": "generation.reply.posters",
            "deadline": "2026-01-03T03:04:05Z",
            "metadata": {"customer": "Åsa", "order": "42"},
            "model": "upscaler",
            "parameters": {"factor": 2, "sharpen": True},
            "images": ["s3://generation/text_to_image/poster-0001/0.png"],
            "seed": 7,
            "then": [
                {"task": "custom", "model": "classifier", "images": "$outputs"},
                {
                    "task": "custom",
                    "model": "speech",
                    "parameters": {"words": "lighthouse"},
                    "images": ["s3://generation/text_to_image/poster-0001/0.png"],
                    "seed": 8,
                },
            ],
        },
    },
    event_examples={
        "succeeded_custom": {
            "type": "generation.v1.succeeded",
            "request_id": "upscaled-0001",
            "task": "custom",
            "queue": "upscaler",
            "sequence": 3,
            "time": "2026-01-02T03:04:05.678000Z",
            "worker": "upscaler-7f9c",
            "attempt": 1,
            "request_digest": f"sha256:{'0' * 64}",
            "outputs": [
                {
                    "kind": "file",
                    "bucket": "generation",
                    "key": f"upscaler/upscaled-0001/0-{'0' * 16}.wav",
                    "url": "https://s3.example.com/generation/upscaler/upscaled-0001/0.wav?X-Amz-…",
                    "url_expires_at": "2026-01-09T03:04:05Z",
                    "etag": "0" * 32,
                    "sha256": "0" * 64,
                    "size": 88244,
                    "media_type": "audio/wav",
                },
                {"kind": "json", "value": ["lighthouse", 0.93]},
            ],
            "model": {
                "id": "upscaler",
                "revision": "1.2",
                "family": "upscaling:Upscaler",
                "dtype": "none",
                "device": "cpu",
            },
            "parameters": {"seed": 7},
            "timings": {"queued": 0.5, "inference": 1.5, "upload": 0.25},
        }
    },
)
