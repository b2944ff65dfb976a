"""The bounds of a key."""

import asyncio
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from consumer.gateway.bounds import MINUTE, VIEW_AGE, Limits
from consumer.gateway.errors import ApiError
from consumer.gateway.tenants import Bounds, Caller, Tenant
from generation_contracts import ArtifactReference, ImageToTextRequest, Request, TextToImageRequest

ACME = Tenant("acme", "acmeacme", b"secret")
OTHER = Tenant("other", "otherone", b"secret")


class Scene:
    """Limits with a clock and a queue that the test sets."""

    def __init__(self) -> None:
        self.time = 1_000.0
        self.queue: set[str] = set()
        self.asked = 0
        self.limits = Limits(self._unfinished, now=lambda: self.time)
        self._made = 0

    async def _unfinished(self, tenant: Tenant) -> Collection[str]:
        self.asked += 1
        await asyncio.sleep(0)
        return {id_ for id_ in self.queue if tenant.owns(id_)}

    def request(self, tenant: Tenant = ACME, **fields: Any) -> TextToImageRequest:
        self._made += 1
        return TextToImageRequest(
            request_id=tenant.new_id(self._made), prompt="a red circle", **fields
        )

    async def admitted(self, caller: Caller, request: Request | None = None) -> bool:
        try:
            await self.limits.admit(caller, request or self.request(caller.tenant))
        except ApiError:
            return False
        return True


@pytest.fixture
def scene() -> Scene:
    return Scene()


def caller(key_id: str = "key", **bounds: int) -> Caller:
    return Caller(ACME, key_id, Bounds(**bounds))


async def refusal(scene: Scene, who: Caller, request: Request) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await scene.limits.admit(who, request)
    return caught.value


async def test_without_bounds_everything_is_admitted_and_no_queue_is_read(scene: Scene) -> None:
    for _ in range(100):
        assert await scene.admitted(caller())
    assert scene.asked == 0


@pytest.mark.parametrize(
    ("bounds", "fields", "param"),
    [
        ({"images": 2}, {"num_images": 3}, "num_images"),
        ({"steps": 10}, {"num_inference_steps": 11}, "num_inference_steps"),
        ({"pixels": 512 * 512}, {"width": 1024, "height": 512}, "width"),
        ({"pixels": 512 * 512}, {"width": 16}, "height"),
        ({"pixels": 512 * 512}, {"height": 16}, "width"),
        (
            {"steps": 10},
            {"then": [{"task": "text_to_image", "prompt": "x", "num_inference_steps": 11}]},
            "then.0.num_inference_steps",
        ),
    ],
)
async def test_a_request_that_is_too_large_is_refused_by_the_name_of_its_parameter(
    scene: Scene, bounds: dict[str, int], fields: dict[str, Any], param: str
) -> None:
    who = Caller(ACME, "key", Bounds(**bounds))
    error = await refusal(scene, who, scene.request(**fields))
    assert (error.status, error.code, error.param) == (400, "bound_exceeded", param)
    assert error.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "fields",
    [
        {},  # the model's own defaults are the operator's choice
        {"width": 512, "height": 512, "num_inference_steps": 10, "num_images": 2},
        {"width": 1024, "height": 256},
        {"then": [{"task": "image_to_text", "prompt": "what is it?"}]},
    ],
)
async def test_a_request_within_its_bounds_is_admitted(
    scene: Scene, fields: dict[str, Any]
) -> None:
    who = caller(images=2, steps=10, pixels=512 * 512)
    assert await scene.admitted(who, scene.request(**fields))


async def test_questions_about_images_have_no_size(scene: Scene) -> None:
    place = ArtifactReference(bucket="generation", key=f"text_to_image/{ACME.new_id(1)}/0.png")
    request = ImageToTextRequest(request_id="one", prompt="what is it?", images=(place,))
    assert await scene.admitted(caller(images=1, steps=1, pixels=1), request)


async def test_requests_a_minute_are_a_sliding_window(scene: Scene) -> None:
    who = caller(per_minute=3)
    for _ in range(3):
        assert await scene.admitted(who)
        scene.time += 10
    error = await refusal(scene, who, scene.request())
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.retry_after == 30  # the first of the three leaves the window then
    scene.time += 29
    assert not await scene.admitted(who)
    scene.time += 1
    assert await scene.admitted(who)
    assert not await scene.admitted(who)
    scene.time += MINUTE
    for _ in range(3):
        assert await scene.admitted(who)


async def test_keys_of_one_tenant_have_their_own_minutes(scene: Scene) -> None:
    assert await scene.admitted(caller(key_id="one", per_minute=1))
    assert not await scene.admitted(caller(key_id="one", per_minute=1))
    assert await scene.admitted(caller(key_id="two", per_minute=1))


async def test_a_refused_request_does_not_count(scene: Scene) -> None:
    who = caller(per_minute=1, steps=1)
    await refusal(scene, who, scene.request(num_inference_steps=2))
    assert await scene.admitted(who)


async def test_requests_that_wait_are_the_tenants(scene: Scene) -> None:
    scene.queue = {ACME.new_id(n) for n in range(2)} | {OTHER.new_id(n) for n in range(9)}
    assert await scene.admitted(caller(waiting=3))
    error = await refusal(scene, caller(key_id="another", waiting=3), scene.request())
    assert (error.status, error.code) == (429, "too_many_waiting")
    assert error.headers["x-should-retry"] == "true"
    assert error.retry_after is not None


async def test_many_requests_at_once_do_not_pass_the_bound(scene: Scene) -> None:
    """The queue's numbers are a second old: what was just admitted is not in them yet."""
    who = caller(waiting=5)
    admitted = await asyncio.gather(*(scene.admitted(who) for _ in range(50)))
    assert sum(admitted) == 5


async def test_one_request_after_another_is_not_refused(scene: Scene) -> None:
    """The queue's numbers still have what has ended a moment ago."""
    who = caller(waiting=1)
    for _ in range(20):
        request = scene.request()
        assert await scene.admitted(who, request)
        assert request.request_id is not None
        scene.queue.add(request.request_id)
        scene.limits.ended(request.request_id)
        scene.time += 0.1


async def test_an_admitted_request_counts_by_the_queue_alone_after_a_while(scene: Scene) -> None:
    """Its terminal event may have been missed."""
    who = caller(waiting=1)
    assert await scene.admitted(who)
    assert not await scene.admitted(who)
    scene.time += VIEW_AGE + 1
    assert await scene.admitted(who)


async def test_other_tenants_do_not_count(scene: Scene) -> None:
    assert await scene.admitted(caller(waiting=1))
    other = replace(caller(waiting=1), tenant=OTHER)
    assert await scene.admitted(other)


async def test_what_is_remembered_is_bounded(scene: Scene) -> None:
    for _ in range(1_000):
        request = scene.request()
        await scene.admitted(caller(), request)
        scene.limits.ended(str(request.request_id))
        scene.time += 1
    assert len(scene.limits._admitted) == 0
    assert len(scene.limits._ended) <= VIEW_AGE + 2


async def test_a_key_names_no_object_of_another_tenant(scene: Scene) -> None:
    place = ArtifactReference(bucket="outputs", key=f"text_to_image/{OTHER.new_id(1)}/0-a.png")
    asked = ImageToTextRequest(request_id=ACME.new_id(1), prompt="what is it?", images=(place,))
    assert (await refusal(scene, caller(), asked)).code == "input_not_allowed"
    # Without keys there is one tenant.
    await scene.limits.admit(Caller(ACME), asked)
