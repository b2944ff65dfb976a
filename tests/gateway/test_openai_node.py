"""openai-node as a client of the real gateway; needs node and npm."""

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from consumer.devstack import GatewayServer
from consumer.gateway import bounds as bounds_module
from consumer.gateway.keys import KeyFile
from consumer.gateway.tenants import Bounds
from generation_client import GenerationClient
from generation_contracts import CancelledEvent, Task
from tests.gateway.images import data_url, decoded, red_circle
from tests.gateway.open_jobs import settings_of
from tests.gateway.serving import serving
from tests.support.scene import Scene

SOURCES = Path(__file__).parent / "node"
WITHIN = 120.0  # seconds for the whole script
DESCRIPTION = "A red circle on a blue background in the center."
BOUNDS = {"free": Bounds(), "bound": Bounds(per_minute=1)}
INSTALL = "npm install --no-fund --no-audit --ignore-scripts --no-package-lock --silent"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts and openai-node."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        if os.environ.get("NODE_REQUIRED"):
            pytest.fail("node and npm are needed")
        pytest.skip("no node, no npm")
    folder = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(SOURCES, folder)
    subprocess.run(INSTALL.split(), cwd=folder, check=True, timeout=WITHIN)
    return folder


@pytest.fixture(scope="module")
def found(client: Path, gateway: GatewayServer) -> dict[str, Any]:
    """The output of the script."""
    image = data_url(red_circle())
    run = subprocess.run(
        ["node", "client.mjs", f"{gateway.url}/v1", image],
        cwd=client,
        capture_output=True,
        text=True,
        timeout=WITHIN,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    value: dict[str, Any] = json.loads(run.stdout)
    return value


def test_models_are_listed(found: dict[str, Any]) -> None:
    assert found["models"] == ["demonstration"]


def test_an_image_is_generated(found: dict[str, Any]) -> None:
    assert decoded(found["image"]["data"][0]["b64_json"]).size == (64, 64)
    assert found["image"]["size"] == "64x64"


def test_images_are_streamed(found: dict[str, Any]) -> None:
    *previews, completed = found["imageEvents"]
    assert 1 <= len(previews) <= 2
    assert {event["type"] for event in previews} == {"image_generation.partial_image"}
    assert [event["partial_image_index"] for event in previews] == list(range(len(previews)))
    assert decoded(previews[0]["b64_json"]).format == "JPEG"
    assert completed["type"] == "image_generation.completed"
    assert decoded(completed["b64_json"]).format == "PNG"


def test_a_question_gets_an_answer(found: dict[str, Any]) -> None:
    choice = found["chat"]["choices"][0]
    assert choice["message"]["content"] == DESCRIPTION
    assert choice["finish_reason"] == "stop"


def test_a_text_is_streamed(found: dict[str, Any]) -> None:
    *parts, last, usage = found["chunks"]
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == (
        DESCRIPTION
    )
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["total_tokens"] > 0
    assert found["streamed"] == DESCRIPTION


@pytest.mark.parametrize(
    ("name", "param"), [("imageError", "quality"), ("editError", "image"), ("chatError", "n")]
)
def test_errors_have_their_exception_types(found: dict[str, Any], name: str, param: str) -> None:
    assert found[name] == {
        "name": "BadRequestError",
        "status": 400,
        "code": "unsupported_parameter",
        "param": param,
        "type": "invalid_request_error",
    }


async def test_closing_a_stream_cancels_the_request(
    found: dict[str, Any], behind: GenerationClient
) -> None:
    async with asyncio.timeout(WITHIN):
        result = await behind.result(Task.TEXT_TO_IMAGE, found["disconnected"])
    assert isinstance(result, CancelledEvent)


async def test_the_library_retries_retryable_errors_only(
    scene: Scene, client: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds_module, "MINUTE", 2.0)
    file = KeyFile(tmp_path / "keys.json")
    keys = [file.add(name, bounds).text for name, bounds in BOUNDS.items()]
    await scene.start("raises_on_demand")
    storeless = settings_of(
        scene,
        GATEWAY_KEYS=file.path,
        S3_ENDPOINT="http://127.0.0.1:9",
        S3_PUBLIC_ENDPOINT=scene.stack.store.endpoint,
    )
    async with (
        serving(settings_of(scene, GATEWAY_KEYS=file.path)) as url,
        serving(storeless) as storeless_url,
    ):
        run = await asyncio.create_subprocess_exec(
            *("node", "retries.mjs", f"{url}/v1", *keys, f"{storeless_url}/v1"),
            cwd=client,
            stdout=subprocess.PIPE,
        )
        async with asyncio.timeout(WITHIN):
            output, _ = await run.communicate()
    assert run.returncode == 0
    found = json.loads(output)
    failed, unread, bound = found["failed"], found["unread"], found["bound"]
    assert (failed["statuses"], failed["error"]["code"]) == ([500], "model_error")
    assert (unread["statuses"], unread["error"]["code"]) == ([503], "unavailable")
    assert (bound["statuses"], bound["images"], bound["error"]) == ([200, 429, 200], 2, None)
    jobs = list(dict.fromkeys(scene.runs()))
    assert jobs[:2] == [failed["error"]["job"], unread["error"]["job"]]
    assert len(jobs) == 4
