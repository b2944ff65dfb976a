"""The request-reply endpoints of a worker: calls, cancellation and questions about a request."""
