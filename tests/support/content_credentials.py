"""A test certificate for Content Credentials, callbacks that sign, and c2pa's own reader."""

import re
import subprocess
import threading
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import c2pa
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.support.quick_runner import note

PAGE = Path(__file__).parents[2] / "docs/paths/content-credentials.md"
SECRET = "the password of the HSM"
TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


class Certificate(NamedTuple):
    """The files that the commands of the tutorial make.

    Attributes:
        folder: Has `chain.pem`, `signer.key` and `authority.pem`.
    """

    folder: Path

    @property
    def settings(self) -> dict[str, str]:
        """The settings of a worker that signs with the key."""
        return {
            "CONSUMER_C2PA": "required",
            "CONSUMER_C2PA_CHAIN": str(self.folder / "chain.pem"),
            "CONSUMER_C2PA_KEY": str(self.folder / "signer.key"),
        }

    def with_callback(self, name: str) -> dict[str, str]:
        """Return the settings of a worker that signs with a callback of this module."""
        settings = {**self.settings, "CONSUMER_C2PA_SIGNER": f"{__name__}:{name}"}
        del settings["CONSUMER_C2PA_KEY"]
        return settings


def commands_of_the_page() -> list[str]:
    """Return the commands of the tutorial, in order."""
    return re.findall(r"^\$ (.*?)(?=^\$ |^```)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Run the commands of the tutorial that make the certificate."""
    folder = tmp_path_factory.mktemp("certificate")
    making = [
        command
        for command in commands_of_the_page()
        if command.startswith(("cat ", "umask ", "openssl "))
    ]
    script = "\n".join(("set -e", *making))
    subprocess.run(["bash", "-c", script], cwd=folder, check=True, capture_output=True)
    return Certificate(folder)


class Read(NamedTuple):
    """What c2pa's reader finds in a file."""

    state: str
    failures: set[str]
    signature: Mapping[str, str]
    assertions: Mapping[str, Any]
    generator: Mapping[str, str]


def read(data: bytes, media_type: str, certificate: Certificate | None = None) -> Read:
    """Read the manifest of a file, and trust the authority of a certificate."""
    options: dict[str, Any] = {"verify": {"verify_trust": certificate is not None}}
    if certificate is not None:
        anchors = (certificate.folder / "authority.pem").read_text()
        options["trust"] = {"trust_anchors": anchors}
    context = c2pa.Context.from_dict(options)
    with c2pa.Reader(media_type, BytesIO(data), context=context) as reader:
        manifest: Any = reader.get_active_manifest()
        results: Any = reader.get_validation_results()
        return Read(
            state=str(reader.get_validation_state()),
            failures={failure["code"] for failure in results["activeManifest"]["failure"]},
            signature=manifest["signature_info"],
            assertions={one["label"]: one["data"] for one in manifest["assertions"]},
            generator=manifest["claim_generator_info"][0],
        )


# -- callbacks ------------------------------------------------------------------------------------


def signer_with(key_file: Path) -> Any:
    """Return a callback that signs with an EC key."""
    key = load_pem_private_key(key_file.read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    return lambda data: key.sign(data, ECDSA(SHA256()))


def refuse(_: bytes) -> bytes:
    """Fail as an HSM that cannot be reached."""
    raise ConnectionError(SECRET)


def hang(_: bytes) -> bytes:
    """Never return."""
    note("signing", "hangs")
    threading.Event().wait()
    raise AssertionError
