"""The AsyncAPI document as a page to read, in Markdown."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

Document = Mapping[str, Any]


def markdown(document: Document) -> str:
    """A page of every subject and every message.

    Args:
        document: As `generation_contracts.schema.asyncapi` makes it.
    """
    lines = [
        "# Subjects and messages",
        "",
        f"Made by `consumer schema --markdown`; version `{document['info']['version']}`.",
        "",
        document["info"]["description"],
        "",
        "## Subjects",
        "",
        "| subject | messages | stream | |",
        "| --- | --- | --- | --- |",
        *(_subject(channel) for channel in document["channels"].values()),
        "",
        "## Messages",
        "",
    ]
    for name, message in document["components"]["messages"].items():
        lines += _message(document, name, message)
    return "\n".join(lines).rstrip() + "\n"


def _subject(channel: Document) -> str:
    address = f"`{channel['address']}`" if channel["address"] else "the sender's own"
    messages = ", ".join(f"[{name}](#{name})" for name in channel["messages"])
    stream = f"`{channel['x-stream']}`" if "x-stream" in channel else ""
    return f"| {address} | {messages} | {stream} | {_cell(channel['description'])} |"


def _message(document: Document, name: str, message: Document) -> list[str]:
    lines = [f"### {name}", "", message["summary"], ""]
    if "payload" in message:
        schema = _resolved(document, message["payload"])
        lines += [
            "| field | type | |",
            "| --- | --- | --- |",
            *_fields(document, schema),
            "",
        ]
    examples = message.get("examples", [])
    if examples:
        example = json.dumps(examples[0]["payload"], indent=2, ensure_ascii=False)
        lines += ["```json", example, "```", ""]
    return lines


def _fields(document: Document, schema: Document) -> Iterable[str]:
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        about = [field.get("description", "")]
        default = field.get("default")
        if default not in (None, [], {}, ""):
            about.append(f"default `{json.dumps(default)}`")
        said = "; ".join(part for part in about if part)
        mark = "" if name in required else " (optional)"
        yield f"| `{name}`{mark} | {_type(document, field)} | {_cell(said)} |"


def _type(document: Document, field: Document) -> str:  # noqa: PLR0911 - one for each kind
    if "$ref" in field:
        target = _resolved(document, field)
        if "enum" in target:
            return _choice(target["enum"])
        return str(target.get("title", field["$ref"].rpartition("/")[2]))
    for key in ("anyOf", "oneOf"):
        if key in field:
            kinds = [_type(document, kind) for kind in field[key] if kind.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return _choice(field["enum"])
    if field.get("type") == "array":
        return f"list of {_type(document, field['items'])}" if "items" in field else "list"
    return str(field.get("format", field.get("type", "anything"))) + _limits(field)


def _limits(field: Document) -> str:
    low = field.get("minimum", field.get("exclusiveMinimum", field.get("minLength")))
    high = field.get("maximum", field.get("exclusiveMaximum", field.get("maxLength")))
    unit = " characters" if field.get("type") == "string" else ""
    if low is None and high is None:
        return ""
    if high is None:
        return f", {low} or more{unit}"
    return f", {'up' if low is None else low} to {high}{unit}"


def _choice(values: Iterable[Any]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _resolved(document: Document, node: Document) -> Document:
    found: Any = document
    for part in node["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    resolved: Document = found
    return resolved


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
