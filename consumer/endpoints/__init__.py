"""The request-reply endpoints of a worker: calls, cancellation and request lookup."""
