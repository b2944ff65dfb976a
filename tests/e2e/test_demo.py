"""`consumer demo` and `consumer up`: results, and complete cleanup."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest
from PIL import Image

from tests.e2e.senders import WITHIN

DEMO = [sys.executable, "-m", "consumer", "demo", "a red circle on a blue background"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A working folder and a folder for temporary files."""
    work, temporary = tmp_path / "work", tmp_path / "tmp"
    work.mkdir()
    temporary.mkdir()
    return work, temporary


def environment(temporary: Path) -> dict[str, str]:
    """Return an environment with settings of other servers, which must have no effect."""
    return {
        **os.environ,
        "TMPDIR": str(temporary),
        "NATS_CREDS": "/no/such/file",
        "S3_PREFIX": "elsewhere",
        "MODEL_TYPE": "image_to_text",
        "CONSUMER_NAME": "mine",
        "GATEWAY_HOST": "0.0.0.0",  # noqa: S104 - must have no effect
        "GATEWAY_TLS_CERT": "/no/such/file",
    }


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of running processes that refer to a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            names = line + (process / "environ").read_bytes().decode(errors="replace")
        except OSError:  # the process has ended
            continue
        if str(folder) in names:
            found.append(line)
    return found


def test_demo_draws_saves_and_describes_an_image(folders: tuple[Path, Path]) -> None:
    work, temporary = folders
    done = subprocess.run(
        DEMO,
        cwd=work,
        env=environment(temporary),
        capture_output=True,
        text=True,
        timeout=2 * WITHIN,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    drawn, described = [json.loads(line) for line in done.stdout.splitlines()]
    assert drawn["type"] == described["type"] == "generation.v1.succeeded"
    # tests/integration/test_demonstration.py measures how many descriptions are correct.
    assert re.fullmatch(r"An? .+ on an? [a-z]+ background.*\.", described["outputs"][0]["text"])
    (file,) = work.glob("demo-*.png")
    with Image.open(file) as image:
        assert image.size == (64, 64)
    assert str(file.name) in done.stderr
    assert re.search(r"^HTTP on http://127\.0\.0\.1:\d+$", done.stderr, re.MULTILINE)
    assert_nothing_left(temporary)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("nats-server on", signal.SIGINT),
        ("nats-server on", signal.SIGTERM),
        ("loading the models", signal.SIGINT),
        ("loading the models", signal.SIGTERM),
    ],
)
def test_an_interrupted_demo_cleans_up(
    folders: tuple[Path, Path], moment: str, number: signal.Signals
) -> None:
    work, temporary = folders
    with started(DEMO, work, temporary) as process:
        read_until(process, moment)
        process.send_signal(number)
        assert process.wait(WITHIN) == 130
    assert_nothing_left(temporary)


@pytest.mark.parametrize("command", ["up", "demo"])
def test_a_wrong_setting_ends_the_command_before_anything_starts(
    folders: tuple[Path, Path], command: str
) -> None:
    work, temporary = folders
    done = subprocess.run(
        [sys.executable, "-m", "consumer", command],
        cwd=work,
        env={**environment(temporary), "MODEL_DTYPE": "nonsense"},
        capture_output=True,
        text=True,
        timeout=2 * WITHIN,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("consumer: MODEL_DTYPE: ")
    assert_nothing_left(temporary)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([""], "prompt: String should have at least 1 character"),
        (["   "], "prompt: "),
        (["x" * 8_001], "prompt: String should have at most 8000 characters"),
        (["a red circle", "--question", ""], "--question: String should have at least 1 character"),
    ],
    ids=["empty prompt", "blanks", "long prompt", "empty question"],
)
def test_a_wrong_prompt_is_refused_in_one_line_before_anything_starts(
    folders: tuple[Path, Path], arguments: list[str], reason: str
) -> None:
    work, temporary = folders
    done = subprocess.run(
        [*DEMO[:-1], *arguments],
        cwd=work,
        env=environment(temporary),
        capture_output=True,
        text=True,
        timeout=WITHIN,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"consumer: {reason}")
    assert len(line) < 200


