"""The daemon's logging for the length of a test, into a string."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TextIO
from unittest import mock

import structlog

from consumer.telemetry import configure_logging


@contextmanager
def daemon_logging(log_format: Literal["json", "console"] = "json") -> Iterator[io.StringIO]:
    """Log as the daemon does, into a string."""
    written = io.StringIO()
    with logging_to(written, log_format):
        yield written


@contextmanager
def logging_to(
    stream: TextIO | None, log_format: Literal["json", "console"] = "json"
) -> Iterator[None]:
    """Log as the daemon does to this standard error, and put everything back afterwards."""
    root = logging.getLogger()
    handlers, level, before = root.handlers[:], root.level, structlog.get_config()
    root.handlers.clear()  # setting up closes what it finds
    with mock.patch.object(sys, "stderr", stream):
        configure_logging(log_format, "INFO")
        # A logger that is kept would go on writing to this string.
        structlog.configure(cache_logger_on_first_use=False)
        try:
            yield
        finally:
            structlog.configure(**before)
            root.handlers[:] = handlers
            root.setLevel(level)
