"""No fault."""

from consumer.settings import Settings
from tests.support.quick_runner import QuickRunner


def make_runner(_: Settings) -> QuickRunner:
    return QuickRunner()
