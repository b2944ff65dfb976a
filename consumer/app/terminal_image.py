"""Display of an image in terminals that can: with Kitty's graphics protocol or sixels."""

import os
import sys
from pathlib import Path

from rich.console import Console

COLUMNS = 40  # width of the displayed image; an image of 64 pixels is a stamp otherwise
_NO_GRAPHICS = ("dumb", "linux", "unknown")  # values of TERM; these would print the query as text


def show_image(file: Path) -> bool:
    """Display an image file enlarged on standard output.

    Returns:
        Whether the terminal can display images; without a terminal nothing is written.
    """
    if os.environ.get("TERM", "dumb") in _NO_GRAPHICS:
        return False
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    # Imported here, because the import asks the terminal what it can display.
    from textual_image.renderable import Image, SixelImage, TGPImage  # noqa: PLC0415

    if not issubclass(Image, SixelImage | TGPImage):
        return False
    Console().print(Image(file, width=COLUMNS))
    return True
