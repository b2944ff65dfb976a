"""The commands in a shell: output, exit codes and imports."""

import asyncio
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nats
import pytest
from PIL import Image

from consumer.app.apply import apply
from consumer.devstack import DevStack, StartFailedError, free_ports
from consumer.ports.store import StoreUnavailable
from consumer.settings import Settings
from tests.e2e.senders import run_consumer


@pytest.fixture
def settings(system: DevStack) -> dict[str, str]:
    return system.environment()


def test_request_saves_the_image(settings: dict[str, str], tmp_path: Path) -> None:
    done = run_consumer(
        *("request", "text-to-image", "a circle", "--steps", "2", "--id", "shell-1"),
        folder=tmp_path,
        **settings,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "saved shell-1.png\n"
    assert (tmp_path / "shell-1.png").read_bytes().startswith(b"\x89PNG")


def test_request_accepts_a_file_and_prints_json(settings: dict[str, str], tmp_path: Path) -> None:
    run_consumer(
        *("request", "text-to-image", "a", "--steps", "1", "--id", "shell-2"),
        folder=tmp_path,
        **settings,
    )
    done = run_consumer(
        *("request", "image-to-text", "shell-2.png", "What?", "--max-new-tokens", "3", "--json"),
        folder=tmp_path,
        **settings,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"][0]["completion_tokens"] <= 3
    assert done.stderr == ""


def test_a_failed_request_exits_with_1_and_the_reason(settings: dict[str, str]) -> None:
    done = run_consumer("request", "text-to-image", "a", "--width", "65", **settings)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("failed: unsupported_parameter: width: ")


def test_a_photo_of_12_megapixels_is_described(settings: dict[str, str], tmp_path: Path) -> None:
    noise = os.urandom(4000 * 3000)
    Image.frombytes("L", (4000, 3000), noise).save(tmp_path / "photo.jpg", quality=70)
    assert (tmp_path / "photo.jpg").stat().st_size > 4_000_000
    for how in ((), ("--upload",)):
        done = run_consumer(
            *("request", "image-to-text", "photo.jpg", "What?", "--max-new-tokens", "3", *how),
            folder=tmp_path,
            **settings,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_an_uploaded_file_can_be_described(settings: dict[str, str], tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    done = run_consumer("upload", "red.png", folder=tmp_path, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("s3://generation/uploads/")
    described = run_consumer(
        *("request", "image-to-text", done.stdout.strip(), "What?", "--max-new-tokens", "3"),
        folder=tmp_path,
        **settings,
    )
    assert described.returncode == 0, described.stderr
    (tmp_path / "notes.txt").write_text("no image")
    refused = run_consumer("upload", "notes.txt", folder=tmp_path, **settings)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "consumer: images: not a PNG, JPEG or WebP file\n"


def test_a_request_reports_its_id_and_the_missing_worker(settings: dict[str, str]) -> None:
    """Ctrl-C prints how to cancel the request and how to get its result."""
    root = {"CONSUMER_SUBJECT_ROOT": "without-workers"}
    assert run_consumer("apply", **settings, **root).returncode == 0
    waiting = subprocess.Popen(
        [sys.executable, "-m", "consumer", "request", "text-to-image", "a", "--id", "lonely"],
        env={**os.environ, **settings, **root},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    assert waiting.stderr.readline() == (
        "request lonely: stored in the queue, waiting for a worker\n"
    )
    waiting.send_signal(signal.SIGINT)
    _, rest = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert "consumer cancel lonely" in rest
    assert "--id lonely" in rest
    assert rest.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("request", "text-to-image", "a", "--steps", "1000"), "num_inference_steps: "),
        (("request", "image-to-text", "no-such-file.png", "What?"), "no-such-file.png: No such"),
        (("run",), "MODEL_TYPE: "),
        (("run", "--config", "no-such-file.toml"), "no-such-file.toml: No such"),
        (("check",), "MODEL_TYPE: "),
    ],
)
def test_wrong_usage_exits_with_2_and_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run_consumer(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"consumer: {message}")
    assert done.stderr.count("\n") == 1


KEYS = {"S3_ACCESS_KEY": "a-key", "S3_SECRET_KEY": "a-key"}


@pytest.mark.parametrize(
    "arguments", [("request", "text-to-image", "a"), ("apply",)], ids=["request", "apply"]
)
def test_a_missing_server_exits_with_69_and_one_line(arguments: tuple[str, ...]) -> None:
    (port,) = free_ports(1)
    done = run_consumer(*arguments, NATS_URL=f"nats://someone:secret@127.0.0.1:{port}", **KEYS)
    assert done.returncode == 69
    address = f"nats://127.0.0.1:{port}"
    assert done.stderr == f"consumer: NATS: cannot connect to {address}: Connection refused\n"
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


def test_apply_names_the_store_that_does_not_answer(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumer.app.apply.API_WITHIN", 1.0)
    monkeypatch.setattr("consumer.app.apply.SILENT_FOR", 0.1)
    (port,) = free_ports(1)
    environment = {**settings, "CONSUMER_ACK_WAIT": "5", "S3_ENDPOINT": f"http://127.0.0.1:{port}"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    reported: list[str] = []
    with pytest.raises(StoreUnavailable) as refused:
        asyncio.run(apply(Settings.load(), reported.append))
    assert reported == [f"waiting for S3 at http://127.0.0.1:{port}"]
    assert str(refused.value) == f"S3 at http://127.0.0.1:{port}: no connection"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("apply",), "consumer: NATS: nats://{server} has version 2.11.9; 2.12 or newer is needed"),
        (("check",), "FAIL nats: nats://{server} has version 2.11.9; 2.12 or newer is needed"),
        (("run",), '"NATS: nats://{server} has version 2.11.9; 2.12 or newer is needed"'),
    ],
    ids=["apply", "check", "run"],
)
def test_a_server_that_is_too_old_exits_with_69(command: tuple[str, ...], said: str) -> None:
    (port,) = free_ports(1)
    with old_server("2.11.9") as server:
        done = run_consumer(
            *command,
            NATS_URL=f"nats://{server}",
            MODEL_TYPE="text_to_image",
            # Not the setting of a store: the command ends at the first service.
            S3_ENDPOINT=f"http://127.0.0.1:{port}",
            **KEYS,
        )
    assert done.returncode == 69, done.stderr
    assert said.format(server=server) in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def old_server(version: str) -> Iterator[str]:
    """Run the first lines of a NATS server of a version; yield its host and port."""

    class Greets(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            greeting = {"server_id": "old", "version": version, "max_payload": 2**20}
            self.wfile.write(f"INFO {json.dumps({**greeting, 'headers': True})}\r\n".encode())
            for line in self.rfile:
                if line.startswith(b"PING"):
                    self.wfile.write(b"PONG\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greets) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_check_tests_all_services_and_hides_the_secret(settings: dict[str, str]) -> None:
    done = run_consumer("check", MODEL_TYPE="text_to_image", CONSUMER_ACK_WAIT="5", **settings)
    assert done.returncode == 0, done.stdout
    assert [line[:4] for line in done.stdout.splitlines()[-3:]] == ["ok  "] * 3
    assert "S3_SECRET_KEY=" in done.stdout
    assert settings["S3_SECRET_KEY"] not in done.stdout + done.stderr


def test_check_with_a_wrong_secret_exits_with_69(settings: dict[str, str]) -> None:
    done = run_consumer(
        "check", **{**settings, "MODEL_TYPE": "text_to_image", "S3_SECRET_KEY": "wrong-one"}
    )
    assert done.returncode == 69
    assert "FAIL s3: " in done.stdout
    assert "wrong-one" not in done.stdout + done.stderr


def test_a_second_apply_changes_nothing(settings: dict[str, str]) -> None:
    done = run_consumer("apply", CONSUMER_ACK_WAIT="5", **settings)
    assert done.returncode == 0, done.stderr
    assert {line.rsplit(": ", 1)[1] for line in done.stdout.splitlines()} == {"unchanged"}


def test_apply_sets_max_ack_pending_for_the_replicas(settings: dict[str, str]) -> None:
    base = {"CONSUMER_ACK_WAIT": "5", **settings}
    for arguments, more, expected in (
        (("--replicas", "4"), {}, 4),
        (("--replicas", "4"), {"CONSUMER_JOBS_IN_FLIGHT": "3"}, 12),
        ((), {}, 1),
    ):
        assert run_consumer("apply", *arguments, **base, **more).returncode == 0
        assert max_ack_pending(settings["NATS_URL"]) == expected


def max_ack_pending(url: str) -> int | None:
    """Return the max_ack_pending of the durable consumer of text_to_image."""

    async def fetch() -> int | None:
        client = await nats.connect(url)
        try:
            stream = "GENERATION_REQUESTS_TEXT_TO_IMAGE"
            info = await client.jetstream().consumer_info(stream, "text_to_image")
            return info.config.max_ack_pending
        finally:
            await client.close()

    return asyncio.run(fetch())


def test_apply_with_one_durable_for_two_tasks_is_refused(settings: dict[str, str]) -> None:
    done = run_consumer("apply", **{**settings, "CONSUMER_NAME": "mine"})
    assert done.returncode == 2
    assert done.stderr.startswith("consumer: CONSUMER_NAME: ")


def test_request_with_json_output_saves_no_file(settings: dict[str, str], tmp_path: Path) -> None:
    command = ("request", "text-to-image", "a", "--steps", "1", "--json")
    done = run_consumer(*command, folder=tmp_path, **settings)
    assert json.loads(done.stdout)["type"] == "generation.v1.succeeded"
    assert list(tmp_path.iterdir()) == []


def test_an_id_of_another_request_is_an_error(settings: dict[str, str]) -> None:
    command = ("request", "text-to-image", "--steps", "1", "--id", "shell-3", "--json")
    assert run_consumer(*command, "one", **settings).returncode == 0
    assert run_consumer(*command, "one", **settings).returncode == 0
    other = run_consumer(*command, "another", **settings)
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr == (
        "consumer: the id shell-3 belongs to another request; this one needs a new id\n"
    )


def test_a_request_without_a_worker_ends_at_its_deadline(settings: dict[str, str]) -> None:
    environment = {**settings, "CONSUMER_SUBJECT_ROOT": "alone"}
    assert run_consumer("apply", **environment).returncode == 0
    done = run_consumer("request", "text-to-image", "a", "--deadline", "0.1", **environment)
    assert done.returncode == 69
    assert done.stderr.endswith("consumer: no result by the deadline\n")


@pytest.mark.parametrize("setting", ["S3_BUCKET=no-such-bucket", "S3_SECRET_KEY=wrong-one"])
def test_a_daemon_without_a_usable_store_does_not_start(
    settings: dict[str, str], setting: str
) -> None:
    name, _, value = setting.partition("=")
    done = run_consumer("run", **{**settings, "MODEL_TYPE": "text_to_image", name: value})
    assert done.returncode == 69
    last = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert "service_unavailable" in {line["event"] for line in last}
    assert "wrong-one" not in done.stderr


def test_an_unloadable_model_exits_with_70_and_processes_no_request(
    system: DevStack, tmp_path: Path
) -> None:
    settings = {"MODEL_ID": str(tmp_path), "CONSUMER_SUBJECT_ROOT": "unloaded"}
    daemon = system.start_daemon("unloaded", {"MODEL_TYPE": "text_to_image", **settings})
    with pytest.raises(StartFailedError):
        daemon.wait_ready()
    assert daemon.returncode == 70
    log = daemon.log_since_start()
    assert '"event": "model_unavailable"' in log
    assert "job_started" not in log


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full does not exist")
def test_a_failed_write_of_the_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "consumer", "schema"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("seconds", ["nan", "0", "-1", "inf"])
def test_an_invalid_deadline_is_refused(seconds: str) -> None:
    done = run_consumer("request", "text-to-image", "a", "--deadline", seconds)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_schema_prints_json() -> None:
    assert json.loads(run_consumer("schema").stdout)["asyncapi"] == "3.0.0"
    assert "TextToImageRequest" in json.loads(run_consumer("schema", "--json-schema").stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["request", "text-to-image", "--help"],
        ["dead-letters", "replay", "--help"],
    ],
)
def test_help_imports_no_model_library(arguments: list[str]) -> None:
    run = "import sys; from consumer.app.cli import cli; cli(sys.argv[1:], standalone_mode=False)"
    report = (
        "; print('HEAVY', sorted({'torch', 'diffusers', 'nats', 'minio'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", run + report, *arguments],
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    )
    assert done.stdout.endswith("HEAVY []\n")


def test_request_imports_no_torch(settings: dict[str, str]) -> None:
    code = """
import sys
from consumer.app.cli import cli
try:
    cli(["request", "text-to-image", "a", "--steps", "1", "--json"])
except SystemExit as ended:
    print(ended.code, sorted({"torch", "diffusers", "transformers", "minio"} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 []"
