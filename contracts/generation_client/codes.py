"""The `err_code` values of nats-server that the client distinguishes."""

from typing import Final

MESSAGE_NOT_FOUND: Final = 10037  # no message is stored under the subject
JETSTREAM_NOT_ENABLED: Final = 10076  # in the server
JETSTREAM_NOT_ENABLED_FOR_ACCOUNT: Final = 10039
STREAM_NOT_FOUND: Final = 10059
TOO_LARGE_FOR_STREAM: Final = 10054  # over the stream's max_msg_size
STREAM_FULL: Final = 10077  # maximum messages or bytes, with discard=new
