"""What the README shows to people at a terminal: `nats request`, `nats micro ls`, cancellation.

Where the nats command line is on the PATH it is used; elsewhere the same messages go by nats-py.
"""

import asyncio
import json
import shutil

from tests.support.scene import WITHIN, Scene

NATS = shutil.which("nats")


async def request(scene: Scene, subject: str, body: str) -> str:
    """What `nats request SUBJECT BODY` prints."""
    if NATS is None:
        answer = await scene.sender.request(subject, body.encode(), timeout=WITHIN)
        return answer.data.decode()
    process = await asyncio.create_subprocess_exec(
        *(NATS, "--server", scene.stack.nats.url, "request", subject, body),
        *("--timeout", f"{WITHIN:g}s", "--raw"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told, errors = await asyncio.wait_for(process.communicate(), WITHIN)
    assert process.returncode == 0, errors.decode()
    return told.decode()


async def test_a_request_gives_the_result_event_and_nothing_before_it(scene: Scene) -> None:
    await scene.start()
    body = '{"prompt":"a red circle","request_id":"cli"}'
    told = await request(scene, scene.subjects.call(scene.task), body)
    assert json.loads(told) == await scene.event("cli")


async def test_the_service_is_found_and_cancels(scene: Scene) -> None:
    await scene.start()
    # What `nats micro ls` and `nats micro info` ask.
    assert json.loads(await request(scene, "$SRV.PING", ""))["name"] == "generation"
    assert json.loads(await request(scene, "$SRV.INFO.generation", ""))["metadata"]["id"] == "quick"
    told = await request(scene, f"{scene.subjects.root}.cancel.nobody", "")
    assert json.loads(told)["status"] == "unknown"
