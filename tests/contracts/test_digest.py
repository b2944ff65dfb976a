"""The request digest is equal for copies and different for other content."""

import json
from typing import Any

import pytest

from generation_contracts import Task, decode_request, request_digest
from generation_contracts.examples import REQUESTS
from tests.contracts.senders import BASES, IMAGE_TO_TEXT, TEXT_TO_IMAGE, decode

STEP = {"task": "image_to_text", "prompt": "Describe it."}
FIELDS: list[tuple[Task, dict[str, Any]]] = [
    (TEXT_TO_IMAGE, {"prompt": "another"}),
    (TEXT_TO_IMAGE, {"negative_prompt": ""}),
    (TEXT_TO_IMAGE, {"width": 512}),
    (TEXT_TO_IMAGE, {"height": 512}),
    (TEXT_TO_IMAGE, {"num_inference_steps": 5}),
    (TEXT_TO_IMAGE, {"guidance_scale": 0}),
    (TEXT_TO_IMAGE, {"num_images": 2}),
    (TEXT_TO_IMAGE, {"seed": 0}),
    (TEXT_TO_IMAGE, {"output_format": "webp"}),
    (TEXT_TO_IMAGE, {"then": [STEP]}),
    (IMAGE_TO_TEXT, {"prompt": "another"}),
    (IMAGE_TO_TEXT, {"images": ["s3://generation/inputs/1.png"]}),
    (IMAGE_TO_TEXT, {"images": ["s3://generation/inputs/0.png"] * 2}),
    (IMAGE_TO_TEXT, {"system": ""}),
    (IMAGE_TO_TEXT, {"max_new_tokens": 5}),
    (IMAGE_TO_TEXT, {"temperature": 0}),
    (IMAGE_TO_TEXT, {"top_p": 1}),
    (IMAGE_TO_TEXT, {"top_k": 1}),
    (IMAGE_TO_TEXT, {"repetition_penalty": 1}),
    (IMAGE_TO_TEXT, {"seed": 0}),
]


def digest(task: Task, fields: dict[str, Any]) -> str:
    return request_digest(decode(task, fields))


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize(
    "addressing",
    [
        {"request_id": "a"},
        {"reply_to": "_INBOX.a"},
        {"request_id": None},
        {"deadline": "2030-01-01T00:00:00Z"},
        {"metadata": {"try": "2"}},
        {"chain": {"id": "first", "step": 2}},
    ],
)
def test_addressing_is_not_part_of_the_digest(task: Task, addressing: dict[str, Any]) -> None:
    assert digest(task, addressing) == digest(task, {})


@pytest.mark.parametrize(("task", "fields"), FIELDS, ids=str)
def test_every_content_field_is_part_of_the_digest(task: Task, fields: dict[str, Any]) -> None:
    assert digest(task, fields) != digest(task, {})


@pytest.mark.parametrize(
    ("task", "defaults"),
    [
        (TEXT_TO_IMAGE, {"num_images": 1, "output_format": "png", "preview": False, "width": None}),
        (IMAGE_TO_TEXT, {"stream": False, "system": None, "metadata": {}, "then": []}),
    ],
)
def test_explicit_default_equals_absent(task: Task, defaults: dict[str, Any]) -> None:
    assert digest(task, defaults) == digest(task, {})


def test_explicit_default_of_a_step_equals_absent() -> None:
    explicit = {**STEP, "images": "$outputs", "each": False, "stream": False, "system": None}
    assert digest(TEXT_TO_IMAGE, {"then": [explicit]}) == digest(TEXT_TO_IMAGE, {"then": [STEP]})


def test_order_of_keys_does_not_matter() -> None:
    fields = {"prompt": "x", "width": 64, "metadata": {"a": "1", "b": "2"}, "then": [STEP]}
    turned = dict(reversed(fields.items())) | {"metadata": {"b": "2", "a": "1"}}
    assert digest(TEXT_TO_IMAGE, fields) == digest(TEXT_TO_IMAGE, turned)


def test_order_of_images_matters() -> None:
    images = ["s3://generation/inputs/0.png", "s3://generation/inputs/1.png"]
    forth, back = ({"images": order} for order in (images, images[::-1]))
    assert digest(IMAGE_TO_TEXT, forth) != digest(IMAGE_TO_TEXT, back)


def test_equal_values_in_other_notation_have_equal_digests() -> None:
    """Escapes, white space, whole floats, the alias, and one instant in two time zones."""
    one = {"prompt": "\u00e5", "guidance_scale": 7, "steps": 5, "deadline": "2030-01-01T00:00:00Z"}
    other = {
        "prompt": "\u00e5",
        "guidance_scale": 7.0,
        "num_inference_steps": 5,
        "deadline": "2030-01-01T02:00:00+02:00",
    }
    bodies = json.dumps(one).encode(), json.dumps(other, indent=4, ensure_ascii=False).encode()
    first, second = (decode_request(TEXT_TO_IMAGE, body) for body in bodies)
    assert first == second
    assert request_digest(first) == request_digest(second)


def test_digest_is_a_stable_lower_case_sha256() -> None:
    """With another algorithm every redelivery would conflict with its stored event."""
    minimal = request_digest(REQUESTS["text_to_image_minimal"])
    assert minimal == "sha256:d04643d364889a39364b4ba5049043fc36ed5f89d966ad8d60d7928c9643acf8"
    assert minimal == digest(TEXT_TO_IMAGE, {"prompt": "a red circle on a blue background"})
    assert set(BASES) == set(Task)
