"""The HTTP gateway: OpenAI's API, jobs, events and a live page in front of the queue.

A gateway is a stateless process that sends requests and reads results like any other sender. It
loads no model and has no database, so any number of gateways can run behind a load balancer.
"""
