"""The `err_code`s of nats-server that this package handles."""

from typing import Final

from generation_client.codes import STREAM_FULL, TOO_LARGE_FOR_STREAM

__all__ = [
    "CONSUMER_NOT_FOUND",
    "MESSAGE_NOT_FOUND",
    "NO_STORAGE",
    "STREAM_FULL",
    "STREAM_NOT_FOUND",
    "SUBJECTS_OVERLAP",
    "TOO_LARGE_FOR_STREAM",
    "WRONG_LAST_SEQUENCE",
]

CONSUMER_NOT_FOUND: Final = 10014
MESSAGE_NOT_FOUND: Final = 10037
NO_STORAGE: Final = 10047  # max_bytes does not fit the account or the server
STREAM_NOT_FOUND: Final = 10059
SUBJECTS_OVERLAP: Final = 10065  # with the subjects of another stream
# The last message of the subject is not the expected one. In a cluster the second code is also the
# reply while another message for the subject is being stored.
WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})
