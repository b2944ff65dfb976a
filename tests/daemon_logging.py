"""The daemon's logging for the length of a test, into a string."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from unittest import mock

import structlog

from consumer.telemetry import configure_logging


@contextmanager
def daemon_logging(log_format: Literal["json", "console"] = "json") -> Iterator[io.StringIO]:
    """Log as the daemon does, and put everything back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # setting up closes what it finds
    written = io.StringIO()
    with mock.patch.object(sys, "stderr", written):
        configure_logging(log_format, "INFO")
        # A logger that is kept would go on writing to this string.
        structlog.configure(cache_logger_on_first_use=False)
        try:
            yield written
        finally:
            structlog.reset_defaults()
            root.handlers[:] = handlers
            root.setLevel(level)
