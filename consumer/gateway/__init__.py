"""The HTTP gateway: OpenAI's API, jobs, events and a live page in front of the queue.

A stateless process that sends requests and reads results as every other sender does. It loads no
model and keeps no database: any number of gateways work behind a load balancer.
"""
