"""The logging configuration of the daemon for the duration of a test, with a string as output."""

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
    """Log as the daemon does, to a string."""
    written = io.StringIO()
    with logging_to(written, log_format):
        yield written


@contextmanager
def logging_to(
    stream: TextIO | None, log_format: Literal["json", "console"] = "json"
) -> Iterator[None]:
    """Log as the daemon does to a stream, and restore the logging configuration afterwards."""
    root = logging.getLogger()
    handlers, level, before = root.handlers[:], root.level, structlog.get_config()
    root.handlers.clear()  # `configure_logging` closes existing handlers
    with mock.patch.object(sys, "stderr", stream):
        configure_logging(log_format, "INFO")
        # A cached logger would continue to write to this string after the test.
        structlog.configure(cache_logger_on_first_use=False)
        try:
            yield
        finally:
            structlog.configure(**before)
            root.handlers[:] = handlers
            root.setLevel(level)
