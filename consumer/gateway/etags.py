"""Conditional requests by entity tag."""


def matches(condition: str, etag: str) -> bool:
    """Return whether the value of `If-None-Match` contains an entity tag."""
    known = [tag.strip().removeprefix("W/") for tag in condition.split(",")]
    return known == ["*"] or etag.removeprefix("W/") in known
