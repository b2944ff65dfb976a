"""The page of subjects and messages is what the code says, and names everything."""

from pathlib import Path

from generation_contracts.reference import markdown
from generation_contracts.schema import asyncapi

PAGE = Path(__file__).parents[2] / "docs" / "messages.md"


def test_the_page_in_the_docs_is_the_one_that_the_command_prints() -> None:
    """Make it again with `uv run consumer schema --markdown > docs/messages.md`."""
    assert PAGE.read_text("utf-8") == markdown(asyncapi())


def test_the_page_has_every_subject_message_and_field() -> None:
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
