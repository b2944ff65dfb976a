"""No fault: the beginnings of the runs are noted with their times."""

from consumer.settings import Settings
from tests.faults.moments import TimedRunner


def make_runner(_: Settings) -> TimedRunner:
    return TimedRunner()
