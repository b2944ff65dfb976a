"""Refused inputs: errors of the object, errors of the worker, and temporary errors."""

from collections.abc import Awaitable, Callable

import pytest
from minio.error import S3Error
from urllib3.response import HTTPResponse

from consumer.app.probes import NullObserver
from consumer.artifacts import ObjectStoreArtifacts, StoreConfig, StoreMisconfigured
from consumer.ports.media import InputUnavailable
from consumer.ports.store import StoreUnavailable
from generation_contracts import ArtifactReference

REFERENCE = ArtifactReference(bucket="generation", key="inputs/0.png")


class RefusingClient:
    """A store that refuses every look at an object."""

    def __init__(self, code: str, status: int) -> None:
        self.error = S3Error(HTTPResponse(status=status), code, "words", "/x", None, None)

    def stat_object(self, *_: object) -> None:
        raise self.error


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Awaitable[bytes]]:
    config = StoreConfig(
        endpoint="http://127.0.0.1:1",
        access_key="key",
        secret_key="secret",
        bucket="generation",
        deadline=0.5,  # a machine under load takes a tenth of it to begin with
    )

    async def refused(code: str, status: int) -> bytes:
        artifacts = ObjectStoreArtifacts(config, observer=NullObserver())
        monkeypatch.setattr(artifacts, "_client", RefusingClient(code, status))
        try:
            return await artifacts.fetch(REFERENCE, max_bytes=100)
        finally:
            await artifacts.close()

    return refused


@pytest.mark.parametrize(
    ("code", "status"),
    [("InvalidObjectState", 403), ("MethodNotAllowed", 405), ("InvalidRequest", 400)],
)
async def test_permanently_unavailable_object_is_an_input_error(
    fetch: Callable[[str, int], Awaitable[bytes]], code: str, status: int
) -> None:
    with pytest.raises(InputUnavailable, match="the store refuses the object"):
        await fetch(code, status)


@pytest.mark.parametrize(
    ("code", "status", "fault"),
    [
        ("SignatureDoesNotMatch", 403, StoreMisconfigured),
        ("InvalidAccessKeyId", 403, StoreMisconfigured),
        ("ExpiredToken", 400, StoreMisconfigured),
        ("SlowDown", 503, StoreUnavailable),
        ("InternalError", 500, StoreUnavailable),
    ],
)
async def test_temporary_or_worker_refusal_is_not_an_input_error(
    fetch: Callable[[str, int], Awaitable[bytes]], code: str, status: int, fault: type[Exception]
) -> None:
    with pytest.raises(fault):
        await fetch(code, status)
