"""Input pictures over https, from a real TLS server: which addresses are asked, and which never."""

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

HOST = "pictures.test"
PICTURE = b"\x89PNG and so on"
LOOPBACK = ipaddress.ip_address("127.0.0.1")


class Server:
    """A host of pictures.

    Attributes:
        origin: Where it is, by its name.
        asked: The path of every request that has come.
        ca: Who has signed it.
    """

    def __init__(self, folder: Path) -> None:
        (self.port,) = free_ports(1)
        self.origin = f"https://{HOST}:{self.port}"
        self.asked: list[str] = []
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
        self.asked.append(request.path_qs)
        assert request.headers["Host"] == f"{HOST}:{self.port}"
        if to := request.query.get("to"):
            raise web.HTTPFound(to)
        if request.path == "/missing":
            raise web.HTTPNotFound
        if request.path == "/drip":
            drip = web.StreamResponse(headers={"Content-Length": "1000000"})
            await drip.prepare(request)
            await drip.write(b"x")
            await (
                asyncio.get_running_loop().create_future()
            )  # nothing more, for as long as it is asked
        return web.Response(body=PICTURE)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(tmp_path)
    await made.start()
    yield made
    await made.runner.cleanup()


@pytest.fixture
def calls() -> Iterator[Calls]:
    made = Calls()
    yield made
    made.close()


class Resolver:
    """Gives addresses, and remembers who was asked for."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = [ipaddress.ip_address(one) for one in addresses]
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> list[Address]:
        self.asked.append(f"{host}:{port}")
        return self.addresses


def inputs(server: Server, calls: Calls, *hosts: str, resolve: Resolver | None = None) -> WebInputs:
    """What a worker has, but that loopback is taken for the public network."""
    return WebInputs(
        hosts or (f"{HOST}:{server.port}",),
        calls,
        resolve=resolve or Resolver("127.0.0.1"),
        may_connect=lambda address: address == LOOPBACK,
        ca_certs=str(server.ca),
    )


async def refused(reads: WebInputs, url: str, max_bytes: int = 1_000) -> str:
    with pytest.raises(InputUnavailable) as caught:
        await reads.fetch(url, max_bytes=max_bytes)
    assert "test" not in str(caught.value), "no address in it"
    return str(caught.value)


async def test_a_picture_of_a_known_host_is_read(
    server: Server, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # it is not asked
    resolve = Resolver("127.0.0.1")
    reads = inputs(server, calls, resolve=resolve)
    assert await reads.fetch(f"{server.origin}/a.png?b=c", max_bytes=1_000) == PICTURE
    assert server.asked == ["/a.png?b=c"]
    assert resolve.asked == [f"{HOST}:{server.port}"], "once: the address that is checked is used"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://pictures.test/a.png", "only https"),
        ("https://other.test/a.png", "no inputs from that host"),
        ("https://pictures.test/a.png", "no inputs from that host"),  # another port
        ("https://pictures.test.evil.test:{port}/a.png", "no inputs from that host"),
        ("https://a:b@pictures.test:{port}/a.png", "no inputs from that host"),
        ("https://pictures.test:{port}@evil.test/a.png", "no inputs from that host"),
        ("https://127.0.0.1:{port}/a.png", "no inputs from that host"),
        ("https://pictures.test:x/a.png", "not an https address"),
        ("https://pictures.test:{port}/a b.png", "plain characters"),
        ("https://pictures.test:{port}/\r\nX: y", "plain characters"),
        ("https://pictures.test:{port}/" + "a" * 2_048, "2048"),
        ("https://", "not an https address"),
    ],
)
async def test_what_is_not_asked(server: Server, calls: Calls, url: str, said: str) -> None:
    resolve = Resolver("127.0.0.1")
    reads = inputs(server, calls, resolve=resolve)
    assert said in await refused(reads, url.replace("{port}", str(server.port)))
    assert (server.asked, resolve.asked) == ([], [])


async def test_a_redirect_within_the_host_is_followed(server: Server, calls: Calls) -> None:
    reads = inputs(server, calls)
    assert await reads.fetch(f"{server.origin}/a?to=/b.png", max_bytes=1_000) == PICTURE
    assert server.asked[1:] == ["/b.png"]


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("https://other.test/b.png", "no inputs from that host"),
        ("http://pictures.test/b.png", "only https"),
        ("https://169.254.169.254/latest/meta-data", "no inputs from that host"),
        ("file:///etc/passwd", "not an https address"),
    ],
)
async def test_a_redirect_is_checked_as_the_first_address(
    server: Server, calls: Calls, to: str, said: str
) -> None:
    assert said in await refused(inputs(server, calls), f"{server.origin}/a?to={to}")
    assert len(server.asked) == 1


async def test_redirects_for_ever_end(server: Server, calls: Calls) -> None:
    url = f"{server.origin}/a?to={server.origin}/a"
    for _ in range(6):
        url = f"{server.origin}/a?to={url.replace('?', '%3F').replace('=', '%3D')}"
    assert "redirects more than 3 times" in await refused(inputs(server, calls), url)
    assert len(server.asked) == 4


async def test_too_many_bytes_are_refused(server: Server, calls: Calls) -> None:
    reads = inputs(server, calls)
    url = f"{server.origin}/a.png"
    assert await reads.fetch(url, max_bytes=len(PICTURE)) == PICTURE
    assert "more than 3 bytes" in await refused(reads, url, 3)


async def test_a_host_that_takes_its_time_is_given_up(
    server: Server, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_inputs, "WITHIN", 0.3)
    assert "longer than 0.3 s" in await refused(inputs(server, calls), f"{server.origin}/drip")


async def test_another_answer_than_a_picture(server: Server, calls: Calls) -> None:
    assert "answered 404" in await refused(inputs(server, calls), f"{server.origin}/missing")


async def test_a_host_that_is_another_one_is_refused(server: Server, calls: Calls) -> None:
    other = f"other.test:{server.port}"
    assert "TLS" in await refused(inputs(server, calls, other), f"https://{other}/a.png")
    assert server.asked == []


async def test_a_host_that_is_away(calls: Calls, server: Server) -> None:
    (nobody,) = free_ports(1)
    reads = inputs(server, calls, f"{HOST}:{nobody}")
    assert "cannot be reached" in await refused(reads, f"https://{HOST}:{nobody}/a.png")


@pytest.mark.parametrize("address", ["10.0.0.1", "::7f00:1"])
async def test_addresses_of_the_own_network_are_refused(
    server: Server, calls: Calls, address: str
) -> None:
    for addresses in ((address,), ("93.184.215.14", address)):
        reads = WebInputs(
            [f"{HOST}:{server.port}"],
            calls,
            resolve=Resolver(*addresses),
            ca_certs=str(server.ca),
        )
        assert "not in the public network" in await refused(reads, f"{server.origin}/a.png")
    assert server.asked == []
