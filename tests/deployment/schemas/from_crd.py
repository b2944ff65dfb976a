"""A CustomResourceDefinition's schema as JSON Schema: `from_crd.py FILE VERSION > schema.json`.

Descriptions are left out, and an object takes no fields but those it names: what the API server
would drop is an error here. CEL rules (`x-kubernetes-validations`) cannot be said in JSON Schema.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, closed."""
    kept = {
        key: value
        for key, value in schema.items()
        if key not in {"description", "default", "format"} and not key.startswith("x-kubernetes-")
    }
    if "properties" in schema:
        kept["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    for key in ("items", "additionalProperties", "not"):
        if isinstance(schema.get(key), dict):
            kept[key] = strict(schema[key])
    for key in ("anyOf", "allOf", "oneOf"):
        if key in schema:
            kept[key] = [strict(part) for part in schema[key]]
    if kept.pop("nullable", False):
        kept = {"anyOf": [kept, {"type": "null"}]}
    return kept


def main(file: str, version: str) -> None:
    """Print one version's schema."""
    definition = yaml.safe_load(Path(file).read_text())
    (found,) = (each for each in definition["spec"]["versions"] if each["name"] == version)
    schema = strict(found["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status", None)  # the controller's
    json.dump(schema, sys.stdout, separators=(",", ":"), sort_keys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
