"""A request that kills every worker is dead-lettered, and later requests succeed."""

import json
import signal

from tests.support.observations import published_digests, stored_digests
from tests.support.scene import Scene

POISON = json.dumps({"request_id": "poison-1", "prompt": "poison", "metadata": {"a": "b"}}).encode()
HEADERS = {"X-Sender": "somebody", "Nats-Msg-Id": "sent-1"}
DEATHS = 3  # CONSUMER_MAX_ATTEMPTS


async def test_poison_is_dead_lettered_unrun_after_three_deaths(scene: Scene) -> None:
    await scene.apply(CONSUMER_ACK_WAIT="1")
    await scene.publish(POISON, HEADERS)
    harmless = await scene.submit()
    for _ in range(DEATHS):
        dying = scene.launch("poison")
        assert await scene.exit_code(dying) == -signal.SIGKILL
    assert await scene.events("poison-1") == []
    last = await scene.start("poison")

    event = await scene.event("poison-1")
    assert (event["type"], event["failure"]["code"]) == ("generation.v1.failed", "worker_lost")
    assert (event["attempt"], event["metadata"]) == (DEATHS + 1, {"a": "b"})
    done = await scene.event(harmless)
    assert done["type"] == "generation.v1.succeeded"
    assert done["worker"] == event["worker"]
    await scene.until_empty()
    assert last.alive
    assert scene.runs() == ["poison-1"] * DEATHS + [harmless]
    assert await stored_digests(scene) == published_digests(done)
    await _assert_dead_lettered(scene, event["worker"])


async def _assert_dead_lettered(scene: Scene, worker: str) -> None:
    (headers,) = await scene.dead_letters()
    stream, subject = scene.subjects.dead_letters_stream, scene.subjects.dead_letter(scene.task)
    letter = await scene.sender.jetstream().get_last_msg(stream, subject)
    assert letter.data == POISON
    dead_letter_headers = {
        name: text for name, text in headers.items() if name.startswith("Dead-Letter-")
    }
    del dead_letter_headers["Dead-Letter-Time"]
    assert dead_letter_headers == {
        "Dead-Letter-Code": "worker_lost",
        "Dead-Letter-Reason": "the workers that took this request were lost",
        "Dead-Letter-Request-Id": "poison-1",
        "Dead-Letter-Attempts": str(DEATHS + 1),  # deliveries: the last one was not run
        "Dead-Letter-Worker": worker,
        "Dead-Letter-Subject": scene.subjects.request(scene.task),
    }
    assert {name: headers[f"Original-{name}"] for name in HEADERS} == HEADERS
