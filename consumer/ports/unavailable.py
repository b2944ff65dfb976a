"""The common exception for a service that cannot be used."""


class Unavailable(Exception):  # noqa: N818 - a state of the service
    """A service cannot be reached or used; the text is one line without secrets."""
