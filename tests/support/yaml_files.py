"""Reads YAML files."""

from pathlib import Path
from typing import Any

import yaml


def load_yaml(file: Path) -> Any:
    """Return the only document of a file."""
    return yaml.safe_load(file.read_text())


def load_yaml_documents(file: Path) -> list[Any]:
    """Return all documents of a file."""
    return list(yaml.safe_load_all(file.read_text()))
