"""Content Credentials: c2pa's own reader validates what the worker signs."""

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import exiv2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from PIL import Image

from consumer.app import signing
from consumer.app.check import Finding, _finding
from consumer.app.signing import make_credentials, try_signature
from consumer.media.codec import ImageCodec
from consumer.media.content_credentials import ContentCredentials, SigningConfig
from consumer.ports.media import EncodedImage, OutputFormat, SigningFailed
from consumer.settings import Settings, SettingsError
from tests.support.content_credentials import (
    SECRET,
    TRAINED,
    Certificate,
    certificate,
    read,
    refuse,
    signer_with,
)

__all__ = ["certificate"]

PROVENANCE = {
    "software": "generation-consumer 0",
    "request_id": "poster-0001",
    "seed": "7",
    "model": "someone/model",
    "revision": "7f3c",
    "parameters": "{}",
    "prompt": "a lighthouse",
}
CODEC = ImageCodec()

every_format = pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])


def encoded(output_format: OutputFormat = "png") -> EncodedImage:
    image = Image.effect_noise((64, 48), 80).convert("RGB")
    return CODEC.encode(image, output_format, seed=7, provenance=PROVENANCE)


def credentials_of(certificate: Certificate, key: Any = None, **options: Any) -> ContentCredentials:
    folder = certificate.folder
    return ContentCredentials(
        SigningConfig(
            chain=(folder / "chain.pem").read_bytes(),
            key=key or (folder / "signer.key").read_bytes(),
            algorithm="es256",
            **options,
        )
    )


@every_format
def test_signed_file_is_valid_and_says_what_made_it(
    output_format: OutputFormat, certificate: Certificate
) -> None:
    unsigned = encoded(output_format)
    signed = credentials_of(certificate).sign(unsigned, PROVENANCE)
    assert signed.marks == ("iptc", "c2pa")
    assert signed.sha256 == hashlib.sha256(signed.data).hexdigest()
    found = read(signed.data, signed.media_type, certificate)
    assert (found.state, found.failures) == ("Trusted", set())
    assert found.signature["common_name"] == "Example signer"
    assert found.generator["name"] == "generation-consumer"
    assert found.generator["version"] == version("generation-consumer")
    assert found.assertions == {
        "c2pa.actions.v2": {
            "actions": [
                {
                    "action": "c2pa.created",
                    "digitalSourceType": TRAINED,
                    "softwareAgent": {"name": "someone/model", "version": "7f3c"},
                }
            ]
        },
        "generation_consumer.generation": {
            "request_id": "poster-0001",
            "seed": "7",
            "model": "someone/model",
            "revision": "7f3c",
        },
    }


@every_format
def test_signature_keeps_pixels_and_the_other_mark(
    output_format: OutputFormat, certificate: Certificate
) -> None:
    unsigned = encoded(output_format)
    signed = credentials_of(certificate).sign(unsigned, PROVENANCE)
    assert CODEC.decode(signed.data).tobytes() == CODEC.decode(unsigned.data).tobytes()
    file: Any = exiv2.ImageFactory.open(signed.data)
    file.readMetadata()
    assert file.xmpData()["Xmp.iptcExt.DigitalSourceType"].toString() == TRAINED


@every_format
@pytest.mark.parametrize("place", ["pixels", "mark"])
def test_changed_file_is_invalid(
    output_format: OutputFormat, place: str, certificate: Certificate
) -> None:
    signed = credentials_of(certificate).sign(encoded(output_format), PROVENANCE)
    data = bytearray(signed.data)
    starts = {"png": b"IDAT", "webp": b"VP8 ", "jpeg": b"\xff\xda"}
    start = b"<xmp:CreatorTool>" if place == "mark" else starts[output_format]
    data[data.rindex(start, 0, len(data) - 100) + len(start) + 20] ^= 1
    found = read(bytes(data), signed.media_type, certificate)
    assert (found.state, found.failures) == ("Invalid", {"assertion.dataHash.mismatch"})


def test_each_signature_gives_another_file_with_its_digest(certificate: Certificate) -> None:
    credentials, image = credentials_of(certificate), encoded()
    first, second = (credentials.sign(image, PROVENANCE) for _ in range(2))
    assert first.sha256 != second.sha256
    for signed in (first, second):
        assert signed.sha256 == hashlib.sha256(signed.data).hexdigest()


# -- a callback -----------------------------------------------------------------------------------


def test_callback_signs(certificate: Certificate) -> None:
    key = signer_with(certificate.folder / "signer.key")
    signed = credentials_of(certificate, key).sign(encoded(), PROVENANCE)
    assert read(signed.data, signed.media_type, certificate).state == "Trusted"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (refuse, "the callback failed: ConnectionError"),
        (lambda _: None, "the callback failed: it returned no bytes"),
        (lambda _: b"", "the callback failed: it returned no bytes"),
        (lambda _: bytes(64), "the signature is not valid: claimSignature.mismatch"),
    ],
    ids=["raises", "returns none", "returns nothing", "signs with another key"],
)
def test_callback_without_a_signature_fails_and_logs_no_secret(
    key: Any, reason: str, certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SigningFailed) as raised:
        credentials_of(certificate, key).sign(encoded(), PROVENANCE)
    assert str(raised.value) == reason
    assert SECRET not in caplog.text


