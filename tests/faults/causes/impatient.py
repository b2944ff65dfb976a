"""The model is well, and the process waits less long for its store than it does otherwise.

A silent store would hold a try for 20 s, and its operation may try for a minute before the job
hears of it.
"""

from tests.faults.causes.none import make_runner
from tests.faults.store_times import shorten

__all__ = ["make_runner"]

shorten(read_timeout=0.3, attempt_timeout=0.5, deadline=0.7)
