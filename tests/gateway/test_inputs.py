"""Object store inputs that a tenant may use."""

from typing import Any

import pytest
from pydantic_core import to_json

from consumer.gateway.errors import ApiError
from consumer.gateway.inputs import require_own_inputs
from consumer.gateway.tenants import Tenant
from generation_contracts import Task, decode_request

ALICE = Tenant("alice", "alice000", b"")
BOB = Tenant("bob", "bob00000", b"")
OWN = f"generation/out/text_to_image/{BOB.id_of('a')}/0-aa.png"
OTHER = f"generation/out/text_to_image/{ALICE.id_of('a')}/0-aa.png"


def reference(address: str) -> dict[str, str]:
    bucket, _, key = address.partition("/")
    return {"bucket": bucket, "key": key}


def check(images: Any, *, then: Any = (), for_all: tuple[str, ...] = ()) -> None:
    body = {"prompt": "what is it?", "images": images, "then": then}
    request = decode_request(Task.IMAGE_TO_TEXT, to_json(body))
    require_own_inputs(BOB, request, for_all)


@pytest.mark.parametrize(
    ("images", "for_all"),
    [
        ([reference(OWN)], ()),
        ([f"s3://{OWN}"], ()),
        ([f"s3://{OWN.replace('text_to_image', 'fast')}"], ()),  # of another queue
        (["https://example.com/a.png"], ()),
        (["data:image/png;base64,AAAA", {"base64": "AAAA"}], ()),
        ([f"s3://{OTHER}"], ("generation/out",)),
        (["s3://shared/a.png"], ("shared/",)),
        (["s3://shared/Zürich/a b&c?d#e.png"], ("shared/Zürich",)),
    ],
)
def test_outputs_of_the_tenant_and_public_objects_are_allowed(
    images: Any, for_all: tuple[str, ...]
) -> None:
    check(images, for_all=for_all)


@pytest.mark.parametrize(
    "address",
    [
        OTHER,
        OTHER.replace("text_to_image", "fast"),
        OWN.replace("text_to_image", "uploads"),
        "generation/inputs/a.png",
        "shared-of-others/a.png",
    ],
)
def test_objects_of_other_tenants_are_refused(address: str) -> None:
    for images in ([reference(address)], [f"s3://{OWN}", f"s3://{address}"]):
        with pytest.raises(ApiError) as caught:
            check(images, for_all=("shared",))
        assert (caught.value.status, caught.value.code) == (403, "input_not_allowed")
        assert caught.value.param == f"images.{len(images) - 1}"


def test_inputs_of_custom_requests_are_checked() -> None:
    request = decode_request(Task.CUSTOM, to_json({"images": [f"s3://{OTHER}"]}))
    with pytest.raises(ApiError) as caught:
        require_own_inputs(BOB, request, ())
    assert caught.value.param == "images.0"


def test_inputs_of_chain_steps_are_checked() -> None:
    step = {"task": "image_to_text", "prompt": "and this?"}
    check([f"s3://{OWN}"], then=[step])
    with pytest.raises(ApiError) as caught:
        check([f"s3://{OWN}"], then=[{**step, "images": [f"s3://{OTHER}"]}])
    assert caught.value.param == "then.0.images.0"
