"""`/infer` for both model types, with a plain HTTP client."""

import base64
from typing import Any

import httpx2
import pytest

from generation_client import GenerationClient
from generation_contracts import SucceededEvent, Task
from tests.gateway.images import data_url, decoded, red_circle

WITHIN = 60.0  # seconds
ENCODED = base64.b64encode(red_circle()).decode()


async def test_a_prompt_returns_images(http: httpx2.AsyncClient) -> None:
    body = {"prompt": "a red circle", "width": 64, "height": 32, "num_images": 2, "seed": 4}
    answer = await http.post("/infer", json={**body, "num_inference_steps": 3})
    assert answer.status_code == 200, answer.text
    value = answer.json()
    assert value["model_type"] == "text2image"
    assert value["image"] == value["images"][0] != value["images"][1]
    assert decoded(value["image"]).size == (value["width"], value["height"]) == (64, 32)
    assert value["media_type"] == "image/png"
    assert value["seeds"] == [4, 5]
    assert value["marks"] == [["iptc"], ["iptc"]]
    assert value["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "images",
    [
        {"images": [ENCODED]},
        {"image": ENCODED},
        {"images": [data_url(red_circle())]},
        {"images": [ENCODED], "model_type": "image2text"},
        {"image": ENCODED, "model_type": "image_to_text"},
    ],
)
async def test_a_prompt_and_an_image_return_a_text(
    http: httpx2.AsyncClient, images: dict[str, Any]
) -> None:
    answer = await http.post("/infer", json={"prompt": "Describe the image.", **images})
    assert answer.status_code == 200, answer.text
    value = answer.json()
    assert value["model_type"] == "image2text"
    assert value["text"] == "A red circle on a blue background in the center."
    assert value["finish_reason"] == "stop"
    assert value["completion_tokens"] > 5


IMAGE = {"prompt": "a red circle", "num_inference_steps": 1}
QUESTION = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Describe the image."},
                {"type": "image_url", "image_url": {"url": data_url(red_circle())}},
            ],
        }
    ],
    "max_tokens": 2,
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/infer", IMAGE),
        ("/v1/images/generations", IMAGE),
        ("/v1/images/generations", {**IMAGE, "stream": True}),
        ("/v1/chat/completions", QUESTION),
        ("/v1/chat/completions", {**QUESTION, "stream": True}),
    ],
    ids=["infer", "images", "stream of images", "chat", "stream of chat"],
)
async def test_each_response_with_an_output_has_the_header_of_generated_outputs(
    path: str, body: dict[str, Any], http: httpx2.AsyncClient
) -> None:
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["generation-ai-generated"] == "true"
    refused = await http.post(path, json={**body, "prompt": "", "messages": []})
    assert refused.status_code == 400
    assert "generation-ai-generated" not in refused.headers


async def test_an_asynchronous_request_returns_a_job(
    http: httpx2.AsyncClient, behind: GenerationClient
) -> None:
    answer = await http.post(
        "/infer", json={"prompt": "a red circle"}, headers={"Prefer": "respond-async, wait=5"}
    )
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["preference-applied"] == "respond-async"
    assert answer.headers["location"] == job["status_url"] == f"/v1/jobs/{job['id']}"
    assert job["state"] in {"queued", "running"}
    result = await behind.result(Task.TEXT_TO_IMAGE, job["id"], within=WITHIN)
    assert isinstance(result, SucceededEvent)
    later = await http.get(answer.headers["location"])
    assert later.json()["state"] == "succeeded"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "widht": 64}, "widht"),
        ({"prompt": "a", "width": "64"}, "width"),
        ({"prompt": "a", "width": 65}, "width"),
        ({"prompt": "a", "images": []}, "images"),
        ({"prompt": "a", "images": [5]}, "images.0"),
        ({"prompt": "a", "images": ["?"]}, "images.0.base64"),
        ({"prompt": "a", "images": ["AAAA"]}, "images"),
        ({"prompt": "a", "model_type": "image2text"}, "images"),
        ({"prompt": "a", "model_type": "text2speech"}, "model_type"),
        ({"prompt": "a", "images": [ENCODED], "stream": True}, "stream"),
        ({"prompt": "a", "preview": True}, "preview"),
        ({"prompt": "a", "reply_to": "x"}, "reply_to"),
    ],
)
async def test_an_error_names_the_invalid_parameter(
    http: httpx2.AsyncClient, body: dict[str, Any], param: str
) -> None:
    answer = await http.post("/infer", json=body)
    assert answer.status_code == 400
    assert answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("status", "code", "request_"),
    [
        (404, "not_found", {"method": "GET", "url": "/nowhere"}),
        (405, "method_not_allowed", {"method": "GET", "url": "/infer"}),
        (413, "request_too_large", {"method": "POST", "url": "/infer", "content": b" " * 2**26}),
        (
            415,
            "unsupported_media_type",
            {"method": "POST", "url": "/infer", "content": b"a=1"},
        ),
        (
            415,
            "unsupported_media_type",
            {"method": "POST", "url": "/v1/images/edits", "content": b"a=1"},
        ),
        (
            400,
            "invalid_request",
            {
                "method": "POST",
                "url": "/infer",
                "content": b"{" * 10_000,
                "headers": {"content-type": "application/json"},
            },
        ),
        (
            400,
            "invalid_request",
            {
                "method": "POST",
                "url": "/infer",
                "content": b'{"a":' * 100_000,
                "headers": {"content-type": "application/json"},
            },
        ),
        (
            400,
            "invalid_request",
            {
                "method": "POST",
                "url": "/v1/images/edits",
                "content": b"no form",
                "headers": {"content-type": "multipart/form-data; boundary=x"},
            },
        ),
    ],
)
async def test_every_error_has_the_standard_body(
    http: httpx2.AsyncClient, status: int, code: str, request_: dict[str, Any]
) -> None:
    answer = await http.request(**request_)
    assert answer.status_code == status, answer.text
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"].keys() == {"message", "type", "code", "param"}
    assert answer.json()["error"]["code"] == code


async def test_a_wrong_method_lists_the_allowed_methods(http: httpx2.AsyncClient) -> None:
    answer = await http.put("/v1/jobs/open0000-t1")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "DELETE, GET"


async def test_a_request_above_the_message_limit_is_too_large(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/infer", json={"prompt": "a", "images": ["A" * 2_000_000]})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
