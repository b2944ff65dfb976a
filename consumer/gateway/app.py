"""The HTTP application: its components, lifespan, routes and middleware."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from consumer.bus.connection import connect
from consumer.bus.queue_view import QueueView
from consumer.bus.services import worker_metadata
from consumer.gateway import (
    health,
    infer,
    jobs_api,
    openai_chat,
    openai_edits,
    openai_images,
    openai_models,
    page,
)
from consumer.gateway.bounds import Limits
from consumer.gateway.catalogue import Catalogue
from consumer.gateway.context import Gateway
from consumer.gateway.error_handlers import install_error_handlers
from consumer.gateway.event_log import EventLog
from consumer.gateway.in_flight import InFlight, InFlightMiddleware
from consumer.gateway.job_document import ErrorDetails
from consumer.gateway.job_list import JobList
from consumer.gateway.jobs import Jobs
from consumer.gateway.keys import Keys
from consumer.gateway.metrics import GatewayMetrics
from consumer.gateway.middleware import (
    BodyLimit,
    HandledRequest,
    KeyCheck,
    RequestLog,
    UnknownErrors,
    log_request,
)
from consumer.gateway.open_access import LoopbackOnly
from consumer.gateway.store_client import StoreClient
from consumer.settings import Settings
from generation_contracts.base import DEFAULT_QUEUES

__all__ = ["Gateway", "create_app", "open_gateway"]

CONNECT_WITHIN = 30.0  # seconds; a gateway and its NATS server may start at the same time
EXPOSED = [
    *("generation-ai-generated", "location", "preference-applied", "retry-after"),
    *("x-request-id", "x-should-retry"),
]

# Each module of endpoints has one `router`; the application includes them in this order.
ROUTERS: list[APIRouter] = [
    openai_images.router,
    openai_edits.router,
    openai_chat.router,
    openai_models.router,
    infer.router,
    jobs_api.router,
    health.router,
    page.router,
]


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetails


@asynccontextmanager
async def open_gateway(settings: Settings, metrics: GatewayMetrics) -> AsyncIterator[Gateway]:
    """Connect to NATS and create the components of a gateway.

    Raises:
        BusUnavailable: NATS cannot be reached or used; the text is one line.
        KeysUnusable: The key file cannot be used.
    """
    keys = Keys(settings.gateway_keys)
    bus = await connect(settings, name="generation gateway", within=CONNECT_WITHIN)
    try:
        client = StoreClient(bus, settings)
        log = EventLog(
            seconds=settings.gateway_events_kept, most_bytes=settings.gateway_events_bytes
        )
        durables = {str(task): settings.durable(task) for task in DEFAULT_QUEUES}
        view = QueueView(bus, settings.subjects, durables)

        ids = JobList(view)
        limits = Limits(ids.unfinished, input_prefixes=settings.gateway_input_prefixes)
        jobs = Jobs(bus, client, settings, events=log, view=view, ids=ids, limits=limits)
        await jobs.open()
        try:
            yield Gateway(
                settings=settings,
                bus=bus,
                client=client,
                log=log,
                jobs=jobs,
                keys=keys,
                limits=limits,
                catalogue=Catalogue(partial(worker_metadata, bus), read_queues=view.queues),
                metrics=metrics,
            )
        finally:
            await jobs.close()
    finally:
        await bus.close()


def create_app(settings: Settings) -> FastAPI:
    """Create the application; it connects to NATS when its lifespan starts."""
    metrics = GatewayMetrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_gateway(settings, metrics) as gateway:
            app.state.gateway = gateway
            yield

    error: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorBody, "description": "An error."} for code in ("4XX", "5XX")
    }
    app = FastAPI(
        title="Generation gateway",
        version=version("generation-consumer"),
        description="Images from texts and texts about images, behind a durable queue.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads scripts from other hosts; `page` serves its own
        redoc_url=None,
        responses=error,
    )
    app.state.in_flight = InFlight(metrics.refused)
    install_error_handlers(app, ROUTERS)
    for router in ROUTERS:
        app.include_router(router)
    _add_middleware(app, settings, observe=_observer(metrics))
    return app


def _add_middleware(
    app: FastAPI, settings: Settings, *, observe: Callable[[HandledRequest], None]
) -> None:
    # The middleware that is added last is the outermost.
    app.add_middleware(KeyCheck)
    app.add_middleware(UnknownErrors)
    app.add_middleware(
        BodyLimit,
        most_bytes=settings.gateway_max_body,
        most_in_all=settings.gateway_bodies_bytes,
    )
    if settings.gateway_keys is None:
        app.add_middleware(LoopbackOnly, origins=settings.gateway_cors_origins)
    app.add_middleware(InFlightMiddleware, in_flight=app.state.in_flight)
    if settings.gateway_cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.gateway_cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    app.add_middleware(RequestLog, observers=[log_request, observe])


def _observer(metrics: GatewayMetrics) -> Callable[[HandledRequest], None]:
    def observe(request: HandledRequest) -> None:
        metrics.request_ended(request.method, request.route, request.status, request.seconds)

    return observe
