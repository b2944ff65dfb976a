"""Streams and durables are deleted, paused or full while daemons work: the daemons recover.

The messages of a deleted stream are lost. All other guarantees hold.
"""

import asyncio
import json
import os
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from nats.js.errors import APIError, NoStreamResponseError

from consumer.devstack import Daemon
from tests.support.observations import (
    assert_all_ready,
    assert_queue_empty,
    succeeded,
    until_pulls_wait,
)
from tests.support.outage import check_duration, resume, run_start, two_workers
from tests.support.scene import ACK_WAIT, ROOT, Scene

PAUSE = 2.0  # seconds
MOST_MESSAGES = 5  # of an idle worker in PAUSE; a busy loop would send 20
QUEUE_FULL = 10077  # err_code: maximum messages, with discard=new
WORKER = "watched"
PATH = f"{ROOT}{os.pathsep}{ROOT / 'contracts'}"

what_goes = pytest.mark.parametrize(
    "what", ["durable", "requests", "results", "dead letters", "advisories", "retries"]
)


@what_goes
async def test_stream_deleted_while_workers_are_idle(scene: Scene, what: str) -> None:
    """Two workers concurrently recreate the stream or durable with its configuration."""
    workers = await two_workers(scene, "none")
    first = await scene.submit()
    await succeeded(scene, first)
    await until_pulls_wait(scene, len(workers))
    before = await config(scene, what)
    await api(scene, f"{api_name(scene, what)[0]}.DELETE.{api_name(scene, what)[1]}")
    deleted = time.monotonic()
    second = await submit_once_there_is_a_stream(scene)
    await succeeded(scene, second)
    await scene.until_empty()
    await dead_letter(scene)
    assert await config(scene, what) == before
    assert len(await scene.events(second)) == 1
    await assert_all_ready(scene, *workers)
    assert scene.runs() == [first, second]
    check_duration(f"{what} deleted: to next run", run_start(scene, second) - deleted)


@what_goes
async def test_stream_deleted_during_a_job(scene: Scene, what: str) -> None:
    """The job succeeds. A redelivered request does not run again."""
    worker = await scene.start("held_in_run")
    first = await scene.submit()
    await scene.until_noted("run")
    before = await config(scene, what)
    await api(scene, f"{api_name(scene, what)[0]}.DELETE.{api_name(scene, what)[1]}")
    await resume(scene, "run")
    ended = time.monotonic()
    assert (await succeeded(scene, first))["attempt"] == 1
    second = await submit_once_there_is_a_stream(scene)
    await succeeded(scene, second)
    await scene.until_empty()
    await dead_letter(scene)
    assert await config(scene, what) == before
    assert [len(await scene.events(one)) for one in (first, second)] == [1, 1]
    assert len(await scene.keys()) == 2
    await assert_all_ready(scene, worker)
    assert scene.runs() == [first, second]
    check_duration(
        f"{what} deleted in a run: its end to next run", run_start(scene, second) - ended
    )


async def test_dead_letters_stream_deleted_during_a_failing_job(scene: Scene) -> None:
    await scene.apply(CONSUMER_MAX_ATTEMPTS="1")
    worker = await scene.start("held_then_raises")
    request_id = await scene.submit()
    await scene.until_noted("run")
    await scene.sender.jetstream().delete_stream(scene.subjects.dead_letters_stream)
    await resume(scene, "run")
    event = await scene.event(request_id)
    assert event["failure"]["code"] == "model_error"
    await scene.until_empty()
    assert await letters(scene) == 1
    assert len(await scene.events(request_id)) == 1
    await assert_all_ready(scene, worker)
    assert scene.runs() == [request_id]


async def test_paused_durable_delivers_nothing_until_it_is_resumed(scene: Scene) -> None:
    worker = await scene.start("held_in_run", CONSUMER_WORKER=WORKER)
    first, second = await scene.submit(), await scene.submit()
    await scene.until_noted("run")
    await pause(scene, datetime.now(UTC) + timedelta(days=1))
    await resume(scene, "run")
    await succeeded(scene, first)

    async def settled() -> bool:
        return await scene.pending() == 1

    await scene.until(settled, "settlement of the first")
    before = await messages_sent(scene)
    await asyncio.sleep(PAUSE)
    assert scene.runs() == [first]
    assert await messages_sent(scene) - before <= MOST_MESSAGES
    await assert_all_ready(scene, worker)
    await pause(scene, None)
    resumed = time.monotonic()
    assert (await succeeded(scene, second))["attempt"] == 1
    await assert_queue_empty(scene, first, second)
    await assert_all_ready(scene, worker)
    assert scene.runs() == [first, second]
    check_duration("resumed to next run", run_start(scene, second) - resumed)


async def test_worker_waits_for_the_end_of_a_pause(scene: Scene) -> None:
    worker = await scene.start()
    await until_pulls_wait(scene, 1)
    ends, end = time.monotonic() + PAUSE, datetime.now(UTC) + timedelta(seconds=PAUSE)
    await pause(scene, end)
    request_id = await scene.submit()
    await succeeded(scene, request_id)
    await assert_queue_empty(scene, request_id)
    await assert_all_ready(scene, worker)
    assert scene.runs() == [request_id]
    assert run_start(scene, request_id) > ends - 0.05, "the server and the test use one clock"
    check_duration("end of a pause to next run", run_start(scene, request_id) - ends)


