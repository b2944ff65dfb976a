"""No fault: the worker that takes over."""

from consumer.settings import Settings
from tests.support.quick_runner import QuickRunner


def make_runner(_: Settings) -> QuickRunner:
    return QuickRunner()
