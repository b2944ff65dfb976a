"""Calls a gateway with LiteLLM and prints the results as one JSON document.

It runs in a separate environment, because LiteLLM needs older versions of common packages.
Arguments: the base URL, and a data: URL of an image.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable
from typing import Any

import litellm  # type: ignore[import-not-found] # installed in a separate environment


async def main(base: str, image: str) -> dict[str, Any]:
    litellm.suppress_debug_info = True
    target = {"model": "openai/demonstration", "api_base": base, "api_key": "none"}
    parts = [
        {"type": "text", "text": "Describe the image."},
        {"type": "image_url", "image_url": {"url": image}},
    ]
    messages = [{"role": "user", "content": parts}]
    images = await litellm.aimage_generation(
        prompt="a red circle", n=1, size="64x64", seed=3, num_inference_steps=4, **target
    )
    answer = await litellm.acompletion(messages=messages, max_tokens=40, temperature=0, **target)
    stream = await litellm.acompletion(
        messages=messages, stream=True, stream_options={"include_usage": True}, **target
    )
    chunks = [chunk async for chunk in stream]
    without_image = [{"role": "user", "content": "no image"}]
    return {
        "image": images.data[0].b64_json,
        "text": answer.choices[0].message.content,
        "finish_reason": answer.choices[0].finish_reason,
        "tokens": answer.usage.total_tokens,
        "streamed": "".join(
            choice.delta.content or "" for chunk in chunks for choice in chunk.choices
        ),
        "streamed_tokens": chunks[-1].usage.total_tokens,
        "refused": await _error(litellm.acompletion(messages=without_image, **target)),
        "unknown": await _error(
            litellm.acompletion(messages=messages, **{**target, "model": "openai/other"})
        ),
    }


async def _error(call: Awaitable[Any]) -> dict[str, Any] | None:
    try:
        await call
    except Exception as error:  # noqa: BLE001 - LiteLLM's errors have no common base
        return {"name": type(error).__name__, "status": getattr(error, "status_code", None)}
    return None


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))  # noqa: T201 - the output of this program
