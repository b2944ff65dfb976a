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
        self.reads = 0
        self.limits = Limits(self._unfinished, now=lambda: self.time)
        self._count = 0

    async def _unfinished(self, tenant: Tenant) -> Collection[str]:
        self.reads += 1
        await asyncio.sleep(0)
        return {id_ for id_ in self.queue if tenant.owns(id_)}

    def request(self, tenant: Tenant = ACME, **fields: Any) -> TextToImageRequest:
        self._count += 1
        return TextToImageRequest(
            request_id=tenant.new_id(self._count), prompt="a red circle", **fields
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


async def refusal(scene: Scene, sender: Caller, request: Request) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await scene.limits.admit(sender, request)
    return caught.value


async def test_without_bounds_all_requests_are_admitted_without_a_queue_read(scene: Scene) -> None:
    for _ in range(100):
        assert await scene.admitted(caller())
    assert scene.reads == 0


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
async def test_a_refusal_names_the_parameter_above_its_bound(
    scene: Scene, bounds: dict[str, int], fields: dict[str, Any], param: str
) -> None:
    sender = Caller(ACME, "key", Bounds(**bounds))
    error = await refusal(scene, sender, scene.request(**fields))
    assert (error.status, error.code, error.param) == (400, "bound_exceeded", param)
    assert error.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "fields",
    [
        {},  # the operator chooses the model's defaults
        {"width": 512, "height": 512, "num_inference_steps": 10, "num_images": 2},
        {"width": 1024, "height": 256},
        {"then": [{"task": "image_to_text", "prompt": "what is it?"}]},
    ],
)
async def test_a_request_within_its_bounds_is_admitted(
    scene: Scene, fields: dict[str, Any]
) -> None:
    sender = caller(images=2, steps=10, pixels=512 * 512)
    assert await scene.admitted(sender, scene.request(**fields))


async def test_image_bounds_do_not_apply_to_questions(scene: Scene) -> None:
    image = ArtifactReference(bucket="generation", key=f"text_to_image/{ACME.new_id(1)}/0.png")
    request = ImageToTextRequest(request_id="one", prompt="what is it?", images=(image,))
    assert await scene.admitted(caller(images=1, steps=1, pixels=1), request)


async def test_the_bound_per_minute_is_a_sliding_window(scene: Scene) -> None:
    sender = caller(per_minute=3)
    for _ in range(3):
        assert await scene.admitted(sender)
        scene.time += 10
    error = await refusal(scene, sender, scene.request())
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.retry_after == 30  # the first of the three leaves the window then
    scene.time += 29
    assert not await scene.admitted(sender)
    scene.time += 1
    assert await scene.admitted(sender)
    assert not await scene.admitted(sender)
    scene.time += MINUTE
    for _ in range(3):
        assert await scene.admitted(sender)


async def test_each_key_of_a_tenant_has_a_separate_bound_per_minute(scene: Scene) -> None:
    assert await scene.admitted(caller(key_id="one", per_minute=1))
    assert not await scene.admitted(caller(key_id="one", per_minute=1))
    assert await scene.admitted(caller(key_id="two", per_minute=1))


async def test_a_refused_request_does_not_count(scene: Scene) -> None:
    sender = caller(per_minute=1, steps=1)
    await refusal(scene, sender, scene.request(num_inference_steps=2))
    assert await scene.admitted(sender)


async def test_the_bound_of_waiting_requests_counts_the_tenant(scene: Scene) -> None:
    scene.queue = {ACME.new_id(n) for n in range(2)} | {OTHER.new_id(n) for n in range(9)}
    assert await scene.admitted(caller(waiting=3))
    error = await refusal(scene, caller(key_id="another", waiting=3), scene.request())
    assert (error.status, error.code) == (429, "too_many_waiting")
    assert error.headers["x-should-retry"] == "true"
    assert error.retry_after is not None


async def test_concurrent_requests_do_not_exceed_the_bound(scene: Scene) -> None:
    """The cached queue read is up to a second old and misses the last admitted requests."""
    sender = caller(waiting=5)
    admitted = await asyncio.gather(*(scene.admitted(sender) for _ in range(50)))
    assert sum(admitted) == 5


async def test_sequential_requests_are_not_refused(scene: Scene) -> None:
    """The cached queue read still contains requests that have just ended."""
    sender = caller(waiting=1)
    for _ in range(20):
        request = scene.request()
        assert await scene.admitted(sender, request)
        assert request.request_id is not None
        scene.queue.add(request.request_id)
        scene.limits.ended(request.request_id)
        scene.time += 0.1


async def test_an_old_admitted_request_counts_only_if_the_queue_contains_it(scene: Scene) -> None:
    """The gateway may have missed the terminal event of the request."""
    sender = caller(waiting=1)
    assert await scene.admitted(sender)
    assert not await scene.admitted(sender)
    scene.time += VIEW_AGE + 1
    assert await scene.admitted(sender)


async def test_requests_of_other_tenants_do_not_count(scene: Scene) -> None:
    assert await scene.admitted(caller(waiting=1))
    other = replace(caller(waiting=1), tenant=OTHER)
    assert await scene.admitted(other)


async def test_the_records_of_requests_are_bounded(scene: Scene) -> None:
    for _ in range(1_000):
        request = scene.request()
        await scene.admitted(caller(), request)
        scene.limits.ended(str(request.request_id))
        scene.time += 1
    assert len(scene.limits._admitted) == 0
    assert len(scene.limits._ended) <= VIEW_AGE + 2


async def test_a_request_cannot_use_an_object_of_another_tenant(scene: Scene) -> None:
    image = ArtifactReference(bucket="outputs", key=f"text_to_image/{OTHER.new_id(1)}/0-a.png")
    request = ImageToTextRequest(request_id=ACME.new_id(1), prompt="what is it?", images=(image,))
    assert (await refusal(scene, caller(), request)).code == "input_not_allowed"
    # A gateway without keys has one tenant.
    await scene.limits.admit(Caller(ACME), request)
