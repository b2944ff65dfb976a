"""What schemathesis makes of the OpenAPI document, allowed or not, sent to the real gateway."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consumer.apply import apply
from consumer.devstack import Daemon, DevStack, GatewayServer
from consumer.gateway.keys import KeyFile
from consumer.gateway.tenants import Bounds
from consumer.settings import Settings
from generation_contracts import Task
from tests.faults.quick_runner import FOLDER
from tests.faults.scene import ROOT

PROGRAM = Path(sys.executable).parent / "schemathesis"
EXAMPLES = 15  # of each operation, in each phase that draws them
# What a schema cannot say is refused too: an image that a question needs, a used idempotency key.
NOT_CHECKED = "positive_data_acceptance"


@pytest.fixture(scope="module")
def fuzzed(stack: DevStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address and a key of a gateway whose workers take no time."""
    folder = tmp_path_factory.mktemp("fuzzed")
    environment: dict[str, Any] = {
        **stack.environment(),
        "CONSUMER_SUBJECT_ROOT": "fuzzed",
        FOLDER: str(folder),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'contracts'}",
    }
    settings = {name.lower(): value for name, value in environment.items()}
    known = {name: settings[name] for name in settings.keys() & Settings.model_fields.keys()}
    asyncio.run(apply(Settings(**known)))
    key = KeyFile(folder / "keys.json").add("fuzzer", Bounds()).text
    workers = [
        Daemon(str(task), {**environment, "MODEL_TYPE": str(task)}, log=folder / f"{task}.log")
        for task in Task
    ]
    gateway = GatewayServer(
        "gateway",
        {**environment, "GATEWAY_KEYS": str(folder / "keys.json")},
        log=folder / "gateway.log",
    )
    try:
        for worker in workers:
            worker.argv = (sys.executable, "-P", "-m", "tests.faults.worker", "none")
            worker.start()
        gateway.start()
        for process in (*workers, gateway):
            process.wait_ready()
        yield gateway.url, key
        assert gateway.alive
        assert '"level": "error"' not in gateway.log_since_start()
    finally:
        for process in (gateway, *workers):
            process.kill()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("phases", ["coverage", "fuzzing,stateful"])
def test_nothing_is_found(fuzzed: tuple[str, str], phases: str, tmp_path: Path) -> None:
    url, key = fuzzed
    command = [
        str(PROGRAM),
        "run",
        f"{url}/openapi.json",
        f"--header=Authorization: Bearer {key}",
        "--header=Prefer: respond-async",
        f"--phases={phases}",
        f"--max-examples={EXAMPLES}",
        f"--exclude-checks={NOT_CHECKED}",
        "--continue-on-failure",
        "--request-timeout=60",
        "--seed=1",
        "--no-color",
    ]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-10_000:] + found.stderr
