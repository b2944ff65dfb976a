"""`/v1/chat/completions` of OpenAI's API, for prompts about images."""

import hashlib
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from consumer.gateway.answers import GENERATED, described, json_answer
from consumer.gateway.chat_parameters import NAMES, ChatParameters
from consumer.gateway.contract import with_request_names
from consumer.gateway.errors import ApiError
from consumer.gateway.sse import DONE, EventStream, sse_message
from consumer.gateway.text_stream import TextStream
from consumer.gateway.waiting import Call, SenderPart
from generation_contracts import StartedEvent, SucceededEvent, Task, TextOutput
from generation_contracts.fields import MAX_SEED

router = APIRouter(tags=["OpenAI"])


class ChatUsage(BaseModel):
    """Tokens."""

    prompt_tokens: int = Field(description="images included")
    completion_tokens: int
    total_tokens: int


class ChatMessage(BaseModel):
    """The message of the model."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """The one choice."""

    index: Literal[0] = 0
    message: ChatMessage
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Unix time in seconds")
    model: str = Field(description="the model that has run")
    choices: list[ChatChoice]
    usage: ChatUsage
    metadata: dict[str, str] = Field(description="metadata of the request")
    seed: int | None = Field(default=None, description="absent without random sampling")
    warnings: tuple[str, ...] = Field(description="where the output differs from the request")


@router.post(
    "/v1/chat/completions",
    summary="Generate a text about images",
    responses=described(ChatAnswer, streams=True),
)
async def complete_chat(sender: SenderPart, parameters: ChatParameters) -> Response:
    """Generate a text about images: one user message, after at most one system message.

    The prompt is the text of all text parts; the images keep their order. With `stream` the
    response consists of server-sent events.
    """
    sender.require_room(sum(len(url) for url in parameters.messages[-1].images))
    request = parameters.to_request(drawn_seed=_seed(sender.preferences.idempotency_key))
    model = await sender.gateway.catalogue.name_of(parameters.model, Task.IMAGE_TO_TEXT)
    request = await sender.with_model(request, parameters.model)
    try:
        call = await sender.submit(request)
        if sender.preferences.respond_async:
            return await call.accepted()
        if parameters.stream:
            return EventStream(
                _stream(call, parameters, model),
                headers=GENERATED,
                on_disconnect=call.abandon,
            )
        event = await call.result()
    except ApiError as error:
        raise with_request_names(error, NAMES) from None
    output = _text(event)
    return json_answer(
        ChatAnswer(
            id=f"chatcmpl-{event.request_id}",
            created=int(event.time.timestamp()),
            model=event.model.id,
            choices=[
                ChatChoice(
                    message=ChatMessage(content=output.text), finish_reason=output.finish_reason
                )
            ],
            usage=_usage(output),
            metadata=event.metadata,
            seed=output.seed,
            warnings=event.warnings,
        )
    )


def _seed(idempotency_key: str | None) -> int:
    """Return a random seed, or a seed derived from the idempotency key.

    A repeated request must be identical to the first, so its seed must not differ.
    """
    if idempotency_key is None:
        return secrets.randbelow(MAX_SEED + 1)
    return int.from_bytes(hashlib.sha256(idempotency_key.encode()).digest()[:4])


@dataclass
class _Chunks:
    """Builds the chunks of one stream.

    Attributes:
        model: The name of the running model; before it is known, the requested name.
        created: Unix time in seconds; 0 until the first event.
    """

    job_id: str
    model: str
    with_usage: bool
    created: int = 0

    def delta(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        """Return a chunk that adds to the message."""
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self.with_usage else {}
        return self._chunk(choices=[choice], **usage)

    def usage(self, output: TextOutput) -> bytes:
        """Return the last chunk, which has no choices."""
        return self._chunk(choices=[], usage=_usage(output).model_dump())

    def _chunk(self, **fields: Any) -> bytes:
        return sse_message(
            {
                "id": f"chatcmpl-{self.job_id}",
                "object": "chat.completion.chunk",
                "created": self.created,
                "model": self.model,
                **fields,
            }
        )


async def _stream(
    call: Call, parameters: ChatParameters, model: str
) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of OpenAI's stream of chat completions."""
    options = parameters.stream_options
    chunks = _Chunks(call.job.id, model, with_usage=bool(options and options.include_usage))
    text = TextStream()
    try:
        async with aclosing(call.events()) as events:
            async for event in events:
                if isinstance(event, SucceededEvent):
                    output = _text(event)
                    added = text.end(output.text)
                else:
                    output, added = None, text.add(event)
                if isinstance(event, StartedEvent | SucceededEvent):
                    chunks.model = event.model.id
                if chunks.created == 0 and (added or output or isinstance(event, StartedEvent)):
                    chunks.created = int(event.time.timestamp())
                    yield chunks.delta({"role": "assistant", "content": ""})
                if added:
                    yield chunks.delta({"content": added})
                if output is not None:
                    yield chunks.delta({}, output.finish_reason)
                    if chunks.with_usage:
                        yield chunks.usage(output)
    except ApiError as error:
        raise with_request_names(error, NAMES) from None
    yield DONE


def _text(event: SucceededEvent) -> TextOutput:
    return next(output for output in event.outputs if isinstance(output, TextOutput))


def _usage(output: TextOutput) -> ChatUsage:
    return ChatUsage(
        prompt_tokens=output.prompt_tokens,
        completion_tokens=output.completion_tokens,
        total_tokens=output.prompt_tokens + output.completion_tokens,
    )