def test_hanging_callback_counts_as_busy(certificate: Certificate) -> None:
    called, release = threading.Event(), threading.Event()

    def hang(_: bytes) -> bytes:
        called.set()
        release.wait()
        return b""

    credentials = credentials_of(certificate, hang)
    assert not credentials.busy
    future = credentials.submit(encoded(), PROVENANCE)
    try:
        assert called.wait(30)
        assert credentials.busy
    finally:
        release.set()  # a hanging thread would hold up the end of the test run
    assert isinstance(future.exception(30), SigningFailed)
    assert not credentials.busy


# -- time stamps ----------------------------------------------------------------------------------


@pytest.fixture
def time_stamps(certificate: Certificate, tmp_path: Path) -> Iterator[str]:
    """URL of a time stamp authority: openssl behind HTTP."""
    folder = certificate.folder
    (tmp_path / "ts.cnf").write_text(
        f"[tsa]\nserial={tmp_path}/serial\nsigner_digest=sha256\ndefault_policy=1.2.3.4\n"
        "digests=sha256,sha384,sha512\ness_cert_id_alg=sha256\n"
        "[stamp]\nextendedKeyUsage=critical,timeStamping\nkeyUsage=critical,digitalSignature\n"
    )
    make = (
        f"openssl x509 -req -in {folder}/signer.csr -CA {folder}/authority.pem -days 2 "
        f"-CAkey {folder}/authority.key -extfile ts.cnf -extensions stamp -out stamp.pem"
    )
    subprocess.run(make.split(), cwd=tmp_path, check=True, capture_output=True)
    reply = (
        f"openssl ts -reply -config ts.cnf -section tsa -queryfile query -signer stamp.pem "
        f"-inkey {folder}/signer.key -chain {folder}/authority.pem -out reply"
    )

    class Authority(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            (tmp_path / "query").write_bytes(self.rfile.read(length))
            subprocess.run(reply.split(), cwd=tmp_path, check=True, capture_output=True)
            body = (tmp_path / "reply").read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "application/timestamp-reply")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Authority) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def test_time_stamp_is_part_of_the_signature(certificate: Certificate, time_stamps: str) -> None:
    signed = credentials_of(certificate, time_stamps=time_stamps).sign(encoded(), PROVENANCE)
    found = read(signed.data, signed.media_type)
    stamped = datetime.fromisoformat(found.signature["time"])
    assert abs(stamped - datetime.now(UTC)) < timedelta(minutes=5)
    assert found.state == "Valid"


def test_authority_that_cannot_be_reached_fails(certificate: Certificate) -> None:
    credentials = credentials_of(certificate, time_stamps="http://127.0.0.1:1/")
    with pytest.raises(SigningFailed, match="http resolver"):
        credentials.sign(encoded(), PROVENANCE)


# -- settings -------------------------------------------------------------------------------------


def settings_of(certificate: Certificate, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "model_type": "text_to_image",
        **{name.lower(): value for name, value in certificate.settings.items()},
        **changes,
    }
    return Settings(**values)


@pytest.fixture
def other_key(tmp_path: Path) -> Path:
    path = tmp_path / "other.key"
    make = f"openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {path}"
    subprocess.run(make.split(), check=True, capture_output=True)
    return path


