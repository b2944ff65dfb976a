"""A process that holds a delivery without renewing its lease, in a run that is held."""

from consumer.bus.delivery import JetStreamDelivery
from consumer.jobs.lease import Lease
from tests.faults.causes.held_until_released import make_runner

__all__ = ["make_runner"]


async def _hold_without_a_beat(lease: Lease) -> Lease:
    return lease


async def _say_nothing(_: JetStreamDelivery) -> None:
    pass


# Whatever renews a lease is told here that it shall not.
Lease.__aenter__ = _hold_without_a_beat  # type: ignore[assignment, method-assign]
JetStreamDelivery.extend = _say_nothing  # type: ignore[assignment, method-assign]
