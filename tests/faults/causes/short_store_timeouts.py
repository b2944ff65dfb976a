"""The model works, and the process has shorter timeouts for its store.

With the normal timeouts, an attempt without a response takes 20 s, and retries take a minute.
"""

from tests.faults.causes.none import make_runner
from tests.faults.store_times import shorten

__all__ = ["make_runner"]

shorten(read_timeout=0.3, attempt_timeout=0.5, deadline=0.7)
