"""Where the FastStream peer takes its requests from, and where it publishes its results."""

REQUESTS_STREAM = "SPEED_REQUESTS"
REQUEST = "speed.request"
RESULTS_STREAM = "SPEED_RESULTS"
RESULTS = "speed.result.*"


def result(request_id: str) -> str:
    """The subject of one result."""
    return f"speed.result.{request_id}"
