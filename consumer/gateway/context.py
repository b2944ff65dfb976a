"""The components of the gateway, as a dependency of the endpoints."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from consumer.bus.connection import Bus
from consumer.gateway.bounds import Limits
from consumer.gateway.catalogue import Catalogue
from consumer.gateway.event_log import EventLog
from consumer.gateway.jobs import Job, Jobs
from consumer.gateway.keys import Keys
from consumer.gateway.metrics import GatewayMetrics
from consumer.settings import Settings
from generation_client import GenerationClient


@dataclass
class Gateway:
    """The components of one gateway; `request.app.state.gateway`."""

    settings: Settings
    bus: Bus
    client: GenerationClient
    log: EventLog
    jobs: Jobs
    keys: Keys
    limits: Limits
    catalogue: Catalogue
    metrics: GatewayMetrics


# Dependencies are coroutines: FastAPI runs plain functions in threads.
async def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


GatewayPart = Annotated[Gateway, Depends(_gateway)]


def note_job(request: Request, job: Job) -> None:
    """Put the job's id into the access log and into the header `X-Request-Id`."""
    request.state.job_id = job.id
