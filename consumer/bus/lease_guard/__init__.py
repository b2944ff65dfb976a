"""The lease guard: a process that renews leases while the worker cannot."""