def test_ctrl_c_during_the_imports_ends_the_command_without_a_message(
    folders: tuple[Path, Path],
) -> None:
    # The file is read during the imports of `check`; a pipe without a writer makes them wait.
    work, temporary = folders
    settings = work / "settings.toml"
    os.mkfifo(settings)
    command = [sys.executable, "-m", "consumer", "check", "--config", str(settings)]
    with started(command, work, temporary) as process:
        with settings.open("w"):  # returns when the command reads the file
            process.send_signal(signal.SIGINT)
            process.wait(WITHIN)
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.returncode == -signal.SIGINT  # a shell reports 130


@pytest.mark.parametrize("command", ["up", "demo"])
def test_the_end_of_a_server_ends_the_command_with_the_name_the_code_and_the_log(
    folders: tuple[Path, Path], command: str
) -> None:
    work, temporary = folders
    with started([sys.executable, "-m", "consumer", command], work, temporary) as process:
        read_until(process, "loading the models")
        (server,) = children_of(process.pid, "nats-server")
        os.kill(server, signal.SIGKILL)
        (*_, message) = read_until(process, "nats-server ended by itself")
        assert "nats-server ended by itself with code -9 (SIGKILL); the end of its log " in message
        assert "nats.log" in message
        assert process.stderr is not None
        rest = process.stderr.read()
        assert process.wait(WITHIN) == 70
    assert "Server is ready" in rest
    assert "Traceback" not in rest
    assert not processes_of(temporary)


def children_of(parent: int, program: str) -> list[int]:
    """Return the process ids of the children of a process that run a program."""
    found = []
    for child in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in child.read_text().split():
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if Path(line[0].decode()).name == program:
                found.append(int(pid))
    return found


def test_up_reuses_its_ports_and_stops_at_sigterm(
    folders: tuple[Path, Path], threads: ThreadPoolExecutor
) -> None:
    work, temporary = folders
    addresses = []
    waiting: Future[httpx.Response] | None = None
    # The second start need not wait for the models.
    for last_text in ("publish --jetstream", "nats-server on"):
        with started([sys.executable, "-m", "consumer", "up"], work, temporary) as process:
            lines = read_until(process, last_text)
            first = lines[0]
            if len(lines) > 1:
                waiting = start_jobs_over_http("".join(lines), threads)
            address = first.removeprefix("nats-server on ").partition(",")[0]
            addresses.append(address)
            process.send_signal(signal.SIGTERM)
            assert process.wait(WITHIN) == 0
        if waiting is not None:  # an answer, also of a job that no worker has run
            answer = waiting.result(WITHIN)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "gateway_stopping"
            waiting = None
        host, port = address.removeprefix("nats://").split(":")
        with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port))):
            pass
    assert addresses[0] == addresses[1]
    assert (work / ".consumer" / "devstack.json").stat().st_mode & 0o777 == 0o600
    assert not processes_of(temporary)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def start_jobs_over_http(output: str, threads: ThreadPoolExecutor) -> Future[httpx.Response]:
    """Start two jobs at the gateway address in the output of `up`, of which the first is long.

    Returns:
        The response to the second one, which is queued.
    """
    (page,) = re.findall(r"HTTP +(http://127\.0\.0\.1:\d+) ", output)
    with httpx.Client(base_url=page) as http:
        models = http.get("/v1/models").json()["data"]
        assert [model["tasks"] for model in models] == [["text_to_image", "image_to_text"]]
        request = {"task": "text_to_image", "prompt": "a", "num_inference_steps": 200}
        job = http.post("/v1/jobs", json=request).raise_for_status().json()["id"]
        with http.stream("GET", f"/v1/jobs/{job}/events", timeout=WITHIN) as events:
            assert any("generation.v1.progress" in line for line in events.iter_lines())
        path, body = "/v1/images/generations", {"prompt": "a red circle"}
        waiting = threads.submit(httpx.post, f"{page}{path}", json=body, timeout=2 * WITHIN)
        while len(http.get("/v1/jobs").json()["data"]) < 2:
            assert not waiting.done()
            time.sleep(0.05)  # no event reports a queued job
        return waiting


@contextmanager
def started(command: list[str], work: Path, temporary: Path) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        command,
        cwd=work,
        env={**environment(temporary), "CONSUMER_DRAIN_GRACE": "0.5"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: "subprocess.Popen[str]", text: str) -> list[str]:
    """Read lines until a line contains a text; return them."""
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} not found in:\n{''.join(lines)}")


def assert_nothing_left(temporary: Path) -> None:
    assert not processes_of(temporary)
    assert list(temporary.iterdir()) == []
