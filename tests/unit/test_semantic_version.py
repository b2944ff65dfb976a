"""Conversion of Python package versions to the semantic versions of NATS micro services."""

import pytest
from nats.micro.service import ServiceConfig

from consumer.bus.semantic_version import semantic_version


@pytest.mark.parametrize(
    ("python", "semantic"),
    [
        ("0.2.0", "0.2.0"),
        ("2", "2.0.0"),
        ("1.0", "1.0.0"),
        ("2026.1.5.7", "2026.1.5+7"),
        ("0.2.0a1", "0.2.0-a.1"),
        ("0.2.0b2", "0.2.0-b.2"),
        ("0.2.0rc1", "0.2.0-rc.1"),
        ("0.2.0.dev3", "0.2.0-dev.3"),
        ("0.2.0rc1.dev3", "0.2.0-rc.1.dev.3"),
        ("1.0.post1", "1.0.0+post.1"),
        ("1.0+local", "1.0.0+local"),
        ("1.0rc1.post2+g1a2b.20260101", "1.0.0-rc.1+post.2.g1a2b.20260101"),
        ("1!2.0", "2.0.0+epoch.1"),
    ],
)
def test_python_version_becomes_a_semantic_version(python: str, semantic: str) -> None:
    assert semantic_version(python) == semantic
    assert ServiceConfig(name="generation", version=semantic).version == semantic


@pytest.mark.parametrize("text", ["", "latest", "1.0-SNAPSHOT", "v1.0", "1.0\n"])
def test_invalid_python_version_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="PEP 440"):
        semantic_version(text)
