"""Probes and metrics of a gateway; they need no key and contain no private data.

`/healthz` returns 200 while the event loop runs. `/readyz` returns each readiness condition in
JSON. `/metrics` is Prometheus text.
"""

from http import HTTPStatus

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from consumer.gateway.context import Gateway
from consumer.gateway.in_flight import InFlight

router = APIRouter(tags=["operations"])


def conditions(gateway: Gateway, in_flight: InFlight) -> dict[str, str | None]:
    """Return each readiness condition with None, or the reason why it is not met."""
    gateway.keys.reload()  # a gateway that is not ready gets no requests, which reload the keys
    return {
        "bus": None if gateway.bus.connected else "not connected",
        "keys": None if gateway.keys.usable else "unusable",
        "gateway": "draining" if in_flight.draining else None,
    }


@router.get("/healthz", response_class=PlainTextResponse, summary="Liveness")
async def healthz() -> str:
    """Return 200 while the event loop runs."""
    return "ok\n"


@router.get(
    "/readyz",
    summary="Readiness",
    responses={HTTPStatus.SERVICE_UNAVAILABLE: {"description": "A condition is not met."}},
)
async def readyz(request: Request) -> JSONResponse:
    """Return 200 if all conditions are met, otherwise 503; the body lists all conditions."""
    found = conditions(request.app.state.gateway, request.app.state.in_flight)
    ready = all(reason is None for reason in found.values())
    shown = {name: reason or "ok" for name, reason in found.items()}
    return JSONResponse(shown, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)


@router.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    """Return the metrics of this gateway."""
    gateway: Gateway = request.app.state.gateway
    in_flight: InFlight = request.app.state.in_flight
    text = gateway.metrics.exposition(
        requests=in_flight.requests,
        streams=in_flight.streams,
        event_bytes=gateway.log.size,
        conditions=conditions(gateway, in_flight),
    )
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})
