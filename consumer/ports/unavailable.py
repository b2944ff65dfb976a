"""The exception of a service that cannot be used, whatever the service."""


class Unavailable(Exception):  # noqa: N818 - a state of the service
    """A service cannot be reached or used; the text is one clear line, without secrets."""
