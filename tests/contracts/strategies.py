"""Hypothesis strategies: valid requests, and arbitrary JSON."""

import base64
from datetime import datetime, timedelta, timezone
from typing import Any

from hypothesis import strategies as st

from generation_contracts import (
    ArtifactReference,
    ImageToTextRequest,
    ImageToTextStep,
    InlineImage,
    TextToImageRequest,
    TextToImageStep,
)

_NAME = "ABCXYZabcxyz0189_-"
_BASE64 = st.binary(min_size=1, max_size=40).map(lambda data: base64.b64encode(data).decode())

prompts = st.text(min_size=1, max_size=40).filter(lambda text: bool(text.strip()))
request_ids = st.text(_NAME, min_size=1, max_size=64)
subjects = st.lists(st.text(_NAME, min_size=1, max_size=9), min_size=1, max_size=9).map(".".join)
offsets = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
# Seconds since 1970: far from the first and the last year, which no time zone can shift.
deadlines = st.builds(datetime.fromtimestamp, st.integers(0, 2**35), offsets)
buckets = st.from_regex(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", fullmatch=True)
keys = st.lists(
    st.text(
        st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/\\"),
        min_size=1,
        max_size=20,
    ).filter(lambda part: part not in {".", ".."}),
    min_size=1,
    max_size=5,
).map("/".join)
seeds = st.integers(0, 2**32 - 1)

images = st.one_of(
    st.builds(ArtifactReference, bucket=buckets, key=keys),
    st.builds(InlineImage, base64=_BASE64),
    _BASE64.map("data:image/png;base64,{}".format),
    st.builds("s3://{}/{}".format, buckets, keys),
    st.from_regex(r"https?://[!-~]{1,40}", fullmatch=True),
)

TEXT_TO_IMAGE: dict[str, st.SearchStrategy[Any]] = {
    "negative_prompt": st.text(max_size=20),
    "width": st.integers(16, 4096),
    "height": st.integers(16, 4096),
    "num_inference_steps": st.integers(1, 200),
    "guidance_scale": st.floats(0, 100),
    "num_images": st.integers(1, 8),
    "seed": seeds,
    "output_format": st.sampled_from(["png", "webp", "jpeg"]),
    "adapters": st.dictionaries(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True),
        st.floats(-4, 4),
        max_size=4,
    ),
    "preview": st.booleans(),
}
IMAGE_TO_TEXT: dict[str, st.SearchStrategy[Any]] = {
    "system": st.text(max_size=20),
    "max_new_tokens": st.integers(1, 8192),
    "temperature": st.floats(0, 10),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(1, 1000),
    "repetition_penalty": st.floats(0.01, 10),
    "seed": seeds,
    "stream": st.booleans(),
}


def _some(
    model: type[Any], required: dict[str, Any], optional: dict[str, Any]
) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(required, optional=optional).map(lambda fields: model(**fields))


_steps = st.one_of(
    _some(TextToImageStep, {"task": st.just("text_to_image"), "prompt": prompts}, TEXT_TO_IMAGE),
    _some(
        ImageToTextStep,
        {"task": st.just("image_to_text"), "prompt": prompts},
        {
            **IMAGE_TO_TEXT,
            "images": st.just("$outputs") | st.lists(images, min_size=1, max_size=3),
            "each": st.booleans(),
        },
    ),
)
ENVELOPE: dict[str, st.SearchStrategy[Any]] = {
    "request_id": request_ids,
    "reply_to": subjects,
    "deadline": deadlines,
    "metadata": st.dictionaries(st.text(min_size=1, max_size=20), st.text(max_size=20), max_size=4),
    "then": st.lists(_steps, max_size=3),
    "chain": st.fixed_dictionaries(
        {"id": request_ids, "step": st.integers(1, 9)},
        optional={"branch": st.sampled_from(["", "0", "7-12", "0-" * 11 + "10"])},
    ),
}

text_to_image_requests = _some(
    TextToImageRequest, {"prompt": prompts}, {**ENVELOPE, **TEXT_TO_IMAGE}
)
image_to_text_requests = _some(
    ImageToTextRequest,
    {"prompt": prompts, "images": st.lists(images, min_size=1, max_size=4)},
    {**ENVELOPE, **IMAGE_TO_TEXT},
)
requests = text_to_image_requests | image_to_text_requests

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
