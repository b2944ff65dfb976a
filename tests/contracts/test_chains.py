"""Routing slips: validation, and the next requests of a chain."""

import json
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from generation_contracts import (
    CustomRequest,
    ImageToTextRequest,
    InvalidRequest,
    Request,
    SucceededEvent,
    Task,
    TextToImageRequest,
    check_routing_slip,
    decode_request,
    encode,
    next_requests,
    request_digest,
)
from generation_contracts.chains import MAX_BRANCHES, place_of
from generation_contracts.examples import EVENTS
from generation_contracts.fields import MAX_PROMPT
from generation_contracts.subjects import is_request_id

LONG = "0-" * 11 + "10"
SPLIT = {"id": "a", "step": 2, "branch": LONG}
DRAW = {"task": "text_to_image", "prompt": "as a woodcut: $text", "steps": 4}
DESCRIBE = {"task": "image_to_text", "prompt": "Describe it.", "max_new_tokens": 9}


def drawing(*then: dict[str, Any], **fields: Any) -> Request:
    return read(Task.TEXT_TO_IMAGE, {"prompt": "a", "then": then, **fields})


def describing(*then: dict[str, Any], **fields: Any) -> Request:
    images = ["s3://bucket/key"]
    return read(Task.IMAGE_TO_TEXT, {"prompt": "a", "images": images, "then": then, **fields})


def read(task: Task, fields: dict[str, Any]) -> Request:
    return decode_request(task, json.dumps(fields).encode())


def images_event(number: int) -> SucceededEvent:
    event = EVENTS["succeeded_image"]
    assert isinstance(event, SucceededEvent)
    (first,) = event.outputs
    keys = [f"text_to_image/a/{n}.png" for n in range(number)]
    return event.model_copy(
        update={"outputs": tuple(first.model_copy(update={"key": key}) for key in keys)}
    )


def text_event(content: str) -> SucceededEvent:
    event = EVENTS["succeeded_text"]
    assert isinstance(event, SucceededEvent)
    (first,) = event.outputs
    return event.model_copy(update={"outputs": (first.model_copy(update={"text": content}),)})


def test_text_step_gets_all_images_of_the_previous_step() -> None:
    request = drawing(DESCRIBE, metadata={"order": "7"}, deadline="2030-01-02T03:04:05Z")
    ((task, following),) = next_requests(request, "first", images_event(3))
    assert task is Task.IMAGE_TO_TEXT
    assert isinstance(following, ImageToTextRequest)
    assert [image.key for image in following.images] == [  # type: ignore[union-attr] # references
        f"text_to_image/a/{n}.png" for n in range(3)
    ]
    assert (following.prompt, following.max_new_tokens) == ("Describe it.", 9)
    assert (following.request_id, following.then) == ("first-2", ())
    assert (following.metadata, following.deadline) == (request.metadata, request.deadline)


def test_image_step_gets_the_text_in_its_prompt() -> None:
    ((task, following),) = next_requests(describing(DRAW), "first", text_event("a $text cat"))
    assert task is Task.TEXT_TO_IMAGE
    assert isinstance(following, TextToImageRequest)
    assert following.prompt == "as a woodcut: a $text cat"
    assert following.num_inference_steps == 4


def test_fan_out_makes_one_request_per_image() -> None:
    request = drawing({**DESCRIBE, "each": True}, {**DRAW, "num_images": 2}, DESCRIBE, num_images=3)
    branches = next_requests(request, "first", images_event(3))
    assert [one.request_id for _, one in branches] == ["first-2-0", "first-2-1", "first-2-2"]
    assert [len(one.images) for _, one in branches if isinstance(one, ImageToTextRequest)] == [
        1
    ] * 3
    ((_, second),) = next_requests(branches[1][1], "first-2-1", text_event("a cat"))
    assert second.request_id == "first-3-1"
    ((_, third),) = next_requests(second, "first-3-1", images_event(2))
    assert third.request_id == "first-4-1"
    assert third.chain is not None
    assert third.chain.id == "first"


def test_step_may_set_its_images_and_prompt() -> None:
    step = {**DESCRIBE, "images": ["s3://bucket/other"], "each": True}
    request = describing(step, {"task": "text_to_image", "prompt": "a house"})
    ((_, second),) = next_requests(request, "first", text_event("x"))
    assert isinstance(second, ImageToTextRequest)
    assert second.images == ("s3://bucket/other",)
    ((_, third),) = next_requests(second, "first-2", text_event("y"))
    assert third.prompt == "a house"


def test_last_step_has_no_next_request() -> None:
    assert next_requests(drawing(), "first", images_event(1)) == ()


def test_next_request_is_deterministic_and_survives_encoding() -> None:
    request = drawing({**DESCRIBE, "each": True}, DRAW, num_images=2)
    once, again = (next_requests(request, "first", images_event(2)) for _ in range(2))
    assert once == again
    for task, following in once:
        assert decode_request(task, encode(following)) == following
        check_routing_slip(following)


def test_ids_of_later_steps_stay_valid() -> None:
    request = drawing({**DESCRIBE, "each": True}, num_images=8)
    ids = {one.request_id for _, one in next_requests(request, "x" * 64, images_event(8))}
    assert len(ids) == 8
    assert all(is_request_id(str(one)) for one in ids)
    others = {one.request_id for _, one in next_requests(request, "x" * 63 + "y", images_event(8))}
    assert not ids & others


