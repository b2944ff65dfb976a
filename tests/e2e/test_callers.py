"""The examples of docs/sending.md, on a running system with the demonstration models."""

import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from nats.aio.client import Client
from PIL import Image

from consumer.devstack import DevStack
from tests.e2e.senders import WITHIN, needs_nats_and_jq, new_id, run_consumer, run_request

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/sending.md").read_text("utf-8")
ALL_WITHIN = 150.0  # seconds for all commands of the page; only a hang takes this long
SUCCEEDED = "generation.v1.succeeded"


async def call(sender: Client, task: str, body: str) -> dict[str, object]:
    answer = await sender.request(f"generation.call.{task}", body.encode(), timeout=WITHIN)
    event: dict[str, object] = json.loads(answer.data)
    return event


async def run_in_folder(
    system: DevStack, folder: Path, *command: str, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder with the variables that the page sets."""
    scripts = str(Path(sys.executable).parent)
    environment = {**system.environment(), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    return await asyncio.to_thread(
        subprocess.run,
        command,
        cwd=folder,
        input=text,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=ALL_WITHIN,
        check=False,
    )


def page_commands() -> list[str]:
    """Return the shell commands of the page that need the running system, in their order."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    found = [one for block in blocks for one in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [one for one in found if not one.startswith(("uv run consumer up", "export", ". "))]


@needs_nats_and_jq
@pytest.mark.parametrize(
    ("prompt", "with_consumer"),
    [("a red circle", True), ("a blue square", False)],
    ids=["as written", "nats again with another prompt"],
)
async def test_the_commands_of_the_page_run(
    system: DevStack, tmp_path: Path, prompt: str, *, with_consumer: bool
) -> None:
    """All commands run in one shell, because they share variables.

    The second round has no `consumer` commands, which take seconds to start.
    """
    commands = page_commands()
    assert len(commands) > 10
    # The request is finished when it is cancelled: the command ends with 1.
    lines = [f"! {code}" if code.startswith("consumer cancel") else code for code in commands]
    if not with_consumer:
        lines = [code for code in commands if "consumer " not in code]
    script = "".join(["set -euo pipefail\n", *lines]).replace("a red circle", prompt)
    done = await run_in_folder(system, tmp_path, "bash", "-s", text=script)
    assert done.returncode == 0, done.stderr[-2000:]
    events = [json.loads(line) for line in done.stdout.splitlines() if '"type"' in line]
    kinds = [event["type"] for event in events if "request_id" in event]
    assert len(kinds) >= 4
    assert set(kinds) == {SUCCEEDED}, kinds
    cancelled = "finished" if with_consumer else "unknown"
    assert f'"status":"{cancelled}"' in done.stdout.replace(" ", "")
    outputs = [output for event in events for output in event.get("outputs", [])]
    described = [output["text"] for output in outputs if "text" in output]
    noun = prompt.rpartition(" ")[2]
    assert any(noun in text for text in described), described


async def run_example(text: str, system: DevStack, folder: Path) -> list[str]:
    """Run the example of the page that contains a text with two prompts; return both outputs."""
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (example,) = [code for code in examples if text in code]
    outputs = []
    for prompt in ("a red circle", "a blue square"):
        code = example.replace("a red circle", prompt)
        done = await run_in_folder(system, folder, sys.executable, "-c", code)
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout)
    return outputs


async def test_the_example_without_the_client_runs_twice(system: DevStack, tmp_path: Path) -> None:
    events = [json.loads(text) for text in await run_example("nats.connect", system, tmp_path)]
    assert [event["type"] for event in events] == [SUCCEEDED, SUCCEEDED]
    assert events[0]["request_id"] != events[1]["request_id"]


async def test_the_example_with_the_client_runs_twice(system: DevStack, tmp_path: Path) -> None:
    answers = await run_example("GenerationClient", system, tmp_path)
    assert "circle" in answers[0]
    assert "square" in answers[1]
    assert (tmp_path / "circle.png").read_bytes().startswith(b"\x89PNG")


async def test_the_manual_chain_describes_every_new_image(system: DevStack, sender: Client) -> None:
    """An image from before the first start is not described."""
    await run_request(sender, "text_to_image", prompt="a red circle", steps=1)
    describer = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "docs" / "examples" / "chain_by_hand.py"),
        env={**os.environ, "NATS_URL": system.nats.url},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert describer.stdout is not None
        assert await describer.stdout.readline() == b"waiting for results\n"
        answers = await sender.subscribe("generation.result.image_to_text.*")
        await sender.flush()
        request_id = new_id()
        await run_request(
            sender, "text_to_image", request_id=request_id, prompt="a red circle", steps=1
        )
        event = json.loads((await answers.next_msg(timeout=WITHIN)).data)
    finally:
        describer.terminate()
        await describer.wait()
    assert (event["type"], event["request_id"]) == (SUCCEEDED, f"{request_id}-described")
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
    consumer = partial(run_consumer, **system.environment())
    unknown = await asyncio.to_thread(consumer, "cancel", "unknown")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr == "unknown: no request with this id is queued, running or finished\n"
    request_id = new_id()
    events = await sender.subscribe(f"generation.progress.text_to_image.{request_id}")
    await sender.flush()
    body = json.dumps({"prompt": "a", "steps": 200, "width": 64, "height": 64, "num_images": 8})
    subject = f"generation.request.text_to_image.{request_id}"
    await sender.jetstream().publish(subject, body.encode())
    await events.next_msg(timeout=WITHIN)
    stopped = await asyncio.to_thread(consumer, "cancel", request_id)
    assert (stopped.returncode, stopped.stdout) == (0, "cancelled\n")
    again = await asyncio.to_thread(consumer, "cancel", request_id, "--json")
    assert json.loads(again.stdout)["status"] == "cancelled"
    done = await run_request(sender, "text_to_image", prompt="a", steps=1)
    late = await asyncio.to_thread(consumer, "cancel", done["request_id"])
    assert (late.returncode, late.stdout) == (1, "")
    assert late.stderr.endswith(": too late to cancel, the request has ended: succeeded\n")
    assert (await asyncio.to_thread(consumer, "cancel", "a.b")).returncode == 2
