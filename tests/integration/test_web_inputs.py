"""Input images over https, from a real TLS server: accepted, redirected and refused ones."""

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trustme
from aiohttp import web

from consumer.artifacts import web_inputs
from consumer.artifacts.calls import Calls
from consumer.artifacts.web_inputs import Address, WebInputs
from consumer.devstack import free_ports
from consumer.ports.media import InputUnavailable

HOST = "images.test"
IMAGE = b"\x89PNG and so on"
LOOPBACK = ipaddress.ip_address("127.0.0.1")


class Server:
    """A host of images.

    Attributes:
        origin: The origin of its URLs.
        paths: The path of every received request.
        ca: The certificate of the authority that signed its certificate.
    """

    def __init__(self, folder: Path) -> None:
        (self.port,) = free_ports(1)
        self.origin = f"https://{HOST}:{self.port}"
        self.paths: list[str] = []
        self.ca = folder / "ca.pem"
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca)
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(HOST).configure_cert(self._context)
        self.runner: web.AppRunner

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port, ssl_context=self._context).start()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path_qs)
        assert request.headers["Host"] == f"{HOST}:{self.port}"
        if to := request.query.get("to"):
            raise web.HTTPFound(to)
        if request.path == "/missing":
            raise web.HTTPNotFound
        if request.path == "/drip":
            drip = web.StreamResponse(headers={"Content-Length": "1000000"})
            await drip.prepare(request)
            await drip.write(b"x")
            await asyncio.get_running_loop().create_future()  # never completes
        return web.Response(body=IMAGE)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    host = Server(tmp_path)
    await host.start()
    yield host
    await host.runner.cleanup()


@pytest.fixture
def calls() -> Iterator[Calls]:
    threads = Calls()
    yield threads
    threads.close()


class Resolver:
    """Returns fixed addresses, and records the resolved hosts."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = [ipaddress.ip_address(address) for address in addresses]
        self.hosts: list[str] = []

    def __call__(self, host: str, port: int) -> list[Address]:
        self.hosts.append(f"{host}:{port}")
        return self.addresses


def inputs(server: Server, calls: Calls, *hosts: str, resolve: Resolver | None = None) -> WebInputs:
    """Return the reader of a worker, for which loopback counts as public network."""
    return WebInputs(
        hosts or (f"{HOST}:{server.port}",),
        calls,
        resolve=resolve or Resolver("127.0.0.1"),
        may_connect=lambda address: address == LOOPBACK,
        ca_certs=str(server.ca),
    )


async def fetch_error(reader: WebInputs, url: str, max_bytes: int = 1_000) -> str:
    with pytest.raises(InputUnavailable) as caught:
        await reader.fetch(url, max_bytes=max_bytes)
    assert "test" not in str(caught.value), "the error contains an address"
    return str(caught.value)


async def test_an_image_of_a_configured_host_is_read(
    server: Server, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # the reader uses no proxy
    resolve = Resolver("127.0.0.1")
    reader = inputs(server, calls, resolve=resolve)
    assert await reader.fetch(f"{server.origin}/a.png?b=c", max_bytes=1_000) == IMAGE
    assert server.paths == ["/a.png?b=c"]
    assert resolve.hosts == [f"{HOST}:{server.port}"], (
        "the reader connects to the address that it has checked"
    )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://images.test/a.png", "only https"),
        ("https://other.test/a.png", "no inputs from that host"),
        ("https://images.test/a.png", "no inputs from that host"),  # another port
        ("https://images.test.evil.test:{port}/a.png", "no inputs from that host"),
        ("https://a:b@images.test:{port}/a.png", "no inputs from that host"),
        ("https://images.test:{port}@evil.test/a.png", "no inputs from that host"),
        ("https://127.0.0.1:{port}/a.png", "no inputs from that host"),
        ("https://images.test:x/a.png", "not an https address"),
        ("https://images.test:{port}/a b.png", "plain characters"),
        ("https://images.test:{port}/\r\nX: y", "plain characters"),
        ("https://images.test:{port}/" + "a" * 2_048, "2048"),
        ("https://", "not an https address"),
    ],
)
async def test_a_url_that_is_not_allowed_causes_no_request(
    server: Server, calls: Calls, url: str, message: str
) -> None:
    resolve = Resolver("127.0.0.1")
    reader = inputs(server, calls, resolve=resolve)
    assert message in await fetch_error(reader, url.replace("{port}", str(server.port)))
    assert (server.paths, resolve.hosts) == ([], [])


async def test_a_redirect_within_the_host_is_followed(server: Server, calls: Calls) -> None:
    reader = inputs(server, calls)
    assert await reader.fetch(f"{server.origin}/a?to=/b.png", max_bytes=1_000) == IMAGE
    assert server.paths[1:] == ["/b.png"]


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("https://other.test/b.png", "no inputs from that host"),
        ("http://images.test/b.png", "only https"),
        ("https://169.254.169.254/latest/meta-data", "no inputs from that host"),
        ("file:///etc/passwd", "not an https address"),
    ],
)
async def test_a_redirect_is_checked_like_the_first_url(
    server: Server, calls: Calls, to: str, message: str
) -> None:
    assert message in await fetch_error(inputs(server, calls), f"{server.origin}/a?to={to}")
    assert len(server.paths) == 1


async def test_the_number_of_redirects_is_limited(server: Server, calls: Calls) -> None:
    url = f"{server.origin}/a?to={server.origin}/a"
    for _ in range(6):
        url = f"{server.origin}/a?to={url.replace('?', '%3F').replace('=', '%3D')}"
    assert "redirects more than 3 times" in await fetch_error(inputs(server, calls), url)
    assert len(server.paths) == 4


async def test_a_body_above_the_limit_is_refused(server: Server, calls: Calls) -> None:
    reader = inputs(server, calls)
    url = f"{server.origin}/a.png"
    assert await reader.fetch(url, max_bytes=len(IMAGE)) == IMAGE
    assert "more than 3 bytes" in await fetch_error(reader, url, 3)


async def test_a_slow_host_times_out(
    server: Server, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_inputs, "WITHIN", 0.3)
    assert "longer than 0.3 s" in await fetch_error(inputs(server, calls), f"{server.origin}/drip")


async def test_another_status_than_200_is_refused(server: Server, calls: Calls) -> None:
    assert "answered 404" in await fetch_error(inputs(server, calls), f"{server.origin}/missing")


async def test_a_certificate_for_another_host_is_refused(server: Server, calls: Calls) -> None:
    other = f"other.test:{server.port}"
    assert "TLS" in await fetch_error(inputs(server, calls, other), f"https://{other}/a.png")
    assert server.paths == []


async def test_an_unreachable_host_is_reported(calls: Calls, server: Server) -> None:
    (unused,) = free_ports(1)
    reader = inputs(server, calls, f"{HOST}:{unused}")
    assert "cannot be reached" in await fetch_error(reader, f"https://{HOST}:{unused}/a.png")


@pytest.mark.parametrize("address", ["10.0.0.1", "::7f00:1"])
async def test_addresses_of_the_private_network_are_refused(
    server: Server, calls: Calls, address: str
) -> None:
    for addresses in ((address,), ("93.184.215.14", address)):
        reader = WebInputs(
            [f"{HOST}:{server.port}"],
            calls,
            resolve=Resolver(*addresses),
            ca_certs=str(server.ca),
        )
        assert "not in the public network" in await fetch_error(reader, f"{server.origin}/a.png")
    assert server.paths == []