@pytest.fixture
def expired_chain(certificate: Certificate, tmp_path: Path) -> Path:
    """The chain with a copy of the signer's certificate that ended yesterday."""
    signer, authority = x509.load_pem_x509_certificates(
        (certificate.folder / "chain.pem").read_bytes()
    )
    key = load_pem_private_key((certificate.folder / "authority.key").read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    builder = x509.CertificateBuilder(
        issuer_name=authority.subject,
        subject_name=signer.subject,
        public_key=signer.public_key(),
        serial_number=7,
        not_valid_before=datetime.now(UTC) - timedelta(days=9),
        not_valid_after=datetime.now(UTC) - timedelta(days=1),
    )
    for extension in signer.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    path = tmp_path / "expired.pem"
    expired = builder.sign(key, SHA256())
    path.write_bytes(expired.public_bytes(Encoding.PEM) + authority.public_bytes(Encoding.PEM))
    return path


def refusal(certificate: Certificate, **changes: Any) -> str:
    with pytest.raises(SettingsError) as raised:
        make_credentials(settings_of(certificate, **changes))
    return str(raised.value)


def test_key_of_another_certificate_is_refused(certificate: Certificate, other_key: Path) -> None:
    assert refusal(certificate, consumer_c2pa_key=other_key) == (
        "CONSUMER_C2PA_KEY, CONSUMER_C2PA_ALGORITHM: the signature is not valid: "
        "claimSignature.mismatch"
    )


def test_expired_certificate_is_refused(certificate: Certificate, expired_chain: Path) -> None:
    text = refusal(certificate, consumer_c2pa_chain=expired_chain)
    assert text.startswith("CONSUMER_C2PA_CHAIN: ")
    assert text.endswith("the certificate was not valid at time of signing")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"consumer_c2pa_chain": "/no/file"}, "CONSUMER_C2PA_CHAIN: /no/file: No such file"),
        ({"consumer_c2pa_key": "/no/file"}, "CONSUMER_C2PA_KEY: /no/file: No such file"),
        ({"consumer_c2pa_chain": "authority.pem"}, "CONSUMER_C2PA_CHAIN: "),
        ({"consumer_c2pa_chain": "c2pa.cnf"}, "CONSUMER_C2PA_CHAIN: "),
        ({"consumer_c2pa_key": "chain.pem"}, "CONSUMER_C2PA_KEY, CONSUMER_C2PA_ALGORITHM: "),
        ({"consumer_c2pa_algorithm": "ps256"}, "CONSUMER_C2PA_KEY, CONSUMER_C2PA_ALGORITHM: "),
    ],
    ids=["no chain", "no key", "an authority", "no certificate", "no PKCS 8 key", "algorithm"],
)
def test_wrong_file_is_refused(
    changes: dict[str, str], line: str, certificate: Certificate
) -> None:
    paths = {name: certificate.folder / value for name, value in changes.items()}
    if "consumer_c2pa_algorithm" in changes:
        paths = changes  # type: ignore[assignment] # no path
    assert refusal(certificate, **paths).startswith(line)


@pytest.mark.parametrize(
    ("callback", "line"),
    [
        ("sign", "CONSUMER_C2PA_SIGNER: must be package.module:callable"),
        ("no_such_package:sign", "CONSUMER_C2PA_SIGNER: no_such_package:sign cannot be used: "),
        ("os:no_such_name", "CONSUMER_C2PA_SIGNER: os:no_such_name cannot be used: "),
        ("os:sep", "CONSUMER_C2PA_SIGNER: os:sep cannot be used: it is not callable"),
    ],
)
def test_wrong_callback_is_refused(callback: str, line: str, certificate: Certificate) -> None:
    changes = {"consumer_c2pa_key": None, "consumer_c2pa_signer": callback}
    assert refusal(certificate, **changes).startswith(line)


def test_wrong_chain_is_refused_without_a_call_of_the_callback(certificate: Certificate) -> None:
    settings = certificate.with_callback("refuse")
    callback = {"consumer_c2pa_key": None, "consumer_c2pa_signer": settings["CONSUMER_C2PA_SIGNER"]}
    assert make_credentials(settings_of(certificate, **callback)) is not None
    chain = certificate.folder / "authority.pem"
    text = refusal(certificate, **callback, consumer_c2pa_chain=chain)
    assert text.startswith("CONSUMER_C2PA_CHAIN: ")


def test_missing_extra_is_refused(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing, "find_spec", lambda _: None)
    assert refusal(certificate) == "CONSUMER_C2PA: needs the extra `c2pa`"


@pytest.mark.parametrize(
    "changes",
    [{"consumer_c2pa": "off"}, {"model_type": "image_to_text"}],
    ids=["off", "a worker of texts"],
)
def test_nothing_is_signed(changes: dict[str, str], certificate: Certificate) -> None:
    settings = settings_of(certificate, **changes, consumer_c2pa_key="/no/file")
    assert make_credentials(settings) is None


async def test_trial_names_the_signer(certificate: Certificate) -> None:
    credentials = make_credentials(settings_of(certificate))
    assert credentials is not None
    text = await try_signature(credentials)
    assert text.startswith("Es256 by Example signer, Example, without a time stamp; signed and ")


async def test_check_reports_a_failing_signer_with_69(certificate: Certificate) -> None:
    name = certificate.with_callback("refuse")["CONSUMER_C2PA_SIGNER"]
    credentials = make_credentials(
        settings_of(certificate, consumer_c2pa_key=None, consumer_c2pa_signer=name)
    )
    assert credentials is not None
    finding = await _finding("c2pa", partial(try_signature, credentials))
    assert finding == Finding("c2pa", "the callback failed: ConnectionError", 69)


def test_daemon_with_a_wrong_key_exits_with_2_before_it_imports_torch(
    certificate: Certificate, other_key: Path
) -> None:
    code = (
        "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules))\n"
        "from consumer.app.cli import main; sys.argv = ['consumer', 'run']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **certificate.settings,
            "CONSUMER_C2PA_KEY": str(other_key),
            "MODEL_TYPE": "text_to_image",
            "S3_ACCESS_KEY": "a",
            "S3_SECRET_KEY": "b",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (2, "False"), done.stderr
    assert "CONSUMER_C2PA_KEY, CONSUMER_C2PA_ALGORITHM: the signature is not valid" in done.stderr
