"""A process does not renew the lease of its delivery, and waits as in `held_at_result`."""

from tests.faults.causes import held_at_result, lease_not_renewed

__all__ = ["lease_not_renewed", "make_runner"]

make_runner = held_at_result.make_runner
