"""A process does not renew the lease of its delivery, and its run waits."""

from consumer.bus.delivery import JetStreamDelivery
from consumer.jobs.lease import Lease
from tests.faults.causes.held_until_released import make_runner

__all__ = ["make_runner"]


async def _hold_without_a_beat(lease: Lease) -> Lease:
    return lease


async def _say_nothing(_: JetStreamDelivery) -> None:
    pass


# These patches disable all renewals of leases.
Lease.__aenter__ = _hold_without_a_beat  # type: ignore[assignment, method-assign]
JetStreamDelivery.extend = _say_nothing  # type: ignore[assignment, method-assign]
