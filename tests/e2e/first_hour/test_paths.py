"""The programs and commands of docs/paths run on a running system."""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nats.aio.client import Client

from consumer.devstack import DevStack
from tests.e2e.senders import WITHIN, needs_nats_and_jq, new_id
from tests.support.content_credentials import PAGE, commands_of_the_page

PATHS = Path(__file__).parents[3] / "docs/paths"
COLLECTOR = (PATHS / "collect-results.md").read_text("utf-8")
BUILD_WITHIN = 150.0  # seconds to fetch and to build what a program needs
NPM = "npm install --no-fund --no-audit --ignore-scripts --no-package-lock --silent"
PACKAGES = {"@nats-io/transport-node": "^3.4.0"}
GO_MODULE = "github.com/nats-io/nats.go@v1.55.0"


def example(language: str, page: str = "senders.md") -> str:
    code, *_ = re.findall(
        rf"^```{language}\n(.*?)^```", (PATHS / page).read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    return code


def needs(variable: str, *programs: str) -> None:
    """Skip the test without the programs, or fail where the environment requires them."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing and os.environ.get(variable):
        pytest.fail(f"{missing} needed")
    if missing:
        pytest.skip(f"no {missing}")


def run(
    system: DevStack, folder: Path, *command: str, within: float = WITHIN
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **system.environment()},
        capture_output=True,
        text=True,
        timeout=within,
        check=False,
    )


def assert_sends(system: DevStack, folder: Path, *command: str) -> None:
    """Run a sender twice with two prompts, then with an invalid prompt."""
    for prompt in ("a red circle", 'a "blue" {{ID}} heart'):
        done = run(system, folder, *command, prompt, within=BUILD_WITHIN)
        assert done.returncode == 0, done.stderr
        image = folder / "image.png"
        assert image.read_bytes().startswith(b"\x89PNG")
        image.unlink()
    assert run(system, folder, *command, "").returncode != 0
    assert not (folder / "image.png").exists()


@needs_nats_and_jq
def test_the_sender_in_bash_runs(system: DevStack, tmp_path: Path) -> None:
    (tmp_path / "send.sh").write_text(example("bash"))
    assert_sends(system, tmp_path, "bash", "send.sh")


def test_the_sender_in_python_runs(system: DevStack, tmp_path: Path) -> None:
    (tmp_path / "send.py").write_text(example("python"))
    assert_sends(system, tmp_path, sys.executable, "send.py")


def test_the_sender_in_node_runs(system: DevStack, tmp_path: Path) -> None:
    needs("NODE_REQUIRED", "npm", "node")
    (tmp_path / "package.json").write_text(json.dumps({"dependencies": PACKAGES}))
    (tmp_path / "send.mjs").write_text(example("javascript"))
    installed = run(system, tmp_path, *NPM.split(), within=BUILD_WITHIN)
    assert installed.returncode == 0, installed.stderr
    assert_sends(system, tmp_path, "node", "send.mjs")


def test_the_sender_in_go_runs(system: DevStack, tmp_path: Path) -> None:
    needs("GO_REQUIRED", "go")
    (tmp_path / "main.go").write_text(example("go"))
    for arguments in ("mod init send", f"get {GO_MODULE}", "build -o send ."):
        done = run(system, tmp_path, "go", *arguments.split(), within=BUILD_WITHIN)
        assert done.returncode == 0, done.stderr
    assert_sends(system, tmp_path, "./send")


@needs_nats_and_jq
async def test_the_collector_receives_every_result(
    system: DevStack, sender: Client, tmp_path: Path
) -> None:
    """The commands of the page, one after the other, then its program."""
    commands = re.findall(r"^\$ (.*?)(?=^\$ |^```)", COLLECTOR, re.MULTILINE | re.DOTALL)
    create, *publish, following = commands
    script = ["set -euo pipefail", create, *publish, following, *publish, "echo $id"]
    try:
        done = await asyncio.to_thread(run, system, tmp_path, "bash", "-c", "\n".join(script))
        assert done.returncode == 0, done.stderr
        (first,) = (line for line in done.stdout.splitlines() if '"type"' in line)
        assert json.loads(first)["metadata"] == {"order": "4711"}
        second = done.stdout.split()[-1]
        collector = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", example("python", "collect-results.md")),
            env={**os.environ, **system.environment()},
            stdout=asyncio.subprocess.PIPE,
        )
        assert collector.stdout is not None
        line = (await asyncio.wait_for(collector.stdout.readline(), WITHIN)).decode()
        collector.terminate()
        await collector.wait()
        assert line.startswith(f"generation.v1.succeeded {second} {{'order': '4711'}} [")
    finally:
        await sender.jetstream().delete_consumer("GENERATION_RESULTS", "collector")


def test_the_fastapi_service_runs(
    system: DevStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastapi.testclient import TestClient  # noqa: PLC0415 - an extra

    monkeypatch.setenv("NATS_URL", system.nats.url)
    service: dict[str, object] = {}
    exec(compile(example("python", "replace-a-fastapi-queue.md"), "service", "exec"), service)  # noqa: S102
    with TestClient(service["app"]) as client:
        job = client.post("/images", json={"prompt": "a red circle"}).json()["id"]
        unknown = client.get(f"/images/{new_id()}").json()
        assert unknown == {"state": "waiting or running"}
        client.portal.call(service["app"].state.client.result, "text_to_image", job)
        ended = client.get(f"/images/{job}").json()
        assert (ended["state"], len(ended["images"])) == ("succeeded", 1)
        assert client.delete(f"/images/{job}").json() == {"status": "finished"}
        assert client.post("/images", json={"prompt": " "}).status_code == 422
        assert client.get("/images/a.b").status_code == 404


def test_the_tutorial_of_content_credentials_runs(system: DevStack, tmp_path: Path) -> None:
    install, activate, *commands = commands_of_the_page()
    assert (install.split()[:2], activate.split()[0]) == (["uv", "sync"], ".")
    (tmp_path / "verify.py").write_text(example("python", PAGE.name))
    bin_folder = Path(sys.executable).parent
    script = ["set -e", f"PATH={shlex.quote(str(bin_folder))}:$PATH", *commands]
    done = run(system, tmp_path, "bash", "-c", "\n".join(script), within=BUILD_WITHIN)
    assert done.returncode == 0, done.stderr
    checked = (
        "ok   c2pa: Es256 by Example signer, Example, without a time stamp; signed and verified"
    )
    assert checked in done.stdout
    assert checked in PAGE.read_text("utf-8")
    verified = done.stdout.splitlines()
    at = verified.index("Trusted")
    signature, *assertions = json.loads("\n".join(verified[at + 1 :]))
    assert signature["common_name"] == "Example signer"
    assert [one["label"] for one in assertions] == [
        "c2pa.actions.v2",
        "generation_consumer.generation",
    ]
