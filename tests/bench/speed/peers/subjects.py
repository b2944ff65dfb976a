"""The streams and subjects of the FastStream peer."""

REQUESTS_STREAM = "SPEED_REQUESTS"
REQUEST = "speed.request"
RESULTS_STREAM = "SPEED_RESULTS"
RESULTS = "speed.result.*"


def result(request_id: str) -> str:
    """Return the subject of one result."""
    return f"speed.result.{request_id}"
