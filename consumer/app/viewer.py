"""Opening of a file with the viewer of the desktop."""

import subprocess
import sys
from pathlib import Path

START_WITHIN = 5.0  # seconds in which the program reports that it cannot open the file
_PROGRAM = "open" if sys.platform == "darwin" else "xdg-open"


def open_file(file: Path) -> str | None:
    """Open a file; return when the viewer runs.

    Returns:
        None, or why the file cannot be opened, in one line.
    """
    try:
        opening = subprocess.Popen(  # noqa: S603 - no shell
            [_PROGRAM, str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # xdg-open prints one line for each missing browser
            start_new_session=True,  # Ctrl-C and the end of this process leave the viewer open
        )
    except OSError as error:
        return f"{_PROGRAM}: {error.strerror}"
    try:
        code = opening.wait(START_WITHIN)
    except subprocess.TimeoutExpired:
        return None  # some viewers run in this process until they are closed
    return f"{_PROGRAM} ended with exit code {code}" if code else None
