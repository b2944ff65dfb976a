"""The logging setup of a process, and the report of a finished job.

Other modules report through plain values (`JobReport`). Nothing here reads a prompt, a secret or a
presigned URL, so none of them can get into a log line or a metric label.

A log line that cannot be written is dropped and counted. The caller continues.
"""

import io
import logging
import os
import select
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TextIO, cast

import structlog

LOG_WRITE_TIMEOUT = 0.1  # seconds that a line waits for space in a full pipe


@dataclass(frozen=True)
class JobReport:
    """One finished job, for metrics and the log.

    Attributes:
        outcome: `succeeded`, a failure code, `cancelled`, `already_done`, `requeued`
            or `abandoned`.
        attempt: How many times the request has been delivered.
        dead_letter: Whether a dead letter was stored for the request.
        unsigned: Number of images that should have been signed and could not be signed.
    """

    outcome: str
    attempt: int
    queued: float = 0.0  # seconds
    inference: float = 0.0  # seconds
    encode: float = 0.0  # seconds
    upload: float = 0.0  # seconds
    dead_letter: bool = False
    unsigned: int = 0


class LogStream(io.TextIOBase):
    """Write text to another stream; a write never raises and never blocks for long.

    A closed pipe (EPIPE), a closed descriptor or a full disk loses the line. So does a reader that
    hangs: when the pipe is full, one line waits for `LOG_WRITE_TIMEOUT` seconds, and later lines
    do not wait until the reader reads again. Before the first line that can be written again, the
    stream writes a line with the number of lost lines.

    Attributes:
        wrapped: The stream that receives the text.

    Args:
        stream: Usually standard error; None if the process was started without it.
        render_loss: Renders the line that reports a number of lost lines.
    """

    encoding = "utf-8"
    lost_lines: ClassVar[int] = 0  # of the process

    def __init__(self, stream: TextIO | None, render_loss: Callable[[int], str]) -> None:
        self.wrapped = stream
        self._render_loss = render_loss
        # Reentrant: the garbage collector may log a warning while this thread writes a line.
        self._lock = threading.RLock()
        self._missing = 0  # lines lost since the last successful write
        self._cut = False  # whether the last line was written only in part
        self._poll = select.poll()
        self._descriptor: int | None = None
        try:
            if stream is not None:
                self._descriptor = stream.fileno()
                self._poll.register(self._descriptor, select.POLLOUT)
        except (OSError, ValueError):  # not a file: io.UnsupportedOperation has both as bases
            self._descriptor = None

    def write(self, text: str) -> int:
        """Write text, or count its lines as lost."""
        with self._lock:
            try:
                if self._missing:
                    self._send(f"{self._render_loss(self._missing)}\n")
                    self._missing = 0
                self._send(text)
            except (OSError, ValueError):  # ValueError: the stream is closed
                lines = text.count("\n")
                self._missing += lines
                LogStream.lost_lines += lines
        return len(text)

    def fileno(self) -> int:
        """Return the descriptor of the wrapped stream; faulthandler writes to it."""
        if self._descriptor is None:
            raise io.UnsupportedOperation("fileno")
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether the wrapped stream is a terminal."""
        return self._descriptor is not None and os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True."""
        return True

    def _send(self, text: str) -> None:
        if self._descriptor is None:
            if self.wrapped is None:
                raise ValueError("there is no standard error")
            self.wrapped.write(text)
            self.wrapped.flush()
            return
        # Bypass the buffer of the wrapped stream: it would retain the failed data and fail again.
        data = (b"\n" if self._cut else b"") + text.encode(errors="backslashreplace")
        sent = 0
        while sent < len(data):
            # A pipe that polls as writable accepts PIPE_BUF bytes; a longer write could block.
            if not self._poll.poll(0 if self._missing else LOG_WRITE_TIMEOUT * 1000):
                self._cut = self._cut or sent > 0
                raise BlockingIOError
            sent += os.write(self._descriptor, data[sent : sent + select.PIPE_BUF])
        self._cut = False


def configure_logging(log_format: Literal["json", "console"], level: str) -> None:
    """Set up structlog for the process, on standard error.

    `sys.stderr` is replaced by a `LogStream`, so writes by libraries cannot raise either.

    Args:
        log_format: `json` writes one JSON object per line, `console` writes lines for people.
        level: The lowest level that is logged.
    """

    def render_loss(lines: int) -> str:
        rendered: Any = {"event": "log_lines_lost", "lines": lines}
        for process in (*shared, *render):
            rendered = process(None, "warning", rendered)
        return str(rendered)

    present = sys.stderr
    # Repeated calls do not stack one LogStream on another.
    stream = LogStream(present.wrapped if isinstance(present, LogStream) else present, render_loss)
    sys.stderr = cast("TextIO", stream)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks leave out the frames' variables: they contain prompts and secrets. Reading them
    # also makes a reference cycle of frame and exception that keeps a run's tensors alive.
    tracebacks = structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    )
    render: list[structlog.typing.Processor] = (
        [tracebacks, structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [
            structlog.dev.ConsoleRenderer(
                colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    )
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries log through the standard logging module: warnings and above, in the same format.
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)
