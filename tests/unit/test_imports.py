"""Modules and commands import only what they need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIGHT = (
    "generation_contracts",
    "consumer.settings",
    "consumer.telemetry",
    "consumer.jobs.states",
    "consumer.ports.bus",
    "consumer.ports.media",
    "consumer.ports.model",
    "consumer.ports.store",
    "consumer.ports.telemetry",
    "consumer.jobs.lease",
    "consumer.inference.worker",
    "consumer.jobs.admission",
    "consumer.jobs.finalizer",
    "consumer.jobs.executor",
)
LIBRARIES_OF_MODELS = frozenset({"torch", "torchvision", "diffusers", "transformers", "accelerate"})
HEAVY = LIBRARIES_OF_MODELS | {"nats", "minio", "PIL"}

# Modules of the daemon only; the import of each takes a tenth of a second or more.
OF_A_DAEMON = LIBRARIES_OF_MODELS | {
    "consumer.artifacts",
    "consumer.app.daemon",
    "consumer.jobs.executor",
    "consumer.app.metrics",
    "consumer.runners",
    "minio",
    "numpy",
    "opentelemetry",
    "PIL",
    "prometheus_client",
}
OF_A_STACK = {"consumer.devstack", "consumer.app.development"}


def modules_after(code: str, **environment: str) -> set[str]:
    """Run code in a new interpreter and return its modules at exit, for any exit code."""
    print_modules = "import atexit, sys; atexit.register(lambda: print(*sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{print_modules}\n{code}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return set(done.stdout.splitlines()[-1].split())


def imported_with(*modules: str) -> set[str]:
    """The modules that are there after importing some."""
    return modules_after(f"import {', '.join(modules)}")


def imported_by_command(*arguments: str, **environment: str) -> set[str]:
    """The modules that are there after a command."""
    code = f"from consumer.app.cli import main; sys.argv = ['consumer', *{arguments}]; main()"
    return modules_after(code, **environment)


def test_job_package_imports_no_model_bus_or_store() -> None:
    imported = imported_with(*LIGHT)
    assert "consumer" in imported
    assert imported & HEAVY == set()


def test_heavy_imports_are_detected() -> None:
    assert {"nats", "minio"} <= imported_with("nats", "minio")


def test_help_imports_no_heavy_module() -> None:
    imported = imported_by_command("--help")
    assert "click" in imported
    assert imported & {"nats", "pydantic", "rich", "structlog"} == set()


@pytest.mark.parametrize("arguments", [["text-to-image", "a star"], ["image-to-text", "{}", "?"]])
def test_sender_command_imports_only_the_client(arguments: list[str], tmp_path: Path) -> None:
    image = tmp_path / "star.png"
    image.write_bytes(b"star")
    imported = imported_by_command(
        "request",
        *(argument.format(image) for argument in arguments),
        NATS_CREDS=str(tmp_path / "missing"),  # it ends where it would connect
    )
    assert {
        "nats.aio.client",
        "consumer.app.sender_commands",
        "consumer.bus.connection",
    } <= imported
    assert imported & (OF_A_DAEMON | OF_A_STACK | {"consumer.endpoints.worker_service"}) == set()


def test_daemon_start_imports_no_model_library() -> None:
    imported = imported_with("consumer.app.daemon")
    assert "consumer.jobs.executor" in imported
    unused = (
        LIBRARIES_OF_MODELS | OF_A_STACK | {"opentelemetry", "c2pa", "consumer.app.sender_commands"}
    )
    assert imported & unused == set()


def test_lease_guard_imports_no_model_and_no_store() -> None:
    imported = imported_with("consumer.bus.lease_guard.process")
    assert "nats.aio.client" in imported
    assert imported & OF_A_DAEMON == set()
