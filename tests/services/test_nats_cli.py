"""`nats request` as the README shows it, where that program is on the PATH.

Elsewhere test_front_door.py asks and waits in the same way with nats-py.
"""

import asyncio
import json
import shutil

import pytest

from tests.faults.scene import WITHIN, Scene

NATS = shutil.which("nats")

pytestmark = pytest.mark.skipif(NATS is None, reason="the nats command line is not installed")


async def nats(scene: Scene, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        str(NATS),
        "--server",
        scene.stack.nats.url,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told, errors = await asyncio.wait_for(process.communicate(), WITHIN)
    assert process.returncode == 0, errors.decode()
    return told.decode()


async def test_a_request_prints_the_result_event(scene: Scene) -> None:
    await scene.start()
    body = '{"prompt":"a red circle","request_id":"cli"}'
    subject = scene.subjects.call(scene.task)
    told = await nats(scene, "request", subject, body, "--timeout", "30s", "--raw")
    assert json.loads(told) == await scene.event("cli")


async def test_the_service_is_listed_and_cancels(scene: Scene) -> None:
    await scene.start()
    assert "generation" in await nats(scene, "micro", "ls")
    assert "quick" in await nats(scene, "micro", "info", "generation")
    subject = f"{scene.subjects.root}.cancel.nobody"
    assert json.loads(await nats(scene, "request", subject, "", "--raw"))["status"] == "unknown"
