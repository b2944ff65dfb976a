"""The standby renews the leases that it is told of once it hears no more of them."""

import os
import signal

from consumer.bus.standby import Standby
from tests.integration.bus_installation import Installation, bus_settings, soon

LEASE = "lease.1"
ACK_WAIT = 1.0  # seconds


async def test_leases_that_were_told_before_it_ran_are_renewed_over_its_own_death(
    installation: Installation,
) -> None:
    standby = Standby(bus_settings(installation.server.url))
    beats = await installation.listen(LEASE)
    standby.renewed("lease.over", ACK_WAIT)
    standby.renewed(LEASE, ACK_WAIT)
    standby.let_lapse("lease.over")
    over = await installation.listen("lease.over")
    await standby.start()
    try:
        for _ in range(2):
            for _ in range(3):
                message = await soon(beats.next_msg(timeout=None))
                assert message.data == b"+WPI"
            first = standby.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            while beats.pending_msgs:
                await beats.next_msg()
        await soon(beats.next_msg(timeout=None))
        assert standby.pid != first
        assert over.pending_msgs == 0
    finally:
        await standby.close()
    assert standby.pid is None


async def test_what_is_not_started_is_told_nothing_and_closes() -> None:
    standby = Standby(bus_settings("nats://127.0.0.1:1"))
    standby.renewed(LEASE, ACK_WAIT)
    standby.let_lapse(LEASE)
    standby.let_lapse(LEASE)
    await standby.close()
    assert standby.pid is None
