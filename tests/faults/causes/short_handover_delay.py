"""A worker soon hands over a request whose outputs cannot be stored."""

from consumer.jobs import image_stages
from tests.faults.causes.none import make_runner
from tests.faults.store_times import shorten

__all__ = ["make_runner"]

shorten(read_timeout=0.3, attempt_timeout=0.5, deadline=0.7)
image_stages.HANDOVER_DELAY = 0.5
