"""The contracts wheel needs only pydantic and no library of the daemon."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The daemon and its libraries, which a sender's process must not import.
NOT_NEEDED = ["consumer", "torch", "nats", "minio", "diffusers", "transformers", "PIL", "structlog"]

IN_THE_SENDERS_PROGRAM = f"""
import importlib.metadata, importlib.util, json
from generation_contracts import Task, decode_request
from generation_contracts.schema import asyncapi, json_schemas

request = decode_request(Task.TEXT_TO_IMAGE, b'{{"prompt": "a red circle", "steps": 5}}')
print(json.dumps({{
    "steps": request.num_inference_steps,
    "schemas": list(json_schemas()),
    "asyncapi": asyncapi()["asyncapi"],
    "importable": [name for name in {NOT_NEEDED} if importlib.util.find_spec(name)],
    "needs": importlib.metadata.requires("generation-contracts"),
    "typed": importlib.util.find_spec("generation_contracts").loader.get_filename(),
}}))
"""


def uv(*arguments: str | Path) -> None:
    """Run uv, as a program or as a module; a machine without it fails here, and does not skip."""
    program = shutil.which("uv")
    command = [program] if program else [sys.executable, "-m", "uv"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"uv {arguments[0]} ended with {done.returncode}:\n{done.stderr}")


def test_contracts_wheel_installs_and_works_alone(tmp_path: Path) -> None:
    uv("build", "--package", "generation-contracts", "--wheel", "-o", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    uv("venv", "--python", sys.executable, tmp_path / "alone")
    python = tmp_path / "alone" / "bin" / "python"
    uv("pip", "install", "--python", python, wheel)

    output = json.loads(
        subprocess.run(
            [python, "-I", "-c", IN_THE_SENDERS_PROGRAM],
            cwd=tmp_path,
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
    )
    assert output["steps"] == 5
    assert "TextToImageRequest" in output["schemas"]
    assert output["asyncapi"] == "3.0.0"
    assert output["importable"] == []
    always = [need for need in output["needs"] if "extra ==" not in need]
    assert [need.partition(">")[0] for need in always] == ["pydantic"]
    assert Path(output["typed"]).with_name("py.typed").is_file()
    assert Path(output["typed"]).is_relative_to(tmp_path / "alone")


def test_daemon_wheel_has_the_trained_models_without_the_training(tmp_path: Path) -> None:
    uv("build", "--package", "generation-consumer", "--wheel", "-o", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    demonstration = [name for name in names if "/demonstration/" in name]
    assert any(name.endswith(".safetensors") for name in demonstration)
    assert not any("/training/" in name for name in demonstration)
    assert any(name.startswith("consumer/infra/nats/") for name in names)
