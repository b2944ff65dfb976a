"""What a new user types in the first hour: the examples, changes to them, and typos."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client

from consumer.devstack import DevStack
from tests.e2e.senders import WITHIN, needs_nats_and_jq, new_id, run_consumer

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text("utf-8")
PAGE = (ROOT / "docs/sending.md").read_text("utf-8")
SUCCEEDED, FAILED = "generation.v1.succeeded", "generation.v1.failed"


async def shell(system: DevStack, script: str) -> tuple[int | None, str, str]:
    """Run a script with the address of the system; return exit code, output and errors."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-uo", "pipefail", "-c", f"export NATS_URL={system.nats.url}\n{script}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), WITHIN)
    return process.returncode, output.decode(), errors.decode()


# -- examples, repeated and changed ---------------------------------------------------------------


@needs_nats_and_jq
async def test_the_command_of_the_readme_prints_only_the_event(system: DevStack) -> None:
    (command,) = re.findall(r"^\$ (nats request .*)$", README, re.MULTILINE)
    ids = set()
    for prompt in ("a red circle", "a red circle", "a blue heart"):
        code, output, errors = await shell(system, command.replace("a red circle", prompt))
        assert (code, errors) == (0, "")
        event = json.loads(output)
        assert event["type"] == SUCCEEDED, event
        ids.add(event["request_id"])
    assert len(ids) == 3


@needs_nats_and_jq
async def test_a_result_that_does_not_exist_sends_no_next_request(system: DevStack) -> None:
    (command,) = re.findall(r"^\$ (body=.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    code, output, _ = await shell(system, f"tour={new_id()}\n{command}")
    assert code != 0
    assert output.strip() == ""


async def publish(sender: Client, request_id: str, body: dict[str, Any]) -> dict[str, Any]:
    """Publish a request as the second example of docs/sending.md does; return the reply."""
    inbox = sender.new_inbox()
    answers = await sender.subscribe(inbox)
    await sender.jetstream().publish(
        f"generation.request.text_to_image.{request_id}",
        json.dumps({**body, "reply_to": inbox}).encode(),
        headers={"Nats-Msg-Id": new_id()},
    )
    event: dict[str, Any] = json.loads((await answers.next_msg(timeout=WITHIN)).data)
    await answers.unsubscribe()
    return event


async def test_a_repeated_id_is_answered_also_with_another_prompt(sender: Client) -> None:
    request_id = new_id()
    first = await publish(sender, request_id, {"prompt": "a red circle", "steps": 1})
    again = await publish(sender, request_id, {"prompt": "a red circle", "steps": 1})
    other = await publish(sender, request_id, {"prompt": "a blue heart", "steps": 1})
    assert first["type"] == SUCCEEDED
    assert (again["type"], again["time"]) == (SUCCEEDED, first["time"])
    assert other["failure"]["code"] == "request_id_conflict"


# -- typos ----------------------------------------------------------------------------------------


async def test_a_misspelt_field_is_named_in_the_answer(sender: Client) -> None:
    answer = await sender.request(
        "generation.call.text_to_image", b'{"promt": "a red circle"}', timeout=WITHIN
    )
    event = json.loads(answer.data)
    assert event["type"] == FAILED
    assert event["failure"]["code"] == "invalid_request"
    assert "promt" in json.dumps(event["failure"])


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        pytest.param(["request", "text-to-image", ""], 2, "prompt", id="empty prompt"),
        pytest.param(["request", "text-to-image", "a " * 4001], 2, "8000", id="long prompt"),
        pytest.param(["request", "text-to-image", "a", "--seed", "-3"], 2, "seed", id="seed"),
        pytest.param(["request", "text-to-image", "a", "--widht", "9"], 2, "--widht", id="option"),
        pytest.param(["request", "text-to-imag", "a"], 2, "text-to-image", id="misspelt task"),
        pytest.param(["request", "image-to-text", "no.png", "a"], 2, "no.png", id="no such file"),
        pytest.param(["request", "image-to-text", "s3://x", "a"], 2, "s3://", id="wrong reference"),
        pytest.param(["cancel", "a.b"], 2, "ID", id="wrong id"),
        pytest.param(["cancel", "never-sent"], 1, "no request with this id", id="unknown id"),
        pytest.param(["dead-letters", "show", "999999"], 1, "999999", id="unknown dead letter"),
        pytest.param(["upp"], 2, "upp", id="misspelt command"),
    ],
)
def test_a_wrong_command_ends_with_one_message(
    system: DevStack, arguments: list[str], code: int, text: str
) -> None:
    done = run_consumer(*arguments, **system.environment())
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert text in output
    assert "Traceback" not in output
    assert len(output) < 1000
