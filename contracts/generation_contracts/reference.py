"""The AsyncAPI document as a page to read, in Markdown."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from generation_contracts.failures import MEANINGS, RETRYABLE

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
    lines += ["## Parts of messages", ""]
    for title in _parts(document):
        lines += _part(document, title)
    lines += _failure_codes()
    lines += ["## Headers", ""]
    for title, schema in _header_schemas(document).items():
        lines += _headers(title, schema)
    return "\n".join(lines).rstrip() + "\n"


def _subject(channel: Document) -> str:
    address = f"`{channel['address']}`" if channel["address"] else "the sender's own"
    messages = ", ".join(f"[{name}](#{name})" for name in channel["messages"])
    stream = f"`{channel['x-stream']}`" if "x-stream" in channel else ""
    return f"| {address} | {messages} | {stream} | {_cell(channel['description'])} |"


def _message(document: Document, name: str, message: Document) -> list[str]:
    lines = [f"### {name}", "", message["summary"], ""]
    if "headers" in message:
        title = message["headers"]["$ref"].rpartition("/")[2]
        lines += [f"Headers: [{title}](#{title.lower()}).", ""]
    if "payload" in message:
        lines += _table(document, _resolved(document, message["payload"]))
    examples = message.get("examples", [])
    if examples:
        example = json.dumps(examples[0]["payload"], indent=2, ensure_ascii=False)
        lines += ["```json", example, "```", ""]
    return lines


def _part(document: Document, title: str) -> list[str]:
    schema = document["components"]["schemas"][title]
    summary = schema.get("description", "").partition("\n\n")[0]
    return [f"### {title}", "", " ".join(summary.split()), "", *_table(document, schema)]


def _parts(document: Document) -> list[str]:
    """What messages are made of: every named object that is no message itself."""
    schemas = document["components"]["schemas"]
    whole = {
        message[kind]["$ref"].rpartition("/")[2]
        for message in document["components"]["messages"].values()
        for kind in ("payload", "headers")
        if kind in message
    }
    return [name for name in schemas if name not in whole and "properties" in schemas[name]]


def _failure_codes() -> list[str]:
    rows = [
        f"| `{code}` | {'yes' if code in RETRYABLE else 'no'} | {meaning} |"
        for code, meaning in MEANINGS.items()
    ]
    return [
        "### Failure codes",
        "",
        "A request that failed has a terminal event under its id. So try again under a new one.",
        "",
        "| code | retry | |",
        "| --- | --- | --- |",
        *rows,
        "",
    ]


def _header_schemas(document: Document) -> dict[str, Document]:
    schemas = document["components"]["schemas"]
    return {name: schema for name, schema in schemas.items() if name.endswith("Headers")}


def _headers(title: str, schema: Document) -> list[str]:
    required = schema.get("required", [])
    rows = {
        **{f"`{name}`": field for name, field in schema["properties"].items()},
        **{
            f"`{name.removeprefix('^')}…`": field
            for name, field in schema.get("patternProperties", {}).items()
        },
    }
    lines = [f"### {title}", "", "| header | |", "| --- | --- |"]
    for name, field in rows.items():
        mark = "" if name.strip("`") in required else " (optional)"
        lines.append(f"| {name}{mark} | {_cell(field['description'])} |")
    return [*lines, ""]


def _table(document: Document, schema: Document) -> list[str]:
    return ["| field | type | |", "| --- | --- | --- |", *_fields(document, schema), ""]


def _fields(document: Document, schema: Document) -> Iterable[str]:
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        about = [said] if (said := _about(field)) else []
        default = field.get("default")
        if default not in (None, [], {}, "") and "const" not in field:
            about.append(f"default `{json.dumps(default)}`")
        mark = "" if name in required else " (optional)"
        yield f"| `{name}`{mark} | {_type(document, field)} | {_cell('; '.join(about))} |"


def _about(field: Document) -> str:
    """What is said of a field: at it, or else at the one kind that it may have beside null."""
    kinds = [field, *field.get("anyOf", [])]
    return next((kind["description"] for kind in kinds if "description" in kind), "")


def _type(document: Document, field: Document) -> str:  # noqa: PLR0911 - one for each kind
    if "$ref" in field:
        target = _resolved(document, field)
        if "enum" in target:
            return _choice(target["enum"])
        title = str(target["title"])
        return f"[{title}](#{title.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in field:
            kinds = [_type(document, kind) for kind in field[key] if kind.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return _choice(field["enum"])
    if field.get("type") == "array":
        items = f" of {_type(document, field['items'])}" if "items" in field else ""
        return f"list{_size(field, 'Items')}{items}"
    if field.get("type") == "object":
        return f"object{_size(field, 'Properties')}{_values(document, field)}"
    return str(field.get("format", field.get("type", "anything"))) + _limits(field)


def _values(document: Document, field: Document) -> str:
    """What the values of a map are."""
    kinds = [*field.get("patternProperties", {}).values(), field.get("additionalProperties")]
    described = [_type(document, kind) for kind in kinds if isinstance(kind, dict)]
    return f" of {' or '.join(described)}" if described else ""


def _size(field: Document, unit: str) -> str:
    low, high = field.get(f"min{unit}"), field.get(f"max{unit}")
    if high is None:
        return "" if low is None else f" ({low} or more)"
    return f" ({low or 0} to {high})"


def _limits(field: Document) -> str:
    unit = " characters" if field.get("type") == "string" else ""
    above = field.get("exclusiveMinimum")
    low = field.get("minimum", field.get("minLength"))
    high = field.get("maximum", field.get("maxLength"))
    bounds = []
    if above is not None:
        bounds.append(f"above {above}")
    if low is not None and high is not None:
        bounds.append(f"{low} to {high}{unit}")
    elif low is not None:
        bounds.append(f"{low} or more{unit}")
    elif high is not None:
        bounds.append(f"up to {high}{unit}")
    for one in field.get("pattern", "").split("|"):
        scheme = one.removeprefix("^").partition(":")[0]
        if scheme in {"data", "s3", "https?"}:
            bounds.insert(0, f"`{scheme.replace('?', '')}:…`")
    return "".join(f", {bound}" for bound in bounds)


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
