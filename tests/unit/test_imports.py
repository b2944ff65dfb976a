"""What importing costs: the life of a job knows no library of models, the bus or the store."""

import subprocess
import sys

LIGHT = (
    "generation_contracts",
    "consumer.settings",
    "consumer.telemetry",
    "consumer.job",
    "consumer.ports",
    "consumer.heartbeat",
    "consumer.run",
    "consumer.admission",
    "consumer.conclusion",
    "consumer.execution",
)
HEAVY = frozenset(
    {"torch", "torchvision", "diffusers", "transformers", "accelerate", "nats", "minio", "PIL"}
)


def imported_with(*modules: str) -> set[str]:
    """The top-level modules that an interpreter of its own has after importing some."""
    code = f"import sys, {', '.join(modules)}; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_life_of_a_job_is_imported_without_model_bus_and_store() -> None:
    imported = imported_with(*LIGHT)
    assert "consumer" in imported
    assert imported & HEAVY == set()


def test_what_is_heavy_would_be_seen() -> None:
    assert {"nats", "minio"} <= imported_with("nats", "minio")
