"""The `err_code`s of nats-server that mean something to this package."""

from typing import Final

CONSUMER_NOT_FOUND: Final = 10014
TOO_LARGE_FOR_STREAM: Final = 10054  # over the stream's max_msg_size
STREAM_NOT_FOUND: Final = 10059
WRONG_LAST_SEQUENCE: Final = 10071  # the subject has another message than expected
STREAM_FULL: Final = 10077  # maximum messages or bytes, with discard=new
