"""No fault: the runner of the settings, from the folder of the examples or of a test."""

import os
import sys
from pathlib import Path

from consumer.app.composition import make_runner

EXAMPLES = Path(__file__).parents[3] / "docs/examples/runners"
sys.path[:0] = [os.environ.get("RUNNERS_FOLDER") or str(EXAMPLES)]

__all__ = ["make_runner"]
