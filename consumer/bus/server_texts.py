"""Recognizes conditions that the server reports as text only.

A protocol error (`-ERR`) and the status message of a pull have no error code, or one code for
several causes. Only this module compares such texts.
"""

NO_RESPONDERS = "503"


def is_credentials_error(error: str) -> bool:
    """Return whether a protocol error is about the credentials of the connection."""
    return "authorization" in error.lower()


def is_permission_error(error: str) -> bool:
    """Return whether a protocol error is about a subject that the user may not use."""
    return "permissions violation" in error.lower()


def is_durable_missing(code: str, description: str) -> bool:
    """Return whether the status of a pull means a missing pull consumer; most causes share 409."""
    return code == NO_RESPONDERS or "Deleted" in description or "push based" in description


def is_server_shutdown(description: str) -> bool:
    """Return whether the status of a pull means that the server is shutting down."""
    return description == "Server Shutdown"
