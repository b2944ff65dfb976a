"""Content Credentials: a C2PA manifest in the file, signed with the operator's certificate.

Needs the extra `c2pa`. The manifest is written after all other metadata, because its signature
covers the whole file. Two signatures of one file differ: each has a new identifier and a new time.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from io import BytesIO
from typing import Any, Final, Literal

import c2pa

from consumer.media.ai_mark import DIGITAL_SOURCE_TYPE, SOFTWARE
from consumer.ports.media import EncodedImage, SigningFailed

Algorithm = Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"]
Callback = Callable[[bytes], bytes]

C2PA: Final = "c2pa"  # name of this mark in the events
GENERATION: Final = "generation_consumer.generation"  # label of the assertion with these values:
_VALUES: Final = ("request_id", "seed", "model", "revision", "libraries")
_ANY_SIGNATURE = 64  # bytes
_VALID: Final = ("Valid", "Trusted")
# The worker trusts its own certificate; readers decide for themselves. No thumbnail: it is larger
# than the rest of the manifest. The file is read again below, which also checks the signature.
_OPTIONS: Final = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {
        "verify_after_sign": False,
        "verify_trust": False,
        "remote_manifest_fetch": False,
    },
}


class WrongKey(SigningFailed):
    """The key cannot be read, or does not match the algorithm or the certificate."""


@dataclass(frozen=True)
class SigningConfig:
    """How files are signed.

    Attributes:
        chain: PEM: the signer's certificate, then those that issued it.
        key: PEM, PKCS #8: the key of the certificate; or a callback that signs bytes with it. The
            callback is called in several threads.
        algorithm: Signature algorithm of the key.
        time_stamps: URL of a time stamp authority (RFC 3161); None: no time stamps.
    """

    chain: bytes
    key: bytes | Callback
    algorithm: Algorithm
    time_stamps: str | None = None


class ContentCredentials:
    """Signs image files in a separate thread pool.

    Args:
        config: How files are signed.

    Raises:
        WrongKey: The key or the algorithm cannot be used.
    """

    def __init__(self, config: SigningConfig) -> None:
        self._signer = _Signer(config)
        self._generator = {"name": SOFTWARE, "version": version(SOFTWARE)}  # reads files
        self._context = c2pa.Context.from_dict(_OPTIONS)
        # A thread of the loop's own pool would delay the exit as long as a callback hangs.
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="signing")
        self._pending: set[Future[EncodedImage]] = set()

    @property
    def busy(self) -> bool:
        """Whether a thread is signing: Python cannot end it, and a normal exit waits for it."""
        return bool(self._pending)

    def submit(self, image: EncodedImage, provenance: Mapping[str, str]) -> "Future[EncodedImage]":
        """Sign a file in another thread; see `consumer.ports.media.Credentials`."""
        future = self._threads.submit(self.sign, image, provenance)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def sign(self, image: EncodedImage, provenance: Mapping[str, str]) -> EncodedImage:
        """Return the file with a signed manifest, after reading and checking it.

        Raises:
            SigningFailed: The file could not be signed, or the signature is not valid.
        """
        data = self.sign_unverified(image, provenance)
        self._verify(data, image.media_type)
        digest = hashlib.sha256(data).hexdigest()
        return replace(image, data=data, sha256=digest, marks=(*image.marks, C2PA))

    def signer_of(self, image: EncodedImage) -> str:
        """Return the algorithm and the names in the certificate of a signed file."""
        with c2pa.Reader(image.media_type, BytesIO(image.data), context=self._context) as reader:
            info = (reader.get_active_manifest() or {}).get("signature_info", {})
        names = ", ".join(filter(None, (info.get("common_name"), info.get("issuer"))))
        stamped = "with" if info.get("time") else "without"
        return f"{info.get('alg', '')} by {names}, {stamped} a time stamp"

    def sign_unverified(self, image: EncodedImage, provenance: Mapping[str, str]) -> bytes:
        """Return the file with a manifest, without a check of the signature.

        Raises:
            SigningFailed: The file could not be signed.
        """
        signed = BytesIO()
        try:
            builder = self._builder(provenance)
            self._signer.sign(builder, image.media_type, BytesIO(image.data), signed)
        except c2pa.C2paError as error:
            raise SigningFailed(str(error)) from None
        return signed.getvalue()

    def _builder(self, provenance: Mapping[str, str]) -> Any:
        agent = {"name": provenance["model"], "version": provenance.get("revision")}
        action = {
            "action": "c2pa.created",
            "digitalSourceType": DIGITAL_SOURCE_TYPE,
            "softwareAgent": {name: value for name, value in agent.items() if value is not None},
        }
        values = {name: provenance[name] for name in _VALUES if name in provenance}
        manifest = {
            "claim_generator_info": [self._generator],
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
                {"label": GENERATION, "data": values},
            ],
        }
        return c2pa.Builder(manifest, context=self._context)

    def _verify(self, data: bytes, media_type: str) -> None:
        """Raise unless a reader finds the signature valid."""
        try:
            with c2pa.Reader(media_type, BytesIO(data), context=self._context) as reader:
                state, results = reader.get_validation_state(), reader.get_validation_results()
        except c2pa.C2paError as error:
            raise SigningFailed(f"the signed file cannot be read: {error}") from None
        if state not in _VALID:
            failures = ((results or {}).get("activeManifest") or {}).get("failure") or ()
            codes = {str(failure.get("code")) for failure in failures}
            text = f"the signature is not valid: {', '.join(sorted(codes)) or state}"
            raise WrongKey(text) if "claimSignature.mismatch" in codes else SigningFailed(text)


class _Signer:
    """Signs with a key, or through a callback whose exceptions it reports."""

    def __init__(self, config: SigningConfig) -> None:
        self._config = config
        self._callback = config.key if callable(config.key) else None
        self._signer = None if callable(config.key) else self._with_key(config.key)

    def sign(self, builder: Any, media_type: str, source: BytesIO, signed: BytesIO) -> None:
        raised: list[str] = []
        signer = self._signer
        if self._callback is not None:
            signer = self._with_callback(self._callback, raised)
        try:
            builder.sign(signer, media_type, source, signed)
        except c2pa.C2paError:
            if raised:
                raise SigningFailed(f"the callback failed: {raised[0]}") from None
            raise

    def _with_key(self, key: bytes) -> Any:
        config = self._config
        info = c2pa.C2paSignerInfo(config.algorithm, config.chain, key, config.time_stamps)
        try:
            return c2pa.Signer.from_info(info)
        except c2pa.C2paError as error:
            raise WrongKey(str(error)) from None

    def _with_callback(self, callback: Callback, raised: list[str]) -> Any:
        # One signer for each signature, so that an exception belongs to its file. The library logs
        # the text of exceptions, which may have a secret: none reaches it.
        def sign(data: bytes) -> bytes:
            try:
                signature = callback(data)
            except Exception as error:  # noqa: BLE001 - the operator's code
                raised.append(type(error).__name__)
                return b""
            if not isinstance(signature, bytes) or not signature:
                raised.append("it returned no bytes")
                return b""
            return signature

        config = self._config
        algorithm = c2pa.C2paSigningAlg[config.algorithm.upper()]
        chain = config.chain.decode("ascii", "replace")
        return c2pa.Signer.from_callback(sign, algorithm, chain, config.time_stamps)


def check_config(config: SigningConfig, image: EncodedImage) -> None:
    """Sign a file with a configuration, without a network and without a call of the callback.

    Args:
        config: How files are signed.
        image: Any file.

    Raises:
        WrongKey: The key cannot be read, or does not match the algorithm or the certificate.
        SigningFailed: The certificate chain cannot be used.
    """
    provenance = {"model": "none"}
    local = replace(config, time_stamps=None)
    if callable(config.key):  # the library checks the chain before it uses the signature
        local = replace(local, key=lambda _: bytes(_ANY_SIGNATURE))
        ContentCredentials(local).sign_unverified(image, provenance)
    else:
        ContentCredentials(local).sign(image, provenance)
