"""What the server says in words only.

A protocol error (`-ERR`) and the status line of a pull have no error code, or one code for several
causes. So their texts are compared, and only in this module.
"""

NO_RESPONDERS = "503"


def says_credentials_are_refused(error: str) -> bool:
    """Whether a protocol error is about the credentials of the connection."""
    return "authorization" in error.lower()


def says_permission_is_missing(error: str) -> bool:
    """Whether a protocol error is about a subject that the user may not use."""
    return "permissions violation" in error.lower()


def says_durable_is_missing(code: str, description: str) -> bool:
    """Whether a pull's status says that there is no such pull consumer. Most causes share 409."""
    return code == NO_RESPONDERS or "Deleted" in description or "push based" in description


def says_shutdown(description: str) -> bool:
    """Whether a pull's status says that the server is about to stop."""
    return description == "Server Shutdown"
