"""The model is well, and the process looks at its store all the time, not every few seconds."""

from consumer.app import daemon
from tests.faults.causes.impatient import make_runner

__all__ = ["make_runner"]

daemon.STORE_CHECK_INTERVAL = daemon.STORE_RECHECK_INTERVAL = 0.2
