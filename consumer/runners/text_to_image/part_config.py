"""Access to the configuration of a part of a model."""

from collections.abc import Mapping
from typing import Any


def config_of(part: Any) -> Mapping[str, Any]:
    """Return the configuration of a pipeline, model, scheduler or guider; empty without one."""
    config = getattr(part, "config", None)
    return config if isinstance(config, Mapping) else {}
