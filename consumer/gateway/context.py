"""What every endpoint uses: the parts of the gateway, and who calls."""

from dataclasses import dataclass
from typing import Annotated, Protocol

from fastapi import Depends, Request

from consumer.bus.connection import Bus
from consumer.gateway.catalogue import Catalogue
from consumer.gateway.event_log import EventLog
from consumer.gateway.jobs import Job, Jobs
from consumer.gateway.tenants import Caller
from consumer.settings import Settings
from generation_client import GenerationClient


class Keys(Protocol):
    """Says who a caller is."""

    def caller(self, authorization: str | None) -> Caller:
        """Read the `Authorization` header.

        Raises:
            ApiError: 401: no key, or an unknown one.
        """


@dataclass
class Gateway:
    """The parts of one gateway; `request.app.state.gateway`."""

    settings: Settings
    bus: Bus
    client: GenerationClient
    log: EventLog
    jobs: Jobs
    keys: Keys
    catalogue: Catalogue


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _caller(request: Request) -> Caller:
    caller = _gateway(request).keys.caller(request.headers.get("authorization"))
    request.state.key_id = caller.key_id
    return caller


GatewayPart = Annotated[Gateway, Depends(_gateway)]
AuthenticatedCaller = Annotated[Caller, Depends(_caller)]


def note_job(request: Request, job: Job) -> None:
    """Put the job's id into the access log and into the header `X-Request-Id`."""
    request.state.job_id = job.id
