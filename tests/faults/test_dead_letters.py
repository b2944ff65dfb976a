"""The `consumer dead-letters` commands on real servers."""

import asyncio
import json
import os
import pty
import sys
from dataclasses import dataclass

import pytest

from consumer.devstack import free_ports
from generation_contracts.headers import (
    DEAD_LETTER_CODE,
    DEAD_LETTER_REASON,
    DEAD_LETTER_REQUEST_ID,
    DEAD_LETTER_TRUNCATED,
)
from tests.support.holding import FIXED
from tests.support.scene import Scene


@dataclass(frozen=True)
class Done:
    code: int | None
    stdout: bytes
    stderr: str

    @property
    def lines(self) -> list[str]:
        return self.stdout.decode().splitlines()


def environment(scene: Scene, **settings: str) -> dict[str, str]:
    """Return the environment of an operator: no MODEL_TYPE and no store settings."""
    environment = {
        name: value
        for name, value in scene.settings().items()
        if name.startswith(("NATS_", "CONSUMER_SUBJECT_ROOT"))
    }
    return {**os.environ, **environment, **settings}


async def dead_letters(scene: Scene, *arguments: str, **settings: str) -> Done:
    """Run `consumer dead-letters …`."""
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "consumer", "dead-letters", *arguments),
        env=environment(scene, **settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await command.communicate()
    return Done(command.returncode, stdout, stderr.decode())


async def dead_letter(
    scene: Scene,
    body: bytes = b"{}",
    *,
    request_id: str = "r-1",
    headers: dict[str, str] | None = None,
) -> None:
    """Store a dead letter as a worker does."""
    dead_letter_headers = {DEAD_LETTER_REQUEST_ID: request_id, DEAD_LETTER_CODE: "model_error"}
    await scene.sender.jetstream().publish(
        scene.subjects.dead_letter(scene.task),
        body,
        headers={**dead_letter_headers, **(headers or {})},
    )


async def letters(scene: Scene) -> int:
    info = await scene.sender.jetstream().stream_info(scene.subjects.dead_letters_stream)
    return int(info.state.messages)


# -- with a worker --------------------------------------------------------------------------------


async def test_request_is_replayed_after_the_model_is_fixed(scene: Scene) -> None:
    await scene.start("raises_until_fixed")
    request_id = await scene.submit()
    failed = await scene.event(request_id)
    assert (failed["type"], failed["attempt"]) == ("generation.v1.failed", 3)
    await scene.until_empty()
    assert await letters(scene) == 1

    (scene.folder / FIXED).touch()
    done = await dead_letters(scene, "replay", request_id)

    assert (done.code, done.stderr) == (0, "")
    assert done.lines == [f"1 {request_id}: replayed"]
    await scene.until_empty()
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 1)
    assert event["request_digest"] == failed["request_digest"]
    assert scene.runs() == [request_id] * 4
    assert len(await scene.keys()) == 1
    assert await letters(scene) == 0
    again = await dead_letters(scene, "replay", request_id)
    assert (again.code, again.lines) == (1, [f"{request_id}: no such dead letter"])


async def test_failed_replay_has_a_new_event_and_a_new_dead_letter(scene: Scene) -> None:
    await scene.start("raises_until_fixed")
    derived = f"{scene.subjects.requests_stream(scene.task)}-1-"
    await scene.publish({"prompt": "a"})
    await scene.until_empty()
    done = await dead_letters(scene, "replay", "--all")
    assert done.code == 0
    await scene.until_empty()
    (letter,) = [json.loads(line) for line in (await dead_letters(scene, "list", "--json")).lines]
    assert letter["sequence"] == 2
    assert letter["request_id"].startswith(derived)
    assert done.lines == [f"1 {letter['request_id']}: replayed"]
    assert (await scene.event(letter["request_id"]))["failure"]["code"] == "model_error"
    assert len(scene.runs()) == 6


# -- replay ---------------------------------------------------------------------------------------


async def test_replay_continues_after_a_refused_request(scene: Scene) -> None:
    await dead_letter(scene, request_id="r-1")
    await dead_letter(scene, request_id="r-2", headers={DEAD_LETTER_TRUNCATED: "2000000"})
    await dead_letter(scene, request_id="r-3", headers={DEAD_LETTER_CODE: "invalid_request"})
    await dead_letter(scene, request_id="r-4")
    done = await dead_letters(scene, "replay", "--all", "--code", "model_error")
    assert done.code == 1
    assert done.lines == [
        "1 r-1: replayed",
        "2 r-2: not replayed: it is truncated: the rest of the request is lost",
        "4 r-4: replayed",
    ]
    assert (await scene.pending(), await letters(scene)) == (2, 2)


async def test_dead_letter_is_selected_by_sequence_or_request_id(
    scene: Scene,
) -> None:
    for request_id in ("r-1", "3", "r-1", "r-2"):
        await dead_letter(scene, request_id=request_id)
    done = await dead_letters(scene, "replay", "r-1", "id:3", "4", "9", "r-9")
    assert done.code == 1
    assert done.lines == [
        "3 r-1: replayed",
        "2 3: replayed",
        "4 r-2: replayed",
        "9: no such dead letter",
        "r-9: no such dead letter",
    ]
    assert await letters(scene) == 1


