"""`/v1/chat/completions` as OpenAI's clients use it, for questions about images."""

import hashlib
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from consumer.gateway.answers import described, json_answer
from consumer.gateway.chat_parameters import NAMES, ChatParameters
from consumer.gateway.contract import in_callers_words
from consumer.gateway.errors import ApiError
from consumer.gateway.sse import DONE, EventStream, sse_message
from consumer.gateway.text_stream import TextStream
from consumer.gateway.waiting import Call, SenderPart
from generation_contracts import StartedEvent, SucceededEvent, Task, TextOutput
from generation_contracts.requests import MAX_SEED

router = APIRouter(tags=["OpenAI"])


class ChatUsage(BaseModel):
    """Tokens."""

    prompt_tokens: int = Field(description="images included")
    completion_tokens: int
    total_tokens: int


class ChatMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """The one choice."""

    index: Literal[0] = 0
    message: ChatMessage
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """The text."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Unix time in seconds")
    model: str = Field(description="the one that has run")
    choices: list[ChatChoice]
    usage: ChatUsage
    metadata: dict[str, str] = Field(description="the request's")
    seed: int | None = Field(default=None, description="absent where nothing was drawn by chance")
    warnings: tuple[str, ...] = Field(description="what was done otherwise than asked")


@router.post(
    "/v1/chat/completions",
    summary="Ask about images",
    responses=described(ChatAnswer, streams=True),
)
async def complete_chat(sender: SenderPart, parameters: ChatParameters) -> Response:
    """Answer a question about images: one user message, after at most one system message.

    The text of all text parts together is the question; the images come in their order. With
    `stream` the answer consists of server-sent events.
    """
    sender.require_room(sum(len(url) for url in parameters.messages[-1].images))
    wanted = parameters.to_request(drawn_seed=_seed(sender.preferences.idempotency_key))
    model = await sender.gateway.catalogue.name_of(parameters.model, Task.IMAGE_TO_TEXT)
    try:
        call = await sender.submit(wanted)
        if sender.preferences.respond_async:
            return await call.accepted()
        if parameters.stream:
            return EventStream(_stream(call, parameters, model), on_disconnect=call.abandon)
        event = await call.result()
    except ApiError as error:
        raise in_callers_words(error, NAMES) from None
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
    """Draw a seed; the same one for the same idempotency key, whose request must not differ."""
    if idempotency_key is None:
        return secrets.randbelow(MAX_SEED + 1)
    return int.from_bytes(hashlib.sha256(idempotency_key.encode()).digest()[:4])


@dataclass
class _Chunks:
    """Makes the chunks of one stream.

    Attributes:
        model: The one that runs; until its name is known, the one that was asked for.
        created: Unix time in seconds; 0 until the first event.
    """

    job_id: str
    model: str
    with_usage: bool
    created: int = 0

    def delta(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        """Make a chunk that adds to the message."""
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self.with_usage else {}
        return self._chunk(choices=[choice], **usage)

    def usage(self, output: TextOutput) -> bytes:
        """Make the last chunk, which has no choices."""
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
        raise in_callers_words(error, NAMES) from None
    yield DONE


def _text(event: SucceededEvent) -> TextOutput:
    return next(output for output in event.outputs if isinstance(output, TextOutput))


def _usage(output: TextOutput) -> ChatUsage:
    return ChatUsage(
        prompt_tokens=output.prompt_tokens,
        completion_tokens=output.completion_tokens,
        total_tokens=output.prompt_tokens + output.completion_tokens,
    )
