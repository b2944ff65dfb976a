"""Repeated requests, two requests with one id, and one delivery in two workers."""

import asyncio

import pytest

from consumer.devstack import Daemon
from tests.support.holding import HELD
from tests.support.observations import ReplyInbox, published_digests, stored_digests
from tests.support.scene import Event, Scene

# -- in sequence ----------------------------------------------------------------------------------

# With one request per worker an expired lease moves the request to the other worker.
ONE = {"CONSUMER_JOBS_IN_FLIGHT": "1"}


async def test_second_copy_gets_the_stored_result(scene: Scene) -> None:
    answers = await ReplyInbox.listen(scene)
    request = {"request_id": "twice", "prompt": "a", "reply_to": answers.subject}
    assert await scene.publish(request) != await scene.publish(request)
    await scene.start()
    event = await scene.event("twice")
    assert [await answers.next(), await answers.next()] == [event] * 2
    assert await answers.has_no_more()
    assert scene.runs() == ["twice"]
    assert await scene.events("twice") == [event]
    assert await stored_digests(scene) == published_digests(event)


async def test_second_copy_with_the_same_message_id_is_not_queued(scene: Scene) -> None:
    answers = await ReplyInbox.listen(scene)
    request = {"request_id": "twice", "prompt": "a", "reply_to": answers.subject}
    sequence = await scene.publish(request, {"Nats-Msg-Id": "sent-1"})
    await scene.start()
    event = await scene.event("twice")
    await scene.until_empty()
    assert await scene.publish(request, {"Nats-Msg-Id": "sent-1"}) == sequence
    assert await answers.next() == event
    assert await answers.has_no_more()
    assert scene.runs() == ["twice"]


async def test_only_the_sender_of_the_conflicting_content_gets_the_conflict(scene: Scene) -> None:
    first_answers = await ReplyInbox.listen(scene)
    other_answers = await ReplyInbox.listen(scene)
    await scene.submit(request_id="mine", prompt="a", reply_to=first_answers.subject)
    await scene.submit(request_id="mine", prompt="b", reply_to=other_answers.subject)
    await scene.start()
    conflict = await other_answers.next()
    assert conflict["failure"]["code"] == "request_id_conflict"
    event = await first_answers.next()
    assert event["type"] == "generation.v1.succeeded"
    assert await first_answers.has_no_more()
    assert await other_answers.has_no_more()
    assert await scene.events("mine") == [event]
    assert scene.runs() == ["mine"]
    assert len(await scene.dead_letters()) == 0
    assert await stored_digests(scene) == published_digests(event)


async def test_stored_result_of_another_worker_is_the_reply(scene: Scene) -> None:
    first = await scene.start()
    await scene.submit(request_id="known")
    event = await scene.event("known")
    await scene.until_empty()
    await asyncio.to_thread(first.stop)
    second = await scene.start()
    answers = await ReplyInbox.listen(scene)
    await scene.submit(request_id="known", reply_to=answers.subject)
    assert await answers.next() == event
    assert await answers.has_no_more()
    await scene.until_logged(second, "already_done")
    assert await scene.events("known") == [event]
    assert scene.runs() == ["known"]
    assert await stored_digests(scene) == published_digests(event)


# -- concurrently ---------------------------------------------------------------------------------


async def _settled(scene: Scene, *workers: Daemon) -> None:
    for worker in workers:
        await scene.until_logged(worker, "job_finished")
    await scene.until_empty()
    stream, durable = scene.subjects.requests_stream(scene.task), str(scene.task)
    info = await scene.sender.jetstream().consumer_info(stream, durable)
    assert (info.num_pending, info.num_ack_pending) == (0, 0)


async def _shared(scene: Scene, causes: tuple[str, str], quicker: str) -> Event:
    """Give one delivery to two workers, and release the workers one after the other."""
    await scene.apply(CONSUMER_MAX_ACK_PENDING="2")
    answers = await ReplyInbox.listen(scene)
    first = await scene.start(causes[0], RELEASE_MARK="first", **ONE)
    await scene.submit(request_id="shared", reply_to=answers.subject)
    await scene.until_noted(HELD)
    second = await scene.start(causes[1], RELEASE_MARK="second", **ONE)
    await scene.until_noted(HELD, 2)
    assert await scene.events("shared") == []

    (scene.folder / quicker).touch()
    event = await scene.event("shared")
    assert event["attempt"] == {"first": 1, "second": 2}[quicker]
    assert await answers.next() == event
    (scene.folder / {"first": "second", "second": "first"}[quicker]).touch()
    assert await answers.next() == event

    await _settled(scene, first, second)
    assert await answers.has_no_more()
    assert await scene.events("shared") == [event]
    assert scene.runs() == ["shared"] * 2
    return event


@pytest.mark.parametrize("quicker", ["first", "second"])
async def test_two_workers_with_one_delivery_store_one_result(scene: Scene, quicker: str) -> None:
    event = await _shared(scene, ("lease_not_renewed", "held_until_released"), quicker)
    # The images of the workers differ. The later image must not replace the image in the event.
    assert await stored_digests(scene) == published_digests(event)


@pytest.mark.parametrize("quicker", ["first", "second"])
async def test_two_workers_with_an_equal_result_store_one_result(
    scene: Scene, quicker: str
) -> None:
    event = await _shared(scene, ("lease_not_renewed_at_result", "held_at_result"), quicker)
    assert await stored_digests(scene) == published_digests(event)  # the two images are equal


async def test_concurrent_requests_with_one_id_and_different_content(scene: Scene) -> None:
    await scene.apply(CONSUMER_MAX_ACK_PENDING="2")
    first_answers = await ReplyInbox.listen(scene)
    other_answers = await ReplyInbox.listen(scene)
    first = await scene.start("held_until_released", RELEASE_MARK="first", **ONE)
    await scene.submit(request_id="mine", prompt="a", reply_to=first_answers.subject)
    await scene.until_noted(HELD)
    other = await scene.start("held_until_released", RELEASE_MARK="other", **ONE)
    await scene.submit(request_id="mine", prompt="b", reply_to=other_answers.subject)
    await scene.until_noted(HELD, 2)

    (scene.folder / "first").touch()
    event = await first_answers.next()
    assert event["type"] == "generation.v1.succeeded"
    (scene.folder / "other").touch()
    conflict = await other_answers.next()
    assert conflict["failure"]["code"] == "request_id_conflict"

    await _settled(scene, first, other)
    assert await scene.events("mine") == [event]
    assert await stored_digests(scene) == published_digests(event)
