"""The `err_code`s of nats-server that mean something to this package."""

from typing import Final

from generation_client.codes import STREAM_FULL, TOO_LARGE_FOR_STREAM

__all__ = [
    "CONSUMER_NOT_FOUND",
    "NO_MESSAGE",
    "NO_STORAGE",
    "OCCUPIED",
    "STREAM_FULL",
    "STREAM_NOT_FOUND",
    "SUBJECTS_OVERLAP",
    "TOO_LARGE_FOR_STREAM",
]

CONSUMER_NOT_FOUND: Final = 10014
NO_MESSAGE: Final = 10037
NO_STORAGE: Final = 10047  # max_bytes does not fit the account or the server
STREAM_NOT_FOUND: Final = 10059
SUBJECTS_OVERLAP: Final = 10065  # with those of another stream
# The subject has another message than expected; in a cluster, or one is being stored.
OCCUPIED: Final = frozenset({10071, 10164})
