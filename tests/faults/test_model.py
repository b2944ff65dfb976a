"""The model fails in every known way. The sender gets an event, and the queue continues.

`test_held_lock.py` has the threads that hang and hold the GIL.
"""

import asyncio
import json
import time

import pytest

from consumer.devstack import Daemon
from tests.support.observations import (
    assert_all_ready,
    assert_queue_empty,
    deliveries,
    published_digests,
    stored_digests,
    succeeded,
)
from tests.support.quick_runner import STARTED
from tests.support.scene import ACK_WAIT, Event, Scene

MODEL_LOST = 70  # the exit code for a model that cannot be loaded, or a device that is lost
STALL = 1.0  # seconds
# The promise is ack_wait and a second; the rest is for a machine whose cores are all at work.
AGAIN_WITHIN = ACK_WAIT + 1 + 5  # seconds
SECRET = "secret words"
FAILED = "generation.v1.failed"


async def assert_next_request_succeeds(scene: Scene, worker: Daemon, failed: Event) -> None:
    """Check that the same process runs the next request, and that the queue is empty."""
    before = len(scene.runs())
    next_id = await scene.submit()
    event = await succeeded(scene, next_id)
    assert (event["worker"], event["attempt"]) == (failed["worker"], 1)
    assert scene.runs()[before:] == [next_id]
    await scene.until_empty()
    await assert_all_ready(scene, worker)


# -- it raises ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "code", "exception"),
    [("raises", "model_error", "ValueError"), ("breaks", "internal", "KeyError")],
)
async def test_model_error_is_retried_three_times_and_dead_lettered(
    scene: Scene, prompt: str, code: str, exception: str
) -> None:
    worker = await scene.start("raises_on_demand")
    request_id = "raises-1"
    body = json.dumps({"prompt": prompt, "request_id": request_id, "metadata": {"a": "b"}}).encode()
    await scene.publish(body)
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"], event["metadata"]) == (FAILED, 3, {"a": "b"})
    assert event["failure"]["code"] == code
    assert event["failure"]["details"] == {"exception": exception}
    assert SECRET not in json.dumps(event)
    assert scene.runs() == [request_id] * 3

    (letter,) = await scene.dead_letters()
    assert letter["Dead-Letter-Code"] == code
    assert letter["Dead-Letter-Attempts"] == "3"
    subject = scene.subjects.dead_letter(scene.task)
    stored_letter = await scene.sender.jetstream().get_last_msg(
        scene.subjects.dead_letters_stream, subject
    )
    assert stored_letter.data == body
    assert await scene.keys() == set()
    await assert_next_request_succeeds(scene, worker, event)


async def test_model_that_raises_only_once_is_tried_again(scene: Scene) -> None:
    worker = await scene.start("raises_on_demand")
    request_id = await scene.submit(prompt="raises once")
    event = await succeeded(scene, request_id)
    assert event["attempt"] == 2
    assert scene.runs() == [request_id] * 2
    await assert_queue_empty(scene, request_id)
    await assert_next_request_succeeds(scene, worker, event)


# -- memory ---------------------------------------------------------------------------------------


async def test_out_of_memory_once_is_run_again_at_once_and_saves_memory(scene: Scene) -> None:
    worker = await scene.start("out_of_memory")
    request_id = await scene.submit(prompt="large")
    event = await succeeded(scene, request_id)
    assert event["attempt"] == 1
    assert scene.runs() == [request_id] * 2
    await assert_queue_empty(scene, request_id)
    await assert_next_request_succeeds(scene, worker, event)
    assert scene.notes("saving") == ["False", "True", "False"]
    assert await deliveries(scene) == 2


async def test_out_of_memory_for_good_is_a_failure_and_no_dead_letter(scene: Scene) -> None:
    worker = await scene.start("out_of_memory")
    request_id = await scene.submit(prompt="huge")
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"]) == (FAILED, 1)
    assert event["failure"]["code"] == "out_of_memory"
    assert event["failure"]["details"] == {"tried": ["saving"]}
    assert scene.runs() == [request_id] * 2
    assert await scene.dead_letters() == []
    await assert_next_request_succeeds(scene, worker, event)
    assert scene.notes("saving") == ["False", "True", "False"]
    assert await deliveries(scene) == 2


# -- the device is lost, the thread hangs ---------------------------------------------------------


async def test_lost_device_ends_the_process_and_the_next_worker_has_the_request_at_once(
    scene: Scene,
) -> None:
    lease = {"CONSUMER_ACK_WAIT": "30"}  # only a give-back can explain a recovery before it is over
    await scene.apply(**lease)
    losing = await scene.start("device_lost", **lease)
    request_id = await scene.submit()
    await scene.until_noted("runs")
    await scene.start(**lease)
    (scene.folder / "lose").touch()
    assert await scene.exit_code(losing) == MODEL_LOST
    ended = time.monotonic()
    event = await succeeded(scene, request_id)
    took = time.monotonic() - ended
    print(f"lost device: done by the next worker {took:.2f} s after the end")  # noqa: T201
    assert took < 10
    log = losing.log_since_start()
    assert '"error": "AcceleratorError"' in log
    assert "illegal memory access" not in log
    assert event["attempt"] == 2
    assert scene.runs() == [request_id] * 2
    assert scene.notes("freed") == [], "no call goes to a lost device"
    await assert_queue_empty(scene, request_id)


async def test_thread_that_hangs_ends_the_process_and_its_lease(scene: Scene) -> None:
    stall = {"CONSUMER_STALL_TIMEOUT": str(STALL)}
    workers = await asyncio.gather(scene.start("hangs", **stall), scene.start("hangs", **stall))
    request_id = await scene.submit()
    await scene.until_noted("hanging")
    (hanging,) = (worker for worker in workers if scene.notes("hanging") == [str(worker.pid)])
    assert await scene.exit_code(hanging) == MODEL_LOST
    ended = time.monotonic()
    event = await scene.event(request_id)
    hung, again = (float(line.split()[1]) for line in scene.notes(STARTED))
    print(  # noqa: T201 - for people
        f"hanging thread: ended {ended - hung:.2f} s after its start with a stall timeout of "
        f"{STALL:g} s; begun again {again - ended:.2f} s after that"
    )
    assert again - ended < AGAIN_WITHIN
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 2)
    assert scene.runs() == [request_id] * 2
    assert await stored_digests(scene) == published_digests(event)
    await assert_queue_empty(scene, request_id)
    (other,) = (worker for worker in workers if worker is not hanging)
    await assert_next_request_succeeds(scene, other, event)


# -- it cannot be loaded --------------------------------------------------------------------------


async def test_model_that_cannot_be_loaded_takes_no_request(scene: Scene) -> None:
    request_id = await scene.submit()
    failing = scene.launch("load_fails")
    assert await scene.exit_code(failing) == MODEL_LOST
    lines = [json.loads(line) for line in failing.log.read_text().splitlines()]
    (line,) = (line for line in lines if line["event"] == "model_unavailable")
    assert line["level"] == "error"
    assert line["reason"] == (
        "portraits: cannot be loaded: Error while reading portraits/vae/weights.safetensors and "
        "… cut"
    )
    assert not any("exception" in line for line in lines)
    assert await deliveries(scene) == 0
    assert await scene.pending() == 1
    await scene.start()
    assert (await succeeded(scene, request_id))["attempt"] == 1
    assert scene.runs() == [request_id]
