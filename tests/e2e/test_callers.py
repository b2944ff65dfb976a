"""The examples of docs/sending.md, on a running system with the demonstration models."""

import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from nats.aio.client import Client
from PIL import Image

from consumer.devstack import DevStack
from tests.e2e.senders import WITHIN, new_id, run_request

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/sending.md").read_text("utf-8")
SUCCEEDED = "generation.v1.succeeded"


def consumer(system: DevStack, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "consumer", *arguments],
        env={**os.environ, **system.environment()},
        capture_output=True,
        text=True,
        timeout=WITHIN,
        check=False,
    )


async def call(sender: Client, task: str, body: str) -> dict[str, object]:
    answer = await sender.request(f"generation.call.{task}", body.encode(), timeout=WITHIN)
    event: dict[str, object] = json.loads(answer.data)
    return event


async def test_the_chain_of_the_page_runs(sender: Client) -> None:
    (slip,) = re.findall(r"call\.text_to_image '(\{[^']*\"then\"[^']*\})'", PAGE)
    event = await call(sender, "text_to_image", slip)
    assert (event["type"], event["request_id"]) == (SUCCEEDED, "tour-3"), event
    assert event["chain"] == {"id": "tour", "step": 3, "of": 3}


async def run_example(text: str, system: DevStack, folder: Path) -> str:
    """Run the example of the page that contains a text, twice; return the last output."""
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (example,) = [code for code in examples if text in code]
    for prompt in ("a blue heart", "a red circle"):
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", example.replace("a red circle", prompt)],
            cwd=folder,
            env={**os.environ, "NATS_URL": system.nats.url},
            capture_output=True,
            text=True,
            timeout=WITHIN,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


async def test_the_example_without_the_client_runs(system: DevStack, tmp_path: Path) -> None:
    event = json.loads(await run_example("nats.connect", system, tmp_path))
    assert event["type"] == SUCCEEDED


async def test_the_example_with_the_client_runs(system: DevStack, tmp_path: Path) -> None:
    assert (await run_example("GenerationClient", system, tmp_path)).strip()
    assert (tmp_path / "circle.png").read_bytes().startswith(b"\x89PNG")


async def test_the_manual_chain_describes_every_image(system: DevStack, sender: Client) -> None:
    describer = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "docs" / "examples" / "chain_by_hand.py"), system.nats.url
    )
    try:
        request_id = new_id()
        subject = f"generation.result.image_to_text.{request_id}-described"
        answers = await sender.subscribe(subject)
        await sender.flush()
        await run_request(
            sender, "text_to_image", request_id=request_id, prompt="a red circle", steps=1
        )
        event = json.loads((await answers.next_msg(timeout=WITHIN)).data)
    finally:
        describer.terminate()
        await describer.wait()
    assert event["type"] == SUCCEEDED
    await sender.jetstream().delete_consumer("GENERATION_RESULTS", "describer")


async def test_progress_events_contain_previews(sender: Client) -> None:
    request_id = new_id()
    progress = await sender.subscribe(f"generation.progress.text_to_image.{request_id}")
    await sender.flush()
    body = {"prompt": "a large red circle", "steps": 200, "preview": True}
    await sender.jetstream().publish(
        f"generation.request.text_to_image.{request_id}", json.dumps(body).encode()
    )
    preview = None
    while preview is None:
        preview = json.loads((await progress.next_msg(timeout=WITHIN)).data).get("preview")
    with Image.open(io.BytesIO(base64.b64decode(preview))) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
    await sender.request(f"generation.cancel.{request_id}", b"", timeout=WITHIN)


async def test_a_call_with_an_unsupported_parameter_is_refused(sender: Client) -> None:
    body = json.dumps({"prompt": "a", "adapters": {"none": 1}})
    event = await call(sender, "text_to_image", body)
    failure = event["failure"]
    assert isinstance(failure, dict)
    assert failure["code"] == "unsupported_parameter"


async def test_the_cancel_command_prints_the_status(system: DevStack, sender: Client) -> None:
    unknown = await asyncio.to_thread(consumer, system, "cancel", "unknown")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr == "unknown: no request with this id is queued, running or finished\n"
    request_id = new_id()
    events = await sender.subscribe(f"generation.progress.text_to_image.{request_id}")
    await sender.flush()
    body = json.dumps({"prompt": "a", "steps": 200, "width": 64, "height": 64, "num_images": 8})
    subject = f"generation.request.text_to_image.{request_id}"
    await sender.jetstream().publish(subject, body.encode())
    await events.next_msg(timeout=WITHIN)
    stopped = await asyncio.to_thread(consumer, system, "cancel", request_id)
    assert (stopped.returncode, stopped.stdout) == (0, "cancelled\n")
    again = await asyncio.to_thread(consumer, system, "cancel", request_id, "--json")
    assert json.loads(again.stdout)["status"] == "cancelled"
    done = await run_request(sender, "text_to_image", prompt="a", steps=1)
    late = await asyncio.to_thread(consumer, system, "cancel", done["request_id"])
    assert (late.returncode, late.stdout) == (1, "")
    assert late.stderr.endswith(": too late to cancel, the request has ended: succeeded\n")
    assert (await asyncio.to_thread(consumer, system, "cancel", "a.b")).returncode == 2
