"""The model works, and the process checks its store continuously."""

from consumer.app import daemon
from tests.faults.causes.short_store_timeouts import make_runner

__all__ = ["make_runner"]

daemon.STORE_CHECK_INTERVAL = daemon.STORE_RECHECK_INTERVAL = 0.2