async def test_full_queue_ends_the_replay_with_exit_code_69(scene: Scene) -> None:
    jetstream = scene.sender.jetstream()
    for request_id in ("r-1", "r-2", "r-3"):
        await dead_letter(scene, request_id=request_id)
    info = await jetstream.stream_info(scene.subjects.requests_stream(scene.task))
    info.config.max_msgs = 1
    await jetstream.update_stream(info.config)
    done = await dead_letters(scene, "replay", "--all")
    assert (done.code, done.lines) == (69, ["1 r-1: replayed"])
    assert done.stderr == "consumer: the queue is full: try again later\n"
    assert await letters(scene) == 2


# -- list and show --------------------------------------------------------------------------------


async def test_empty_list_is_reported_on_standard_error(scene: Scene) -> None:
    for arguments in (["list"], ["replay", "--all"]):
        done = await dead_letters(scene, *arguments)
        assert (done.code, done.stdout, done.stderr) == (0, b"", "no dead letters\n")


async def test_table_has_no_terminal_control_characters(scene: Scene) -> None:
    reason = "[red]x[/red]\x1b[2J" + "y" * 300
    await dead_letter(scene, request_id="r-1", headers={DEAD_LETTER_REASON: reason})
    await dead_letter(scene, request_id="r-2", headers={DEAD_LETTER_CODE: "internal"})
    done = await dead_letters(scene, "list")
    assert done.code == 0
    heading, first, second = done.lines
    assert heading.split()[:3] == ["SEQUENCE", "STORED", "QUEUE"]
    assert first.split()[0] == "1"
    assert "r-1" in first.split()
    assert first.rstrip().endswith("[red]x[/red]?[2J" + "y" * 300)
    assert second.split()[0] == "2"
    assert (await dead_letters(scene, "list", "--code", "internal")).lines[1].split()[0] == "2"


async def test_closed_output_ends_the_list_without_an_error(scene: Scene) -> None:
    await dead_letter(scene)
    read, write = os.pipe()
    os.close(read)
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "consumer", "dead-letters", "list", "--json"),
        env=environment(scene),
        stdout=write,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(write)
    _, stderr = await command.communicate()
    assert (command.returncode, stderr) == (1, b"")


async def test_show_writes_only_the_bytes_to_standard_output(scene: Scene) -> None:
    body = bytes(range(256))
    await dead_letter(scene, body, headers={"Original-Title": "Grüße\x1b"})
    done = await dead_letters(scene, "show", "r-1")
    assert (done.code, done.stdout) == (0, body)
    assert "Dead-Letter-Request-Id: r-1\n" in done.stderr
    assert "Original-Title: Grüße?\n" in done.stderr


@pytest.mark.parametrize(
    ("body", "listed"),
    [("ü{".encode(), {"body": "ü{"}), (b"\xff\x00", {"body_base64": "/wA="})],
)
async def test_show_as_json_writes_one_complete_object(
    scene: Scene, body: bytes, listed: dict[str, str]
) -> None:
    await dead_letter(scene, body, headers={"Original-Title": "Grüße", DEAD_LETTER_REASON: "why"})
    done = await dead_letters(scene, "show", "1", "--json")
    (line,) = done.lines
    letter = json.loads(line)
    assert (letter["request_id"], letter["code"], letter["reason"]) == ("r-1", "model_error", "why")
    assert letter["headers"] == {"Title": "Grüße"}
    assert {key: text for key, text in letter.items() if key.startswith("body")} == listed


async def test_show_on_a_terminal_ends_with_a_line_break(scene: Scene) -> None:
    await dead_letter(scene, b"{}")
    terminal, side = pty.openpty()
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "consumer", "dead-letters", "show", "1"),
        env=environment(scene),
        stdout=side,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await command.wait()
    os.close(side)
    assert os.read(terminal, 100) == b"{}\r\n"
    os.close(terminal)


@pytest.mark.parametrize("name", ["r-1", "1", "id:1", "no\x1bthing"])
async def test_missing_dead_letter_is_one_line_with_exit_code_1(scene: Scene, name: str) -> None:
    done = await dead_letters(scene, "show", name)
    assert (done.code, done.stdout) == (1, b"")
    assert done.stderr == f"consumer: {name.replace(chr(27), '?')}: no such dead letter\n"


# -- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["replay"],
        ["replay", "1", "--all"],
        ["replay", "1", "--code", "model_error"],
        ["replay", "--all", "--code", "model-error"],
        ["list", "--code", "unknown"],
        ["list", "--config", "no-such-file.toml"],
    ],
)
async def test_wrong_usage_is_one_line_with_exit_code_2(scene: Scene, arguments: list[str]) -> None:
    done = await dead_letters(scene, *arguments)
    assert (done.code, done.stdout) == (2, b"")
    assert done.stderr.startswith("consumer: ")
    assert done.stderr.count("\n") == 1


async def test_missing_streams_or_server_is_one_line_with_exit_code_69(scene: Scene) -> None:
    other = await dead_letters(scene, "list", CONSUMER_SUBJECT_ROOT="other")
    assert other.code == 69
    assert other.stderr == (
        "consumer: NATS: there is no stream OTHER_DEAD_LETTERS; run `consumer apply`\n"
    )
    (port,) = free_ports(1)
    gone = await dead_letters(scene, "list", NATS_URL=f"nats://a:secret@127.0.0.1:{port}")
    assert gone.code == 69
    assert gone.stderr.startswith("consumer: NATS: cannot connect to ")
    assert "secret" not in gone.stderr
