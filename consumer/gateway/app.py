"""The HTTP application: its parts, its lifespan, its routes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from consumer.bus.connection import connect
from consumer.gateway.catalogue import Catalogue
from consumer.gateway.context import Gateway
from consumer.gateway.error_handlers import install_error_handlers
from consumer.gateway.event_log import EventLog
from consumer.gateway.jobs import Jobs
from consumer.gateway.middleware import BodyLimit, RequestLog, log_request
from consumer.gateway.tenants import OPEN_TAG, Caller, Tenant
from consumer.settings import Settings
from generation_client import GenerationClient

CONNECT_WITHIN = 30.0  # seconds; a gateway and its NATS server may start at the same time

# Each module of endpoints has one `router`; they are included in this order.
ROUTERS: list[APIRouter] = []


class _OpenKeys:
    """Without keys there is one tenant, and every caller belongs to it."""

    def caller(self, authorization: str | None) -> Caller:  # noqa: ARG002 - no key is asked for
        """Return the only caller."""
        return Caller(Tenant("open", OPEN_TAG, b"open"))


@asynccontextmanager
async def open_gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """Connect to NATS and make the parts of a gateway.

    Raises:
        BusUnavailable: With one clear line.
    """
    bus = await connect(settings, name="generation gateway", within=CONNECT_WITHIN)
    try:
        client = GenerationClient(bus.client, root=settings.subjects.root)
        log = EventLog(
            seconds=settings.gateway_events_kept, most_bytes=settings.gateway_events_bytes
        )
        yield Gateway(
            settings=settings,
            bus=bus,
            client=client,
            log=log,
            jobs=Jobs(),
            keys=_OpenKeys(),
            catalogue=Catalogue(),
        )
    finally:
        await bus.close()


def create_app(settings: Settings) -> FastAPI:
    """Make the application; it connects to NATS when the server starts it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_gateway(settings) as gateway:
            app.state.gateway = gateway
            yield

    app = FastAPI(
        title="Generation gateway",
        version=version("generation-consumer"),
        description="Images from texts and texts about images, behind a durable queue.",
        lifespan=lifespan,
    )
    install_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, most_bytes=settings.gateway_max_body)
    if settings.gateway_cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.gateway_cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["location", "retry-after", "x-request-id", "x-should-retry"],
        )
    app.add_middleware(RequestLog, observers=[log_request])
    return app
