"""LiteLLM with `api_base` as a client of the real gateway; needs uv."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from consumer.devstack import GatewayServer
from tests.gateway.images import data_url, decoded, red_circle

SCRIPT_WITHIN = 180.0  # seconds; the first import of LiteLLM compiles all of it
INSTALL_WITHIN = 300.0  # seconds

pytestmark = pytest.mark.timeout(400)  # seconds; the installation may be slow
DESCRIPTION = "A red circle on a blue background in the center."
SCRIPT = Path(__file__).parent / "litellm_client.py"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python interpreter with LiteLLM."""
    uv = shutil.which("uv")
    if uv is None:
        raise _unavailable("no uv")
    folder = tmp_path_factory.mktemp("litellm") / "environment"
    subprocess.run([uv, "venv", "-q", "-p", sys.executable, folder], check=True)
    python = folder / "bin" / "python"
    install = [uv, "pip", "install", "-q", "-p", str(python), "litellm>=1.80"]
    try:
        subprocess.run(install, check=True, capture_output=True, text=True, timeout=INSTALL_WITHIN)
    except subprocess.TimeoutExpired:
        raise _unavailable("LiteLLM takes too long to install") from None
    except subprocess.CalledProcessError as error:
        raise _unavailable(f"LiteLLM cannot be installed: {error.stderr[-500:]}") from None
    return python


def _unavailable(reason: str) -> BaseException:
    if os.environ.get("LITELLM_REQUIRED"):
        return pytest.fail.Exception(reason)
    return pytest.skip.Exception(reason)


@pytest.fixture(scope="module")
def found(python: Path, gateway: GatewayServer) -> dict[str, Any]:
    """The output of the script."""
    run = subprocess.run(
        [python, SCRIPT, f"{gateway.url}/v1", data_url(red_circle())],
        # Without this variable, the import of LiteLLM downloads a table of prices.
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=SCRIPT_WITHIN,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    value: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return value


def test_an_image_is_generated(found: dict[str, Any]) -> None:
    assert decoded(found["image"]).size == (64, 64)


def test_a_question_gets_an_answer(found: dict[str, Any]) -> None:
    assert (found["text"], found["finish_reason"]) == (DESCRIPTION, "stop")
    assert found["tokens"] > 0


def test_a_text_is_streamed(found: dict[str, Any]) -> None:
    assert found["streamed"] == DESCRIPTION
    assert found["streamed_tokens"] > 0


def test_errors_have_their_exception_types(found: dict[str, Any]) -> None:
    assert found["refused"] == {"name": "BadRequestError", "status": 400}
    assert found["unknown"] == {"name": "NotFoundError", "status": 404}
