"""`consumer demo` and `consumer up` as a person runs them, and what they leave behind: nothing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
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
    """Of a person who works with other servers: none of that may matter."""
    return {
        **os.environ,
        "TMPDIR": str(temporary),
        "NATS_CREDS": "/no/such/file",
        "S3_PREFIX": "elsewhere",
        "MODEL_TYPE": "image_to_text",
        "CONSUMER_NAME": "mine",
        "GATEWAY_HOST": "0.0.0.0",  # noqa: S104 - it must not matter
        "GATEWAY_TLS_CERT": "/no/such/file",
    }


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that have to do with a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            names = line + (process / "environ").read_bytes().decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if str(folder) in names:
            found.append(line)
    return found


def test_demo_draws_saves_and_describes(folders: tuple[Path, Path]) -> None:
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
    # How often it is the right one, tests/integration/test_demonstration.py says.
    assert re.fullmatch(r"An? .+ on an? [a-z]+ background.*\.", described["outputs"][0]["text"])
    (file,) = work.glob("demo-*.png")
    with Image.open(file) as picture:
        assert picture.size == (64, 64)
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
def test_demo_interrupted_leaves_nothing(
    folders: tuple[Path, Path], moment: str, number: signal.Signals
) -> None:
    work, temporary = folders
    with started(DEMO, work, temporary) as process:
        read_until(process, moment)
        process.send_signal(number)
        assert process.wait(WITHIN) == 130
    assert_nothing_left(temporary)


def test_demo_that_fails_says_why_and_leaves_nothing(folders: tuple[Path, Path]) -> None:
    work, temporary = folders
    done = subprocess.run(
        DEMO,
        cwd=work,
        env={**environment(temporary), "MODEL_DTYPE": "nonsense"},
        capture_output=True,
        text=True,
        timeout=2 * WITHIN,
        check=False,
    )
    assert done.returncode == 69
    assert "consumer: MODEL_DTYPE: " in done.stderr
    assert "Traceback" not in done.stderr
    assert_nothing_left(temporary)


def test_up_keeps_its_ports_and_stops_at_sigterm(folders: tuple[Path, Path]) -> None:
    work, temporary = folders
    addresses = []
    # The second time there is no need to wait for the models.
    for last_words in ("publish --jetstream", "nats-server on"):
        with started([sys.executable, "-m", "consumer", "up"], work, temporary) as process:
            shown = read_until(process, last_words)
            first = shown[0]
            if len(shown) > 1:
                run_a_job_over_http("".join(shown))
            address = first.removeprefix("nats-server on ").partition(",")[0]
            addresses.append(address)
            process.send_signal(signal.SIGTERM)
            assert process.wait(WITHIN) == 0
        host, port = address.removeprefix("nats://").split(":")
        with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port))):
            pass
    assert addresses[0] == addresses[1]
    assert (work / ".consumer" / "devstack.json").stat().st_mode & 0o777 == 0o600
    assert not processes_of(temporary)


def run_a_job_over_http(shown: str) -> None:
    """Start a long job at the address that `up` has printed, and return while it runs."""
    (page,) = re.findall(r"HTTP +(http://127\.0\.0\.1:\d+) ", shown)
    with httpx.Client(base_url=page) as http:
        models = http.get("/v1/models").json()["data"]
        assert [model["tasks"] for model in models] == [["text_to_image", "image_to_text"]]
        request = {"task": "text_to_image", "prompt": "a", "num_inference_steps": 200}
        job = http.post("/v1/jobs", json=request).raise_for_status().json()["id"]
        with http.stream("GET", f"/v1/jobs/{job}/events", timeout=WITHIN) as events:
            assert any("generation.v1.progress" in line for line in events.iter_lines())


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


def read_until(process: "subprocess.Popen[str]", words: str) -> list[str]:
    """What is shown, up to the line with these words."""
    assert process.stderr is not None
    shown: list[str] = []
    for line in process.stderr:
        shown.append(line)
        if words in line:
            return shown
    raise AssertionError(f"{words!r} was never shown:\n{''.join(shown)}")


def assert_nothing_left(temporary: Path) -> None:
    assert not processes_of(temporary)
    assert list(temporary.iterdir()) == []
