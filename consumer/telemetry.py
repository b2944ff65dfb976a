"""Logs: structlog set up once; and what is told of a finished job, for logs and metrics.

Other parts tell what happened through plain values (`JobReport`); nothing here reads a prompt, a
secret or a presigned URL, so none can get into a log or a label.
"""

import logging
import sys
from dataclasses import dataclass
from typing import Literal

import structlog


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


def configure_logging(log_format: Literal["json", "console"], level: str) -> None:
    """Set up structlog for the process: one JSON object a line on standard error, or for people."""
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
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)
