"""TLS and mutual TLS to a real server: accepted certificates, and one line for refused ones."""

from pathlib import Path

import pytest
import trustme

from consumer.bus.connection import BusUnavailable, connect
from consumer.settings import Settings
from tests.conftest import StartNats
from tests.integration.bus_installation import soon

WITHIN = 5.0  # seconds
FAILS_WITHIN = 1.0  # seconds; the client retries a failed handshake until then


class Certificates:
    """A certificate authority and the certificates that it has signed, as files.

    Attributes:
        ca: The certificate of the authority.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, name: str) -> tuple[Path, Path]:
        """Sign a certificate; return the files of the certificate and its key."""
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


async def connect_error(settings: Settings) -> str:
    """Connect, which must fail; return the error, which must be one line."""
    with pytest.raises(BusUnavailable) as caught:
        await soon(connect(settings, name="test", within=FAILS_WITHIN))
    text = str(caught.value)
    assert "\n" not in text
    return text


async def test_a_server_certificate_of_the_configured_authority_is_accepted(
    start_nats: StartNats, ours: Certificates
) -> None:
    url = server_url(start_nats, ours, mutual=False)
    assert await connected(Settings(nats_url=url, nats_ca=ours.ca))


async def test_a_server_certificate_of_another_authority_is_refused(
    start_nats: StartNats, ours: Certificates, others: Certificates
) -> None:
    url = server_url(start_nats, ours, mutual=False)
    assert "certificate verify failed" in await connect_error(
        Settings(nats_url=url, nats_ca=others.ca)
    )


async def test_a_client_certificate_of_the_configured_authority_is_accepted(
    start_nats: StartNats, ours: Certificates
) -> None:
    url = server_url(start_nats, ours, mutual=True)
    certificate, key = ours.issue("worker")
    assert await connected(
        Settings(nats_url=url, nats_ca=ours.ca, nats_cert=certificate, nats_key=key)
    )


@pytest.mark.parametrize("client", ["no certificate", "unknown authority"])
async def test_a_missing_or_unknown_client_certificate_is_refused(
    start_nats: StartNats, ours: Certificates, others: Certificates, client: str
) -> None:
    url = server_url(start_nats, ours, mutual=True)
    settings = Settings(nats_url=url, nats_ca=ours.ca)
    if client == "unknown authority":
        certificate, key = others.issue("worker")
        settings = settings.model_copy(update={"nats_cert": certificate, "nats_key": key})
    assert "cannot connect" in await connect_error(settings)


async def test_an_unreadable_authority_file_is_refused_with_the_setting(
    start_nats: StartNats, ours: Certificates, tmp_path: Path
) -> None:
    url = server_url(start_nats, ours, mutual=False)
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    assert "cannot be read: NATS_CA: not a PEM file" in await connect_error(
        Settings(nats_url=url, nats_ca=wrong)
    )
