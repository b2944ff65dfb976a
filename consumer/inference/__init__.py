"""The inference thread and the queue that it pulls from.

This package knows nothing of jobs and deliveries. A run has a request, inputs, progress and a
cancel token.
"""
