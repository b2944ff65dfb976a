"""Logs: structlog set up once; and what is told of a finished job, for logs and metrics.

Other parts tell what happened through plain values (`JobReport`); nothing here reads a prompt, a
secret or a presigned URL, so none can get into a log or a label.

Logging decides nothing: a line that cannot be written is counted and lost, and the caller goes on.
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

LOG_PATIENCE = 0.1  # seconds that a line waits for a reader that has read all lines before it


@dataclass(frozen=True)
class JobReport:
    """One finished job, for metrics and the log.

    Attributes:
        outcome: `succeeded`, a failure code, `cancelled`, `already_done`, `given_back` or
            `abandoned`.
        attempt: How often the request has been delivered.
        dead_letter: Whether it was put aside.
    """

    outcome: str
    attempt: int
    queued: float = 0.0  # seconds
    inference: float = 0.0  # seconds
    encode: float = 0.0  # seconds
    upload: float = 0.0  # seconds
    dead_letter: bool = False


class LogStream(io.TextIOBase):
    """A text stream over another one; writing never raises, and never waits for long.

    A reader that has gone away (EPIPE), a closed descriptor and a full disk cost the line. So does
    a reader that hangs: once the pipe is full, one line waits `LOG_PATIENCE` seconds, and the next
    ones do not wait until something is read again. The first line that can be written afterwards
    is preceded by one that says how many are missing.

    Attributes:
        below: The other one.

    Args:
        stream: Usually standard error; None where the process was started without it.
        render_loss: Makes the line about so many lost lines.
    """

    encoding = "utf-8"
    lost_lines: ClassVar[int] = 0  # of the process

    def __init__(self, stream: TextIO | None, render_loss: Callable[[int], str]) -> None:
        self.below = stream
        self._render_loss = render_loss
        # Reentrant: the garbage collector may log a warning while this thread writes a line.
        self._lock = threading.RLock()
        self._missing = 0  # lines lost since the last one that was written
        self._cut = False  # whether the last line lacks its end
        self._poll = select.poll()
        self._descriptor: int | None = None
        try:
            if stream is not None:
                self._descriptor = stream.fileno()
                self._poll.register(self._descriptor, select.POLLOUT)
        except (OSError, ValueError):  # not a file; io.UnsupportedOperation is both
            self._descriptor = None

    def write(self, text: str) -> int:
        """Write text, or count its lines as lost."""
        with self._lock:
            try:
                if self._missing:
                    self._send(f"{self._render_loss(self._missing)}\n")
                    self._missing = 0
                self._send(text)
            except (OSError, ValueError):  # ValueError: the stream has been closed
                lines = text.count("\n")
                self._missing += lines
                LogStream.lost_lines += lines
        return len(text)

    def fileno(self) -> int:
        """The descriptor of the stream below; faulthandler writes to it."""
        if self._descriptor is None:
            raise io.UnsupportedOperation("fileno")
        return self._descriptor

    def isatty(self) -> bool:
        """Whether a person reads it."""
        return self._descriptor is not None and os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Always."""
        return True

    def _send(self, text: str) -> None:
        if self._descriptor is None:
            if self.below is None:
                raise ValueError("there is no standard error")
            self.below.write(text)
            self.below.flush()
            return
        # Past the stream's own buffer, which would keep what failed and fail with it again.
        data = (b"\n" if self._cut else b"") + text.encode(errors="backslashreplace")
        sent = 0
        while sent < len(data):
            # A pipe that is ready takes so much at once; more could block.
            if not self._poll.poll(0 if self._missing else LOG_PATIENCE * 1000):
                self._cut = self._cut or sent > 0
                raise BlockingIOError
            sent += os.write(self._descriptor, data[sent : sent + select.PIPE_BUF])
        self._cut = False


def configure_logging(log_format: Literal["json", "console"], level: str) -> None:
    """Set up structlog for the process: one JSON object a line on standard error, or for people.

    `sys.stderr` becomes a `LogStream`, so that what libraries write there cannot raise either.
    """

    def render_loss(lines: int) -> str:
        rendered: Any = {"event": "log_lines_lost", "lines": lines}
        for process in (*shared, *render):
            rendered = process(None, "warning", rendered)
        return str(rendered)

    below = sys.stderr
    # One stream on the descriptor, however often this is called.
    stream = LogStream(below.below if isinstance(below, LogStream) else below, render_loss)
    sys.stderr = cast("TextIO", stream)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks without the frames' variables: those are prompts and secrets, and looking at them
    # makes a cycle of the frame and its exception that keeps a run's tensors.
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
    # What the libraries say by the standard logging: warnings and above, in the same form.
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)
