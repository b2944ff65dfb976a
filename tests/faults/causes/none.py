"""No fault: the worker that takes over."""

from consumer.settings import Settings
from tests.faults.quick_runner import QuickRunner


def make_runner(_: Settings) -> QuickRunner:
    return QuickRunner()
