"""The examples of docs/reference/http.md and of the README's quick start run unchanged."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from consumer.devstack import GatewayServer
from tests.gateway.conftest import KeyedGateway
from tests.gateway.images import decoded

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/http.md").read_text("utf-8")
PACKAGE = Path(__file__).parent / "node" / "package.json"
INSTALL = "npm install --no-fund --no-audit --ignore-scripts --no-package-lock --silent"
# The HTTP part of the section "Send a request".
README = (
    (ROOT / "README.md")
    .read_text("utf-8")
    .partition("### Send a request")[2]
    .partition("Or without HTTP")[0]
)
README_ADDRESS = "http://127.0.0.1:PORT"
ADDRESS = "http://127.0.0.1:8080"
KEY = "gk_…"
WITHIN = 120.0  # seconds for one example
NOT_RUN = re.compile(r"^\$ (export |.*\bconsumer gateway\b)")


def run_example(folder: Path, *command: str, text: str = "", **environment: str) -> str:
    """Run an example; return its standard output."""
    ended = subprocess.run(
        command,
        cwd=folder,
        input=text,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=WITHIN,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@dataclass(frozen=True)
class Examples:
    """The environment of the examples: one folder, because they share files."""

    folder: Path
    gateway: KeyedGateway

    def run(self, *command: str, text: str = "", **environment: str) -> str:
        """Run an example; return its standard output."""
        return run_example(self.folder, *command, text=text, **environment)

    def adapted(self, code: str) -> str:
        """Return an example with this gateway's address and key."""
        assert ADDRESS in code
        assert KEY in code
        return code.replace(ADDRESS, self.gateway.url).replace(KEY, self.gateway.alice)


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def commands(page: str = PAGE) -> Iterator[str]:
    """Yield each shell command, with the output that the page shows below it."""
    for block in blocks("console", page):
        yield from re.split(r"^(?=\$ )", block, flags=re.MULTILINE)[1:]


def parts(command: str) -> tuple[str, list[str]]:
    """Split a command into the lines to run and the lines of output."""
    lines = command.removeprefix("$ ").splitlines()
    code = [lines.pop(0)]
    here = re.search(r"<<(\w+)", code[0])
    while lines and (code[-1].endswith("\\") or (here and code[-1] != here[1])):
        code.append(lines.pop(0))
    return "\n".join(code), lines


@pytest.fixture(scope="module")
def examples(keyed_gateway: KeyedGateway, tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return Examples(tmp_path_factory.mktemp("examples"), keyed_gateway)


@pytest.fixture(scope="module")
def node(examples: Examples) -> Examples:
    """The environment with openai-node installed."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        if os.environ.get("NODE_REQUIRED"):
            pytest.fail("node and npm are needed")
        pytest.skip("no node, no npm")
    shutil.copy(PACKAGE, examples.folder)
    examples.run(*INSTALL.split())
    return examples


def test_the_commands_run_twice(examples: Examples) -> None:
    """All commands run in one shell, because they share variables; then with another prompt."""
    shown = []
    script = ["set -euo pipefail"]
    for command in commands():
        if not NOT_RUN.match(command):
            code, output = parts(command)
            script.append(code)
            shown += output
    assert len(script) > 10
    for prompt in ("a red circle", "a red square"):
        printed = examples.run(
            "bash",
            "-s",
            text="\n".join(script).replace("a red circle", prompt),
            GATEWAY=examples.gateway.url,
            GATEWAY_KEY=examples.gateway.alice,
        )
        assert [line for line in shown if line not in printed.splitlines()] == []
        assert "event: succeeded" in printed
        assert prompt.split()[-1] in printed
        for name in ("circle.png", "green.png"):
            assert (examples.folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_python_examples_run(examples: Examples) -> None:
    draw, ask, follow = (examples.adapted(block) for block in blocks("python"))
    printed = examples.run(sys.executable, "-W", "error", "-c", draw)
    assert printed.splitlines()[-1].startswith("image_generation.completed ")
    assert (examples.folder / "square.png").read_bytes().startswith(b"\x89PNG")
    answer = examples.run(sys.executable, "-W", "error", "-c", ask)
    assert "square" in answer
    assert answer.endswith(" tokens\n")
    followed = examples.run(sys.executable, "-W", "error", "-c", follow)
    assert "started" in followed
    assert followed.splitlines()[-1].startswith("succeeded")
    assert (examples.folder / "triangle.png").read_bytes().startswith(b"\x89PNG")


def test_the_javascript_examples_run(node: Examples) -> None:
    draw, ask, follow = (node.adapted(block) for block in blocks("javascript"))
    node.run("node", "--input-type=module", text=draw)
    assert "square" in node.run("node", "--input-type=module", text=ask)
    assert node.run("node", "--input-type=module", text=follow).endswith("succeeded\n")


def test_the_readme_examples_run(gateway: GatewayServer, tmp_path: Path) -> None:
    assert README_ADDRESS in README
    script = ["set -euo pipefail", *(parts(command)[0] for command in commands(README))]
    code = "\n".join(script).replace(README_ADDRESS, gateway.url)
    ids = set()
    for prompt in ("a red circle", "a blue heart"):
        text = code.replace("a red circle", prompt)
        job = json.loads(run_example(tmp_path, "bash", "-s", text=text))
        assert job["task"] == "text_to_image"
        assert job["state"] in {"queued", "running"}
        ids.add(job["id"])
    assert len(ids) == 2
    assert (tmp_path / "circle.png").read_bytes().startswith(b"\x89PNG")
    (python,) = blocks("python", README)
    script = f"{python.replace(README_ADDRESS, gateway.url)}\nprint(made.data[0].b64_json)"
    printed = run_example(tmp_path, sys.executable, "-W", "error", "-c", script)
    assert decoded(printed.strip()).size == (64, 64)


def test_the_page_lists_every_address() -> None:
    from consumer.gateway.app import create_app  # noqa: PLC0415 - with the routes of all modules
    from consumer.settings import Settings  # noqa: PLC0415

    table = PAGE.partition("| address |")[2].partition("\n\n")[0]
    documented = set(re.findall(r"`(?:[A-Z]+ )?(/\S*?)`", table))
    actual = {
        re.sub(r"\{number\}", "{n}", re.sub(r"\{(job_id|model)\}", "{id}", path))
        for path in create_app(Settings()).openapi()["paths"]
    }
    assert documented == actual | {"/", "/docs", "/openapi.json"}
