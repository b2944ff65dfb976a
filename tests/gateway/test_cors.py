"""Cross-origin requests from browsers."""

from collections.abc import AsyncIterator

import httpx2
import pytest

from consumer.devstack import DevStack
from tests.gateway.conftest import start_gateway

FRONT = "https://front.example"
OTHER = "https://other.example"


@pytest.fixture(scope="module")
def urls(stack: DevStack) -> tuple[str, str]:
    """Return the URLs of a gateway with default settings and of one with an allowed origin."""
    default = start_gateway(stack, "cors-default")
    with_origin = start_gateway(stack, "cors", GATEWAY_CORS_ORIGINS=FRONT)
    return default.url, with_origin.url


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=30) as client:
        yield client


def preflight(origin: str) -> dict[str, str]:
    return {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,idempotency-key,prefer",
    }


async def test_no_origin_is_allowed_by_default(
    http: httpx2.AsyncClient, urls: tuple[str, str]
) -> None:
    for method, headers in (("OPTIONS", preflight(FRONT)), ("GET", {"origin": FRONT})):
        answer = await http.request(method, f"{urls[0]}/v1/models", headers=headers)
        assert "access-control-allow-origin" not in answer.headers


async def test_configured_origins_are_allowed(
    http: httpx2.AsyncClient, urls: tuple[str, str]
) -> None:
    response = await http.options(f"{urls[1]}/infer", headers=preflight(FRONT))
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == FRONT
    assert "idempotency-key" in response.headers["access-control-allow-headers"]
    answer = await http.post(f"{urls[1]}/infer", json={}, headers={"origin": FRONT})
    assert answer.status_code == 400
    assert answer.headers["access-control-allow-origin"] == FRONT
    exposed = answer.headers["access-control-expose-headers"]
    assert "x-request-id" in exposed
    assert "generation-ai-generated" in exposed


async def test_other_origins_are_refused(http: httpx2.AsyncClient, urls: tuple[str, str]) -> None:
    response = await http.options(f"{urls[1]}/infer", headers=preflight(OTHER))
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers
    answer = await http.post(f"{urls[1]}/infer", json={}, headers={"origin": OTHER})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "loopback_only"
