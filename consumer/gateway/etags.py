"""Conditional requests: whether a client has a file already."""


def matches(condition: str, etag: str) -> bool:
    """Whether the value of `If-None-Match` names an entity tag."""
    known = [tag.strip().removeprefix("W/") for tag in condition.split(",")]
    return known == ["*"] or etag.removeprefix("W/") in known
