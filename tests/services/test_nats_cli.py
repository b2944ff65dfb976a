"""The README's examples for a terminal: `nats request`, `nats micro ls` and cancellation.

The tests use the nats command if it is on the PATH, and nats-py otherwise.
"""

import asyncio
import json
import shutil

from tests.support.scene import WITHIN, Scene

NATS = shutil.which("nats")


async def request(scene: Scene, subject: str, body: str) -> str:
    """Return the output of `nats request SUBJECT BODY`."""
    if NATS is None:
        answer = await scene.sender.request(subject, body.encode(), timeout=WITHIN)
        return answer.data.decode()
    process = await asyncio.create_subprocess_exec(
        *(NATS, "--server", scene.stack.nats.url, "request", subject, body),
        *("--timeout", f"{WITHIN:g}s", "--raw"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), WITHIN)
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def test_a_request_returns_only_the_result_event(scene: Scene) -> None:
    await scene.start()
    body = '{"prompt":"a red circle","request_id":"cli"}'
    output = await request(scene, scene.subjects.call(scene.task), body)
    assert json.loads(output) == await scene.event("cli")


async def test_the_service_is_discoverable_and_handles_cancellations(scene: Scene) -> None:
    await scene.start()
    # The requests of `nats micro ls` and `nats micro info`.
    assert json.loads(await request(scene, "$SRV.PING", ""))["name"] == "generation"
    assert json.loads(await request(scene, "$SRV.INFO.generation", ""))["metadata"]["id"] == "quick"
    output = await request(scene, f"{scene.subjects.root}.cancel.unknown", "")
    assert json.loads(output)["status"] == "unknown"
