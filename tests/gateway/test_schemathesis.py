"""What schemathesis makes of the OpenAPI document, allowed or not, sent to the real gateway."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import schemathesis

from consumer.app.apply import apply
from consumer.devstack import DevStack
from consumer.gateway.keys import KeyFile
from consumer.gateway.tenants import Bounds
from consumer.settings import Settings
from generation_contracts import Task
from tests.gateway.pictures import data_url, red_circle
from tests.support.forked import ForkedGateway, ForkedWorker
from tests.support.quick_runner import FOLDER

PROGRAM = Path(sys.executable).parent / "schemathesis"
EXAMPLES = 8  # of each operation, in each phase that draws them
FEW = 3
# What a schema cannot say is refused too: an image that a question needs, a used idempotency key.
NOT_CHECKED = "positive_data_acceptance"
AT_ONCE = "--header=Prefer: respond-async"
WAITING = ("/v1/images/generations", "/v1/images/edits", "/v1/chat/completions", "/infer")
PROMPT = {"prompt": "a red circle"}
PICTURE = data_url(red_circle())
QUESTION = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": PICTURE}},
            ],
        }
    ]
}


@dataclass(frozen=True)
class Fuzzed:
    """Gateways whose workers take no time.

    Attributes:
        url: Of the one with keys.
        key: One of its keys.
        open_url: Of the one without keys.
    """

    url: str
    key: str
    open_url: str


@pytest.fixture(scope="module")
def fuzzed(stack: DevStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    folder = tmp_path_factory.mktemp("fuzzed")
    environment: dict[str, Any] = {
        **stack.environment(),
        "CONSUMER_SUBJECT_ROOT": "fuzzed",
        FOLDER: str(folder),
    }
    settings = {name.lower(): value for name, value in environment.items()}
    known = {name: settings[name] for name in settings.keys() & Settings.model_fields.keys()}
    asyncio.run(apply(Settings(**known)))
    keys = KeyFile(folder / "keys.json")
    key = keys.add("fuzzer", Bounds()).text
    workers = [
        ForkedWorker(
            str(task),
            {**environment, "MODEL_TYPE": str(task)},
            log=folder / f"{task}.log",
            cause="no_time",
        )
        for task in Task
    ]
    keyed = {**environment, "GATEWAY_KEYS": str(keys.path)}
    gateways = [
        ForkedGateway(name, values, log=folder / f"{name}.log")
        for name, values in (("keyed", keyed), ("open", environment))
    ]
    try:
        for process in (*workers, *gateways):
            process.start()
        for process in (*workers, *gateways):
            process.wait_ready()
        yield Fuzzed(gateways[0].url, key, gateways[1].url)
        for gateway in gateways:
            assert gateway.alive
            assert '"level": "error"' not in gateway.log_since_start()
    finally:
        for process in (*gateways, *workers):
            process.kill()


def fuzz(
    folder: Path,
    url: str,
    *options: str,
    key: str = "none",
    examples: int = EXAMPLES,
    not_checked: str = NOT_CHECKED,
) -> None:
    """Run schemathesis; it finds nothing."""
    command = [
        str(PROGRAM),
        "run",
        f"{url}/openapi.json",
        f"--header=Authorization: Bearer {key}",
        f"--exclude-checks={not_checked}",
        *options,
        f"--max-examples={examples}",
        "--continue-on-failure",
        "--request-timeout=60",
        "--seed=1",
        "--no-color",
    ]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-10_000:] + found.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize("phases", ["coverage", "fuzzing,stateful"])
def test_nothing_is_found(fuzzed: Fuzzed, phases: str, tmp_path: Path) -> None:
    fuzz(tmp_path, fuzzed.url, AT_ONCE, f"--phases={phases}", key=fuzzed.key)


@pytest.mark.timeout(600)
def test_nothing_is_found_by_who_waits(fuzzed: Fuzzed, tmp_path: Path) -> None:
    paths = [f"--include-path={path}" for path in WAITING]
    fuzz(tmp_path, fuzzed.url, "--phases=fuzzing", *paths, key=fuzzed.key, examples=FEW)


@pytest.mark.timeout(600)
def test_nothing_is_found_without_keys(fuzzed: Fuzzed, tmp_path: Path) -> None:
    """The document asks for a key, as OpenAI's clients do; this gateway does not look at it."""
    options = (AT_ONCE, "--phases=fuzzing", "--mode=positive")
    not_checked = f"{NOT_CHECKED},ignored_auth"
    fuzz(tmp_path, fuzzed.open_url, *options, examples=FEW, not_checked=not_checked)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/images/generations", PROMPT),
        ("/v1/images/generations", {**PROMPT, "n": 2, "response_format": "url"}),
        ("/v1/images/generations", {**PROMPT, "stream": True, "partial_images": 2}),
        ("/v1/chat/completions", QUESTION),
        ("/v1/chat/completions", {**QUESTION, "stream": True}),
        ("/infer", {**PROMPT, "num_images": 2}),
        ("/infer", {"prompt": "What is this?", "images": [PICTURE]}),
    ],
)
def test_an_awaited_result_is_as_documented(
    fuzzed: Fuzzed, path: str, body: dict[str, Any]
) -> None:
    """What schemathesis draws has no image that can be read, and is rarely answered with 200."""
    operation = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")[path]["POST"]
    case = operation.Case(body=body, media_type="application/json")
    headers = {"Authorization": f"Bearer {fuzzed.key}"}
    response = case.call_and_validate(headers=headers)
    assert response.status_code == 200
