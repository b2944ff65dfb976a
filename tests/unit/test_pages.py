"""The documentation: links have targets, and settings and log lines match the code."""

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consumer.settings import Settings
from consumer.telemetry import JobReport
from generation_contracts import FailureCode

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT)
    for folder in (
        ".",
        "docs",
        "docs/paths",
        "docs/reference",
        "contracts",
        "consumer/runners/demonstration",
    )
    for page in (ROOT / folder).glob("*.md")
)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub generates them from headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_documentation_link_has_a_target(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text("utf-8"))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (ROOT / page).parent / place if place else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs/reference/settings.md").read_text("utf-8")
    named = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", page))
    settings = {name.upper() for name in Settings.model_fields}
    assert settings - named == set()
    # Nor does it name any that is none; the others belong to other programs, or are no settings.
    assert named - settings == {"OTEL_EXPORTER_OTLP_ENDPOINT", "INFO"}


# -- troubleshooting.md ---------------------------------------------------------------------------

TROUBLESHOOTING = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
# Bound to the context for each job, and added to each line.
ALWAYS = {"event", "level", "timestamp", "request_id", "task", "attempt"}
REPORTED = {field.name for field in dataclasses.fields(JobReport)}  # of `job_finished`
OUTCOMES = {"requeued", "already_done"}  # of `job_finished`, besides the failure codes
# Names of NATS, of HTTP errors and of tasks.
OTHER_NAMES = {
    "internal_error",
    "loopback_only",
    "max_age",
    "max_bytes",
    "max_deliver",
    "max_payload",
    "text_to_image",
}


def quoted_lines() -> list[dict[str, Any]]:
    blocks = re.findall(r"^```json\n(.*?)^```", TROUBLESHOOTING, re.MULTILINE | re.DOTALL)
    return [json.loads(line) for block in blocks for line in block.splitlines()]


def logged() -> Iterator[tuple[str, str, set[str]]]:
    """The event, the level and the fields of each call of a logger in the daemon."""
    for module in (ROOT / "consumer").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text("utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name("log"), attr=level),
                    args=[ast.Constant(str(event))],
                    keywords=fields,
                ):
                    named = {field.arg for field in fields if field.arg is not None}
                    yield event, "error" if level == "exception" else level, named
                case _:
                    pass
    # The log adds this line itself, without a call.
    yield "log_lines_lost", "warning", {"lines"}


LOGGED = list(logged())


@pytest.mark.parametrize("line", quoted_lines(), ids=lambda line: line["event"])
def test_quoted_log_line_exists_in_the_code(line: dict[str, Any]) -> None:
    assert any(
        (line["event"], line["level"]) == (event, level)
        and line.keys() - ALWAYS <= fields | (REPORTED if event == "job_finished" else set())
        for event, level, fields in LOGGED
    )


def test_named_log_events_exist_in_the_code() -> None:
    """Also in its tables and sentences: an event is a name with an underscore, in backticks."""
    events = {event for event, _, _ in LOGGED}
    prose = re.sub(r"^```.*?^```", "", TROUBLESHOOTING, flags=re.DOTALL | re.MULTILINE)
    fields = {name for line in quoted_lines() for name in line}
    codes = set(FailureCode) | OUTCOMES
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", prose))
    assert named - events - fields - codes == OTHER_NAMES