async def test_full_request_stream_refuses_and_accepts_again(scene: Scene, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    worker = await scene.start("held_in_run")
    full = {**await config(scene, "requests"), "max_msgs": 1}
    await api(scene, f"STREAM.UPDATE.{scene.subjects.requests_stream(scene.task)}", full)
    first = await scene.submit()
    await scene.until_noted("run")  # a request stays in the stream until it is settled
    with pytest.raises(APIError) as refused:
        await scene.submit()
    assert refused.value.err_code == QUEUE_FULL
    code, output = await command(scene, folder, "refused")
    assert (code, output) == (69, "consumer: the queue is full: try again later\n")
    await resume(scene, "run")
    await succeeded(scene, first)
    await scene.until_empty()

    second = await scene.submit()
    await succeeded(scene, second)
    await scene.until_empty()
    code, output = await command(scene, folder, "taken")
    assert code == 0, output
    assert files(folder) == ["taken.png"]
    await assert_queue_empty(scene, first, second, "taken")
    await assert_all_ready(scene, worker)
    assert scene.runs() == [first, second, "taken"]


async def test_full_results_stream_delays_the_result_and_readiness_reports_it(scene: Scene) -> None:
    worker = await scene.start("held_in_run")
    before = await config(scene, "results")
    name = api_name(scene, "results")[1]
    request_id = await scene.submit()
    await scene.until_noted("run")
    await api(scene, f"STREAM.UPDATE.{name}", {**before, "max_bytes": 100})
    await resume(scene, "run")

    async def stream_is_reported() -> bool:
        return "maximum bytes exceeded" in (await readiness(worker)).get("streams", "")

    await scene.until(stream_is_reported, "readiness that names the stream")
    assert await scene.events(request_id) == []
    await asyncio.sleep(2 * ACK_WAIT)
    assert scene.runs() == [request_id], "the worker renews the lease"
    await api(scene, f"STREAM.UPDATE.{name}", before)
    assert (await succeeded(scene, request_id))["attempt"] == 1
    assert (await readiness(worker))["streams"] == "ok"
    await assert_queue_empty(scene, request_id)
    await assert_all_ready(scene, worker)


# -- helpers --------------------------------------------------------------------------------------


def api_name(scene: Scene, what: str) -> tuple[str, str]:
    """Return the JetStream API type and the name of a stream or durable."""
    subjects = scene.subjects
    if what == "durable":
        return "CONSUMER", f"{subjects.requests_stream(scene.task)}.{scene.task}"
    return "STREAM", {
        "requests": subjects.requests_stream(scene.task),
        "results": subjects.results_stream,
        "dead letters": subjects.dead_letters_stream,
        "advisories": subjects.advisories_stream,
        "retries": subjects.retries_stream,
    }[what]


async def api(scene: Scene, subject: str, body: object = None) -> dict[str, Any]:
    """Call the JetStream API, and check that it returns no error."""
    payload = b"" if body is None else json.dumps(body).encode()
    answer = await scene.sender.request(f"$JS.API.{subject}", payload, timeout=5)
    value: dict[str, Any] = json.loads(answer.data)
    assert "error" not in value, value
    return value


async def config(scene: Scene, what: str) -> dict[str, Any]:
    """Return the configuration on the server."""
    kind, name = api_name(scene, what)
    found: dict[str, Any] = (await api(scene, f"{kind}.INFO.{name}"))["config"]
    return found


async def pause(scene: Scene, until: datetime | None) -> None:
    """Pause the durable, or resume it."""
    name = f"{scene.subjects.requests_stream(scene.task)}.{scene.task}"
    body = {} if until is None else {"pause_until": until.isoformat()}
    answer = await api(scene, f"CONSUMER.PAUSE.{name}", body)
    assert answer.get("paused", False) is (until is not None)


async def submit_once_there_is_a_stream(scene: Scene) -> str:
    """Publish a request repeatedly until it is stored."""
    accepted: list[str] = []

    async def stored() -> bool:
        try:
            accepted.append(await scene.submit())
        except NoStreamResponseError:
            return False
        return True

    await scene.until(stored, "request stream")
    return accepted[0]


async def letters(scene: Scene) -> int:
    """Return the number of stored dead letters."""
    info = await scene.sender.jetstream().stream_info(scene.subjects.dead_letters_stream)
    return int(info.state.messages)


async def dead_letter(scene: Scene) -> None:
    """Send an invalid request, and check that it is dead-lettered and the queue is empty."""
    await scene.publish(b"no request")
    await scene.until_empty()
    assert await letters(scene) == 1


async def readiness(worker: Daemon) -> dict[str, str]:
    """Return the conditions of /readyz."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{worker.probes_url}/readyz") as response,
    ):
        conditions: dict[str, str] = await response.json()
        return conditions


async def messages_sent(scene: Scene) -> int:
    """Return the number of messages that the worker has sent over its connection."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{scene.stack.nats.monitoring_url}/connz") as response,
    ):
        connections = (await response.json())["connections"]
    (sent,) = (
        connection["in_msgs"]
        for connection in connections
        if connection.get("name") == f"generation {WORKER}"
    )
    return int(sent)


def files(folder: Path) -> list[str]:
    """Return the names of the files that a command has saved."""
    return [file.name for file in folder.iterdir()]


async def command(scene: Scene, folder: Path, request_id: str) -> tuple[int, str]:
    """Run `consumer request`, and return its exit code and its standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "consumer", "request", "text-to-image", "a"),
        *("--id", request_id, "--output", str(folder)),
        env={
            **os.environ,
            **scene.settings(),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'contracts'}",
        },
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, output = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()
