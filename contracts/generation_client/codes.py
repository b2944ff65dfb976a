"""The `err_code`s of nats-server that a publish is refused with."""

from typing import Final

TOO_LARGE_FOR_STREAM: Final = 10054  # over the stream's max_msg_size
STREAM_FULL: Final = 10077  # maximum messages or bytes, with discard=new