def test_chain_position_is_not_part_of_the_digest() -> None:
    ((_, following),) = next_requests(drawing(DESCRIBE), "first", images_event(1))
    assert request_digest(following) == request_digest(following.model_copy(update={"chain": None}))


def test_chain_positions() -> None:
    request = drawing(DESCRIBE, DRAW)
    first = place_of(request, "first")
    ((_, following),) = next_requests(request, "first", images_event(1))
    second = place_of(following, "first-2")
    assert first is not None
    assert second is not None
    assert (first.id, first.step, first.of) == ("first", 1, 3)
    assert (second.id, second.step, second.of) == ("first", 2, 3)
    assert place_of(drawing(), "alone") is None


def test_custom_steps_get_images_and_text() -> None:
    step = {"task": "custom", "model": "tone", "parameters": {"text": "say $text", "speed": 2}}
    ((task, following),) = next_requests(describing(step), "a", text_event("hello"))
    assert isinstance(following, CustomRequest)
    assert (task, following.model, following.images) == (Task.CUSTOM, "tone", None)
    assert following.parameters == {"text": "say hello", "speed": 2}
    with pytest.raises(InvalidRequest, match="empty text"):
        next_requests(describing(step), "a", text_event(" "))
    step = {"task": "custom", "images": "$outputs"}
    ((_, following),) = next_requests(drawing(step), "a", images_event(2))
    assert isinstance(following, CustomRequest)
    assert len(following.images or ()) == 2


def test_the_outputs_of_a_custom_step_are_known_when_it_has_ended() -> None:
    request = read(Task.CUSTOM, {"then": [{**DESCRIBE, "images": "$outputs"}]})
    check_routing_slip(request)
    ((task, _),) = next_requests(request, "a", images_event(1))
    assert task == Task.IMAGE_TO_TEXT
    with pytest.raises(InvalidRequest, match="returned no image"):
        next_requests(request, "a", text_event("a text"))


def test_long_text_is_truncated_to_the_prompt_limit() -> None:
    ((_, following),) = next_requests(describing(DRAW), "first", text_event("x" * 2 * MAX_PROMPT))
    assert len(following.prompt) == MAX_PROMPT


def test_empty_text_makes_no_prompt() -> None:
    only = {"task": "text_to_image", "prompt": "$text"}
    with pytest.raises(InvalidRequest, match="empty text"):
        next_requests(describing(only), "first", text_event(" \n"))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (drawing(DRAW), "then.0.prompt"),
        (describing(DESCRIBE), "then.0.images"),
        (read(Task.CUSTOM, {"then": [{**DESCRIBE, "each": True}]}), "then.0.each"),
        (drawing({"task": "custom", "parameters": {"a": "$text"}}), "then.0.parameters"),
        (describing({"task": "custom", "images": "$outputs"}), "then.0.images"),
        (drawing(DESCRIBE, DESCRIBE), "then.1.images"),
        (describing(DRAW, DESCRIBE, DRAW, DESCRIBE, DESCRIBE), "then.4.images"),
        (
            drawing(
                {**DESCRIBE, "each": True},
                {**DRAW, "num_images": 8},
                {**DESCRIBE, "each": True},
                {**DRAW, "num_images": 8},
                {**DESCRIBE, "each": True},
                num_images=8,
            ),
            "then.4.each",
        ),
        # A sender may say that it stands in a chain already.
        (drawing(DESCRIBE, chain={"id": "a", "step": 9}), "then"),
        (
            drawing({**DESCRIBE, "each": True}, num_images=2, chain=SPLIT),
            "then.0.each",
        ),
    ],
)
def test_invalid_routing_slip_is_refused(request_: Request, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_routing_slip(request_)
    assert refused.value.problems[0]["field"] == field


def test_routing_slip_with_the_largest_fan_out_is_accepted() -> None:
    each = {**DESCRIBE, "each": True}
    check_routing_slip(drawing(each, {**DRAW, "num_images": 8}, each, num_images=MAX_BRANCHES // 8))


def test_routing_slip_with_the_largest_length_is_accepted() -> None:
    check_routing_slip(drawing(DESCRIBE, chain={"id": "a", "step": 8}))
    check_routing_slip(drawing({**DESCRIBE, "each": True}, num_images=1, chain=SPLIT))


@settings(deadline=None)
@given(
    number=st.integers(1, 8),
    steps=st.lists(
        st.sampled_from([DESCRIBE, {**DESCRIBE, "each": True}, DRAW, {**DRAW, "num_images": 2}]),
        max_size=5,
    ),
    chain=st.none()
    | st.fixed_dictionaries(
        {"id": st.just("a"), "step": st.integers(1, 9), "branch": st.sampled_from(["", "0", LONG])}
    ),
)
def test_accepted_routing_slip_can_be_completed(
    number: int, steps: list[dict[str, Any]], chain: dict[str, Any] | None
) -> None:
    request_ = drawing(*steps, num_images=number, chain=chain)
    try:
        check_routing_slip(request_)
    except InvalidRequest:
        reject()
    for step in range(len(steps) + 1):
        many = request_.num_images if isinstance(request_, TextToImageRequest) else 0
        following = next_requests(
            request_, "first", images_event(many) if many else text_event("t")
        )
        assert bool(following) == (step < len(steps))
        if following:
            *_, (_, request_) = following
            check_routing_slip(request_)
