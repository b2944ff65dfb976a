"""Chat completions with openai-python, on the real system."""

from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from generation_client import GenerationClient
from generation_contracts import SucceededEvent, Task, TextOutput
from tests.gateway.images import data_url, red_circle

IMAGE = {"type": "image_url", "image_url": {"url": data_url(red_circle()), "detail": "auto"}}
WITHIN = 60.0  # seconds
DESCRIPTION = "A red circle on a blue background in the center."


def user(text: str = "Describe the image.", *images: Any) -> Any:
    return {"role": "user", "content": [{"type": "text", "text": text}, *(images or (IMAGE,))]}


async def test_a_question_gets_an_answer(openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(model="demonstration", messages=[user()])
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-open0000-")
    assert answer.model == "demonstration"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", DESCRIPTION)
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 5
    assert answer.usage.prompt_tokens > answer.usage.completion_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_parameters_reach_the_model(openai: AsyncOpenAI, behind: GenerationClient) -> None:
    answer = await openai.chat.completions.create(
        model="image_to_text",
        messages=[{"role": "system", "content": "You see shapes."}, user()],
        max_completion_tokens=3,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        n=1,
        metadata={"page": "7"},
        user="somebody",
        frequency_penalty=0,
        response_format={"type": "text"},
        extra_body={"top_k": 5},
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert answer.metadata == {"page": "7"}
    assert answer.model_extra is not None
    assert answer.model_extra["seed"] == 11
    job = answer.id.removeprefix("chatcmpl-")
    result = await behind.result(Task.IMAGE_TO_TEXT, job, within=0)
    assert isinstance(result, SucceededEvent)
    expected = {"max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5}
    assert expected.items() <= result.parameters.items()


async def test_a_stream_has_the_text_and_the_usage(openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(
        model="demonstration",
        messages=[user()],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    *parts, last, usage = chunks
    assert {(chunk.id, chunk.object, chunk.model) for chunk in chunks} == {
        (chunks[0].id, "chat.completion.chunk", "demonstration")
    }
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == DESCRIPTION
    assert all(part.choices[0].finish_reason is None for part in parts)
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens > 5


async def test_a_stream_has_no_usage_by_default(openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(
        model="demonstration", messages=[user()], stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


async def test_the_stream_helper_of_the_library_works(openai: AsyncOpenAI) -> None:
    async with openai.chat.completions.stream(
        model="demonstration", messages=[user()], temperature=0
    ) as stream:
        completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == DESCRIPTION


async def test_a_sampled_stream_has_a_seed(openai: AsyncOpenAI, behind: GenerationClient) -> None:
    stream = await openai.chat.completions.create(
        model="demonstration", messages=[user()], stream=True, temperature=1.5
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    job = stream.response.headers["x-request-id"]
    result = await behind.result(Task.IMAGE_TO_TEXT, job, within=0)
    assert isinstance(result, SucceededEvent)
    output = result.outputs[0]
    assert isinstance(output, TextOutput)
    assert output.text == text
    assert output.seed is not None


async def test_a_repeated_idempotent_stream_returns_the_same_job(openai: AsyncOpenAI) -> None:
    async def send() -> tuple[str, str]:
        stream = await openai.chat.completions.create(
            model="demonstration",
            messages=[user()],
            stream=True,
            temperature=1.5,
            extra_headers={"Idempotency-Key": "chat"},
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return stream.response.headers["x-request-id"], text

    assert await send() == await send()


async def test_an_asynchronous_request_returns_a_job(
    http: httpx2.AsyncClient, behind: GenerationClient
) -> None:
    answer = await http.post(
        "/v1/chat/completions",
        json={"model": "demonstration", "messages": [user()], "stream": True},
        headers={"Prefer": "respond-async"},
    )
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["preference-applied"] == "respond-async"
    assert answer.headers["location"] == job["status_url"] == f"/v1/jobs/{job['id']}"
    assert job["task"] == "image_to_text"
    result = await behind.result(Task.IMAGE_TO_TEXT, job["id"], within=WITHIN)
    assert isinstance(result, SucceededEvent)


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"n": 2}, "n"),
        ({"stop": ["."]}, "stop"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"seed": -3}, "seed"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "no image"}]}, "messages"),
        ({"messages": [user(""), {"role": "assistant", "content": "a"}, user()]}, "messages"),
        ({"messages": [user(), user()]}, "messages"),
        ({"messages": [user(" ")]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages.0.content.0",
        ),
        ({"messages": [{"role": "user", "content": [{"type": {}}]}]}, "messages.0.content.0"),
        (
            {"messages": [user("a", {"type": "image_url", "image_url": {"url": "ftp://a/b"}})]},
            "messages",
        ),
        (
            {"messages": [user("a", {"type": "image_url", "image_url": {"url": "data:,a"}})]},
            "messages.0",
        ),
        (
            {"messages": [user("a", {"type": "image_url", "image_url": {"url": data_url(b"x")}})]},
            "messages",
        ),
        (
            {"messages": [user("a", {"type": "image_url", "image_url": {"url": "https://a.b/c"}})]},
            "messages",
        ),
    ],
)
async def test_an_error_names_the_unsupported_parameter(
    openai: AsyncOpenAI, parameters: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequestError) as raised:
        await openai.chat.completions.create(
            **{"model": "demonstration", "messages": [user()], **parameters}
        )
    assert raised.value.param == param


async def test_a_model_of_the_other_task_is_not_found(openai: AsyncOpenAI) -> None:
    with pytest.raises(NotFoundError):
        await openai.chat.completions.create(model="text_to_image", messages=[user()])


async def test_models_are_listed(openai: AsyncOpenAI) -> None:
    models = [model async for model in openai.models.list()]
    assert [model.id for model in models] == ["demonstration"]
    assert models[0].object == "model"
    assert models[0].model_extra == {"tasks": ["text_to_image", "image_to_text"]}
    assert await openai.models.retrieve("demonstration") == models[0]
    with pytest.raises(NotFoundError) as raised:
        await openai.models.retrieve("someone/something")
    assert raised.value.code == "model_not_found"
