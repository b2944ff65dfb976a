"""The reference page of subjects and messages is complete and matches the code."""

import re
from pathlib import Path

from generation_contracts.failures import RETRYABLE, FailureCode
from generation_contracts.reference import markdown
from generation_contracts.schema import asyncapi

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "messages.md"


def test_messages_page_is_up_to_date() -> None:
    """Update the page with `uv run consumer schema --markdown > docs/reference/messages.md`."""
    assert PAGE.read_text("utf-8") == markdown(asyncapi())


def test_messages_page_has_every_subject_message_and_field() -> None:
    document = asyncapi()
    page = markdown(document)
    for channel in document["channels"].values():
        assert f"`{channel['address']}`" in page or channel["address"] is None
    for name, message in document["components"]["messages"].items():
        section = page.partition(f"### {name}\n")[2].partition("\n### ")[0]
        assert message["summary"] in section
        schema = document["components"]["schemas"].get(message.get("title", ""), {})
        for field in schema.get("properties", {}):
            assert f"| `{field}`" in section


def test_every_named_part_has_a_section() -> None:
    page = markdown(asyncapi())
    sections = {line.strip("# ").lower() for line in page.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= sections


def test_every_failure_code_is_explained() -> None:
    page = markdown(asyncapi())
    for code in FailureCode:
        retry = "yes" if code in RETRYABLE else "no"
        assert re.search(rf"^\| `{code}` \| {retry} \| \S.*\|$", page, re.MULTILINE)


def test_every_header_is_explained() -> None:
    document = asyncapi()
    page = markdown(document)
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Headers"):
            section = page.partition(f"### {name}\n")[2].partition("\n### ")[0]
            for header in schema["properties"]:
                assert f"| `{header}`" in section


def test_exclusive_limit_is_documented_as_exclusive() -> None:
    """`top_p` is above 0: a request with 0 is refused."""
    page = markdown(asyncapi())
    assert "| `top_p` (optional) | number, above 0, up to 1 |" in page
