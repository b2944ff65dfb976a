"""What a part of a model says about itself in its configuration file."""

from collections.abc import Mapping
from typing import Any


def config_of(part: Any) -> Mapping[str, Any]:
    """The configuration of a pipeline, model, scheduler or guider; empty where it has none."""
    config = getattr(part, "config", None)
    return config if isinstance(config, Mapping) else {}
