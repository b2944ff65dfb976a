"""The wheels: the contracts alone, and the daemon with the contracts of the same checkout."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

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

PLACES = """
from importlib.util import find_spec
for name in ("consumer", "generation_contracts", "generation_client"):
    print(find_spec(name).origin)
"""


def run_uv(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run uv, as a program or as a module; a machine without it fails here, and does not skip."""
    program = shutil.which("uv")
    command = [program] if program else [sys.executable, "-m", "uv"]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, check=False, capture_output=True, text=True
    )


def uv(*arguments: str | Path) -> None:
    done = run_uv(*arguments)
    if done.returncode:
        pytest.fail(f"uv {arguments[0]} ended with {done.returncode}:\n{done.stderr}")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels of both distributions."""
    folder = tmp_path_factory.mktemp("wheels")
    uv("build", "--all-packages", "--wheel", "-o", folder)
    return folder


def contracts_wheel(wheels: Path) -> Path:
    (wheel,) = wheels.glob("generation_contracts-*.whl")
    return wheel


def daemon_wheel(wheels: Path) -> Path:
    (wheel,) = wheels.glob("generation_consumer-*.whl")
    return wheel


def contracts_requirement(wheels: Path) -> Requirement:
    """Return what the daemon's wheel requires of the contracts."""
    with zipfile.ZipFile(daemon_wheel(wheels)) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        lines = packed.read(name).decode().splitlines()
    prefix = "Requires-Dist: "
    needs = [Requirement(line.removeprefix(prefix)) for line in lines if line.startswith(prefix)]
    (need,) = (need for need in needs if need.name == "generation-contracts")
    return need


def impostor_wheel(folder: Path, version: str) -> None:
    """Write an empty wheel with the name of the contracts."""
    info = f"generation_contracts-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: generation-contracts\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / f"generation_contracts-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(f"{info}/{name}", text)


def test_contracts_wheel_installs_and_works_alone(wheels: Path, tmp_path: Path) -> None:
    uv("venv", "--python", sys.executable, tmp_path / "alone")
    python = tmp_path / "alone" / "bin" / "python"
    uv("pip", "install", "--python", python, contracts_wheel(wheels))

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


def test_daemon_wheel_has_the_trained_models_without_the_training(wheels: Path) -> None:
    names = zipfile.ZipFile(daemon_wheel(wheels)).namelist()
    demonstration = [name for name in names if "/demonstration/" in name]
    assert any(name.endswith(".safetensors") for name in demonstration)
    assert not any("/training/" in name for name in demonstration)
    assert any(name.startswith("consumer/infra/nats/") for name in names)


def test_both_wheels_install_and_start(wheels: Path, tmp_path: Path) -> None:
    """Third-party packages are those of this environment: torch alone has gigabytes."""
    uv("venv", "--python", sys.executable, tmp_path / "clean")
    python = tmp_path / "clean" / "bin" / "python"
    both = (contracts_wheel(wheels), daemon_wheel(wheels))
    uv("pip", "install", "--python", python, "--no-deps", *both)
    (site,) = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    # Python does not read the .pth files of this folder, so it finds no editable installation.
    (site / "third_party.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    schema = subprocess.run(
        [tmp_path / "clean" / "bin" / "consumer", "schema"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    ).stdout
    assert json.loads(schema)["asyncapi"] == "3.0.0"
    places = subprocess.run(
        [python, "-I", "-c", PLACES], check=True, capture_output=True, text=True
    ).stdout
    assert all(Path(place).is_relative_to(site) for place in places.split())


def test_only_the_contracts_of_the_checkout_satisfy_the_daemon(
    wheels: Path, tmp_path: Path
) -> None:
    """The public index accepts no local version, so a package of the same name is refused there."""
    need = contracts_requirement(wheels)
    (pinned,) = need.specifier
    version = Version(pinned.version)
    assert (pinned.operator, version.local) == ("==", "generation.consumer")
    assert contracts_wheel(wheels).name.startswith(f"generation_contracts-{version}-")
    for other in (version.public, "99.0"):
        impostor_wheel(tmp_path, other)
    uv("venv", "--python", sys.executable, tmp_path / "clean")
    install = ("pip", "install", "--dry-run", "--no-deps", "--no-index", f"{need.name}{pinned}")
    install = (*install, "--python", tmp_path / "clean" / "bin" / "python")
    refused = run_uv(*install, "--find-links", tmp_path)
    assert refused.returncode == 1
    assert f"no version of {need.name}{pinned}" in " ".join(refused.stderr.split())
    uv(*install, "--find-links", wheels)


def test_the_dependencies_of_both_wheels_can_be_resolved(wheels: Path, tmp_path: Path) -> None:
    uv("venv", "--python", sys.executable, tmp_path / "clean")
    python = tmp_path / "clean" / "bin" / "python"
    both = (contracts_wheel(wheels), f"{daemon_wheel(wheels)}[devstack,gateway]")
    uv("pip", "install", "--dry-run", "--python", python, *both)
