"""The inference thread and the queue that it pulls from.

Nothing here knows what a job is: a run has a request, its inputs, a progress and a cancel token.
"""
