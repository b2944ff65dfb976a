"""What a new user types in the first hour: the examples, changes to them, and typos."""

import asyncio
import json
import os
import re
import sys
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


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "settings", "text"),
    [
        pytest.param(
            ["check"],
            {"CONSUMER_MAX_BACTH": "4", "MODEL_TYP": "x"},
            "CONSUMER_MAX_BACTH: there is no such setting; did you mean CONSUMER_MAX_BATCH?",
            id="misspelt variable",
        ),
        pytest.param(["apply"], {"S3_ACCESS_KEY": ""}, "S3_ACCESS_KEY: ", id="no key"),
        pytest.param(["run"], {"S3_SECRET_KEY": ""}, "S3_SECRET_KEY: ", id="no secret"),
        pytest.param(
            ["check", "--model"],
            {"MODEL_ID": "/models/none"},
            "MODEL_ID: there is no folder /models/none",
            id="no such folder",
        ),
        pytest.param(
            ["run"],
            {"MODEL_SAFETY_CHECKER": "foo:bar"},
            "MODEL_SAFETY_CHECKER: there is no module foo",
            id="no such module",
        ),
        pytest.param(
            ["run"], {"MODEL_ADAPTERS": "a=/nope"}, "MODEL_ADAPTERS: a: ", id="no such adapter"
        ),
    ],
)
def test_a_wrong_setting_exits_with_2_and_its_name(
    system: DevStack, arguments: list[str], settings: dict[str, str], text: str
) -> None:
    environment = {**system.environment(), "MODEL_TYPE": "text_to_image", **settings}
    done = run_consumer(*arguments, **environment)
    assert done.returncode == 2, done.stderr
    assert f"consumer: {text}" in done.stderr
    assert all(line.startswith("consumer: ") for line in done.stderr.splitlines())


# -- a busy queue ---------------------------------------------------------------------------------


async def test_a_request_shows_its_id_and_the_requests_before_it(
    system: DevStack, sender: Client, tmp_path: Path
) -> None:
    long, mine = new_id(), new_id()
    progress = await sender.subscribe(f"generation.progress.text_to_image.{long}")
    await sender.flush()
    await sender.jetstream().publish(
        f"generation.request.text_to_image.{long}", b'{"prompt": "a", "steps": 200}'
    )
    await progress.next_msg(timeout=WITHIN)  # it runs
    command = ("request", "text-to-image", "a red circle", "--id", mine, "--steps", "1")
    asking = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "consumer", *command),
        cwd=tmp_path,
        env={**os.environ, **system.environment()},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert asking.stderr is not None
    lines = [await asyncio.wait_for(asking.stderr.readline(), WITHIN) for _ in range(2)]
    await sender.request(f"generation.cancel.{long}", b"", timeout=WITHIN)
    output, _ = await asyncio.wait_for(asking.communicate(), WITHIN)
    assert [line.decode().strip() for line in lines] == [
        f"request {mine}: stored in the queue, waiting for a worker",
        "requests before it: 1 at most",
    ]
    assert output.decode() == f"saved {mine}.png\n"
