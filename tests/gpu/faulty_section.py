"""A section that does not end well: its name says how."""

import os
import signal
import threading

from tests.gpu.check import Check


def run(check: Check) -> None:
    """Report one row, and then do what the name of the section says."""
    check.row("before", 1, "row")
    if check.section == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if check.section == "raises":
        raise ValueError("two\nlines")
    if check.section == "hangs":
        threading.Event().wait()
