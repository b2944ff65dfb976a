"""TLS and mutual TLS to a real server: who proves what, and one line where it is not proven."""

from pathlib import Path

import pytest
import trustme

from consumer.bus.connection import BusUnavailable, connect
from consumer.settings import Settings
from tests.conftest import StartNats
from tests.integration.bus_installation import soon

WITHIN = 5.0  # seconds
FAILS_WITHIN = 1.0  # seconds; a handshake that fails is tried again until then


class Certificates:
    """What one authority has signed, as files.

    Attributes:
        ca: Of the authority.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate and its key."""
        issued = self._authority.issue_cert(name)
        files = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(files[0])
        issued.private_key_pem.write_to_path(files[1])
        return files


@pytest.fixture
def ours(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "ours")


@pytest.fixture
def others(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "others")


def server_url(start_nats: StartNats, ours: Certificates, *, mutual: bool) -> str:
    certificate, key = ours.issue("127.0.0.1")
    verify = f'ca_file: "{ours.ca}", verify: true' if mutual else ""
    server = start_nats(f'tls {{ cert_file: "{certificate}", key_file: "{key}", {verify} }}')
    return server.url


async def connected(settings: Settings) -> bool:
    bus = await soon(connect(settings, name="test", within=WITHIN))
    try:
        await bus.client.flush()
        return bool(bus.client.is_connected)
    finally:
        await bus.close()


async def refused(settings: Settings) -> str:
    with pytest.raises(BusUnavailable) as caught:
        await soon(connect(settings, name="test", within=FAILS_WITHIN))
    text = str(caught.value)
    assert "\n" not in text
    return text


async def test_server_proves_who_it_is(start_nats: StartNats, ours: Certificates) -> None:
    url = server_url(start_nats, ours, mutual=False)
    assert await connected(Settings(nats_url=url, nats_ca=ours.ca))


async def test_server_that_another_authority_has_signed_is_refused(
    start_nats: StartNats, ours: Certificates, others: Certificates
) -> None:
    url = server_url(start_nats, ours, mutual=False)
    assert "certificate verify failed" in await refused(Settings(nats_url=url, nats_ca=others.ca))


async def test_both_sides_prove_who_they_are(start_nats: StartNats, ours: Certificates) -> None:
    url = server_url(start_nats, ours, mutual=True)
    certificate, key = ours.issue("worker")
    assert await connected(
        Settings(nats_url=url, nats_ca=ours.ca, nats_cert=certificate, nats_key=key)
    )


@pytest.mark.parametrize("client", ["none", "another authority's"])
async def test_client_that_proves_nothing_is_refused(
    start_nats: StartNats, ours: Certificates, others: Certificates, client: str
) -> None:
    url = server_url(start_nats, ours, mutual=True)
    settings = Settings(nats_url=url, nats_ca=ours.ca)
    if client != "none":
        certificate, key = others.issue("worker")
        settings = settings.model_copy(update={"nats_cert": certificate, "nats_key": key})
    assert "cannot connect" in await refused(settings)


async def test_a_file_that_is_no_certificate_is_one_line(
    start_nats: StartNats, ours: Certificates, tmp_path: Path
) -> None:
    url = server_url(start_nats, ours, mutual=False)
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    assert "cannot be read: NATS_CA: not a PEM file" in await refused(
        Settings(nats_url=url, nats_ca=wrong)
    )
