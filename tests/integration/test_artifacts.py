"""Artifacts on a real S3 server, and behind a proxy that makes it fail in every known way."""

import asyncio
import base64
import hashlib
import io
import json
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import minio.api
import pytest
from minio import Minio
from PIL import Image
from pydantic import SecretStr
from structlog.testing import capture_logs

from consumer.app.probes import NullObserver
from consumer.artifacts import (
    ObjectStoreArtifacts,
    StoreConfig,
    StoreMisconfigured,
    store_config,
)
from consumer.devstack import ObjectStore
from consumer.devstack.loopback import free_ports
from consumer.media.codec import ImageCodec
from consumer.ports.media import EncodedImage, InputUnavailable
from consumer.ports.store import StoreUnavailable
from consumer.settings import Settings
from consumer.telemetry import JobReport
from generation_contracts import ArtifactReference, FailureCode, InlineImage, Task
from tests.contracts.test_image_sources import ODD_KEYS
from tests.integration import minio_server
from tests.integration.fault_proxy import (
    Exchange,
    Fault,
    FaultProxy,
    damages_the_body,
    drips,
    for_checksums,
    hangs_up,
    is_silent,
    passes,
    refuses,
    says,
)
from tests.integration.minio_server import MinioServer

BUCKET = "generation"
PREFIX = "outputs"
LIMIT = 1_000_000  # bytes of an input
SOON = 30.0  # seconds; only bounds a wait for something that must happen
TASK = Task.TEXT_TO_IMAGE


# -- the parts ------------------------------------------------------------------------------------


class StoreOfTwo(ObjectStore):
    """The development store with a second key pair that may use one prefix only."""

    scoped_access_key = "worker"
    scoped_secret_key = "the-secret-of-the-worker"

    def _prepare(self) -> None:
        super()._prepare()
        file = self.directory / "s3.json"
        identities = json.loads(file.read_text())
        pair = {"accessKey": self.scoped_access_key, "secretKey": self.scoped_secret_key}
        place = f"{BUCKET}/{PREFIX}/*"
        scoped = {
            "name": "worker",
            "credentials": [pair],
            "actions": [f"Read:{place}", f"Write:{place}"],
        }
        identities["identities"].append(scoped)
        file.write_text(json.dumps(identities))


@dataclass
class Recorder:
    """An observer that keeps what it is told about the store."""

    told: list[str] = field(default_factory=list)  # "" for yes, else the reason
    news: asyncio.Queue[str] = field(default_factory=asyncio.Queue)  # the same, to wait for

    def job_started(self) -> None: ...
    def job_finished(self, report: JobReport) -> None: ...
    def chain_broken(self, code: FailureCode) -> None: ...
    def call_refused(self, code: FailureCode) -> None: ...
    def device_stepped(self) -> None: ...
    def device_busy(self, seconds: float) -> None: ...

    def store_reachable(self, reachable: bool, reason: str = "") -> None:
        assert reachable == (not reason)
        assert threading.current_thread() is threading.main_thread()
        self.told.append(reason)
        self.news.put_nowait(reason)


@pytest.fixture(
    scope="module", params=["weed", *(["minio"] if minio_server.is_installed() else [])]
)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StoreOfTwo | MinioServer]:
    kind = StoreOfTwo if request.param == "weed" else MinioServer
    with kind(tmp_path_factory.mktemp("store")) as running:
        if isinstance(running, MinioServer):
            running.add_scoped_user(f"{BUCKET}/{PREFIX}/*")
        plain_client(running).make_bucket(BUCKET)
        plain_client(running).make_bucket("private")
        yield running


def plain_client(store: ObjectStore | MinioServer) -> Minio:
    return Minio(
        urlsplit(store.endpoint).netloc,
        access_key=store.access_key,
        secret_key=store.secret_key,
        secure=False,
        region="us-east-1",
    )


@pytest.fixture
def plain(store: ObjectStore | MinioServer) -> Minio:
    """A client of the same store that shares no code with the product."""
    return plain_client(store)


@pytest.fixture
async def proxy(store: ObjectStore | MinioServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(store.ports["s3.port"]) as running:
        yield running


@pytest.fixture
def seen() -> Recorder:
    return Recorder()


Make = Callable[..., ObjectStoreArtifacts]


@pytest.fixture
async def make(store: StoreOfTwo | MinioServer, seen: Recorder) -> AsyncIterator[Make]:
    """Makes what is tested, with changes to its configuration."""
    async with AsyncExitStack() as parts:

        def made(**changes: Any) -> ObjectStoreArtifacts:
            artifacts = ObjectStoreArtifacts(config_for(store, **changes), observer=seen)
            parts.push_async_callback(artifacts.close)
            return artifacts

        yield made


@pytest.fixture
def artifacts(make: Make) -> ObjectStoreArtifacts:
    return make()


@pytest.fixture
def behind(make: Make, proxy: FaultProxy) -> ObjectStoreArtifacts:
    """The same behind the proxy."""
    return make(endpoint=proxy.endpoint)


def config_for(store: ObjectStore | MinioServer, **changes: Any) -> StoreConfig:
    values: dict[str, Any] = {
        "endpoint": store.endpoint,
        "access_key": store.access_key,
        "secret_key": store.secret_key,
        "bucket": BUCKET,
        "prefix": PREFIX,
        "first_pause": 0.01,
        "longest_pause": 0.05,
    }
    return StoreConfig(**(values | changes))


def picture(shade: int = 120) -> EncodedImage:
    return ImageCodec().encode(Image.new("RGB", (48, 32), (shade, 40, 50)), "png", seed=7)


def put(plain: Minio, key: str, data: bytes, bucket: str = BUCKET, **options: Any) -> None:
    plain.put_object(bucket, key, io.BytesIO(data), len(data), **options)


def got(plain: Minio, key: str) -> bytes:
    response = plain.get_object(BUCKET, key)
    try:
        return bytes(response.read())
    finally:
        response.close()
        response.release_conn()


def read_url(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=SOON) as response:  # noqa: S310 - presigned, http
        return bytes(response.read())


def reference(key: str, bucket: str = BUCKET) -> ArtifactReference:
    return ArtifactReference(bucket=bucket, key=key)


async def refusal(artifacts: ObjectStoreArtifacts, source: Any, limit: int = LIMIT) -> str:
    with pytest.raises(InputUnavailable) as raised:
        await artifacts.fetch(source, max_bytes=limit)
    return str(raised.value)


# -- a store without checksums --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (refuses("501 Not Implemented", "NotImplemented"), "NotImplemented"),
        (refuses("400 Bad Request", "InvalidRequest"), "InvalidRequest"),
        (refuses("400 Bad Request", "InvalidArgument"), "InvalidArgument"),
        (refuses("403 Forbidden", "SignatureDoesNotMatch"), "SignatureDoesNotMatch"),
        (says("501 Not Implemented"), "HTTP 501"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_store_that_knows_no_checksums_is_found_out_once(
    behind: ObjectStoreArtifacts, proxy: FaultProxy, plain: Minio, fault: Fault, code: str
) -> None:
    proxy.otherwise = for_checksums(fault)
    with capture_logs() as logs:
        await behind.probe()
    assert behind.refused_checksum == code
    (said,) = logs
    assert (said["event"], said["code"]) == ("store_without_checksums", code)
    proxy.heads.clear()
    stored = await behind.store(TASK, "unchecked", 0, picture())
    (head,) = proxy.heads  # one attempt, and the store compares the MD5
    md5 = base64.b64encode(hashlib.md5(picture().data, usedforsecurity=False).digest())
    assert b"\r\nContent-MD5: " + md5 + b"\r\n" in head
    assert got(plain, stored.key) == picture().data


@pytest.mark.parametrize(
    ("code", "uploads"),
    [
        ("InvalidRequest", 2),
        ("InvalidArgument", 2),
        ("SignatureDoesNotMatch", 2),
        ("NotImplemented", 1),
    ],
)
async def test_an_ambiguous_refusal_counts_for_one_upload_until_the_next_meets_it(
    behind: ObjectStoreArtifacts, proxy: FaultProxy, plain: Minio, code: str, uploads: int
) -> None:
    refused = for_checksums(refuses("400 Bad Request", code))
    if uploads == 2:
        for _ in range(2):  # not in a row: an upload with a checksum is stored in between
            proxy.faults.append(refused)
            stored = await behind.store(TASK, f"ambiguous-{code}", 0, picture())
            assert got(plain, stored.key) == picture().data
            proxy.heads.clear()
            await behind.store(TASK, f"ambiguous-{code}", 1, picture())
            assert [b"x-amz-checksum-sha256" in head for head in proxy.heads] == [True]
    proxy.otherwise = refused
    for _ in range(uploads):
        assert behind.refused_checksum == ""
        await behind.store(TASK, f"ambiguous-{code}", 2, picture())
    assert behind.refused_checksum == code


async def test_damaged_bytes_are_no_reason_to_send_no_checksum(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    proxy.faults.extend(
        (refuses("400 Bad Request", "BadDigest"), refuses("503 Slow Down", "SlowDown"))
    )
    await behind.store(TASK, "damaged", 0, picture())
    assert behind.refused_checksum == ""
    assert all(b"x-amz-checksum-sha256" in head for head in proxy.heads)


async def test_a_store_that_lacks_more_is_one_line_at_once(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    proxy.otherwise = refuses("501 Not Implemented", "NotImplemented")
    with pytest.raises(StoreMisconfigured, match=r"the store lacks what is needed \(NotImpl"):
        await behind.probe()
    assert behind.refused_checksum == ""


# -- outputs --------------------------------------------------------------------------------------


async def test_a_stored_picture_is_what_any_client_finds(
    artifacts: ObjectStoreArtifacts, plain: Minio, seen: Recorder
) -> None:
    image = picture()
    stored = await artifacts.store(TASK, "request-1", 3, image)

    assert (stored.bucket, stored.key) == (
        BUCKET,
        f"outputs/text_to_image/request-1/3-{image.sha256[:8]}.png",
    )
    found = plain.stat_object(BUCKET, stored.key)
    md5 = hashlib.md5(image.data, usedforsecurity=False).hexdigest()
    assert (found.size, found.etag) == (stored.size, stored.etag) == (len(image.data), md5)
    assert found.content_type == stored.media_type == "image/png"
    assert hashlib.sha256(got(plain, stored.key)).hexdigest() == stored.sha256
    assert (stored.width, stored.height, stored.seed) == (48, 32, 7)
    assert seen.told == [""]


async def test_the_store_is_told_the_media_type(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    """SeaweedFS derives it from the key where nothing is said; not every store does."""
    await behind.store(TASK, "typed", 0, picture())
    assert b"\r\nContent-Type: image/png\r\n" in proxy.heads[0]


async def test_a_picture_is_not_hashed_again_by_the_sdk(
    artifacts: ObjectStoreArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    for name in ("sha256_hash", "md5sum_hash"):
        original = getattr(minio.api, name)

        def counted(data: bytes | None, original: Any = original) -> Any:
            hashed.append(len(data or b""))
            return original(data)

        monkeypatch.setattr(minio.api, name, counted)
    await artifacts.store(TASK, "hashed", 0, picture())
    assert sum(hashed) == 0


async def test_a_picture_above_the_sdks_own_part_size_is_still_one_put(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    data = bytes(6 * 2**20)
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    image = replace(picture(), data=data, sha256=hashlib.sha256(data).hexdigest())
    stored = await artifacts.store(TASK, "large", 0, image)
    assert plain.stat_object(BUCKET, stored.key).etag == stored.etag == md5


async def test_storing_twice_is_storing_once(artifacts: ObjectStoreArtifacts, plain: Minio) -> None:
    first = await artifacts.store(TASK, "twice", 0, picture())
    second = await artifacts.store(TASK, "twice", 0, picture())
    assert (first.key, first.etag, first.sha256) == (second.key, second.etag, second.sha256)
    listed = plain.list_objects(BUCKET, prefix=f"{PREFIX}/text_to_image/twice/")
    assert [found.object_name for found in listed] == [first.key]


async def test_the_presigned_url_downloads_the_picture_until_it_ends(
    make: Make, plain: Minio
) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    stored = await make(url_ttl=90).store(TASK, "url", 0, picture())
    after = datetime.now(UTC)

    assert await asyncio.to_thread(read_url, stored.url) == picture().data
    assert before <= stored.url_expires_at - timedelta(seconds=90) <= after
    query = parse_qs(urlsplit(stored.url).query)
    signed_at = datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert signed_at + timedelta(seconds=int(query["X-Amz-Expires"][0])) == stored.url_expires_at


async def test_the_end_of_the_url_is_that_of_its_signature(
    artifacts: ObjectStoreArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Earlier(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Earlier":
            return super().now(tz) - timedelta(seconds=100)

    monkeypatch.setattr("consumer.artifacts.object_store.datetime", Earlier)
    stored = await artifacts.store(TASK, "earlier", 0, picture())
    signed = parse_qs(urlsplit(stored.url).query)["X-Amz-Date"][0]
    assert f"{stored.url_expires_at - timedelta(days=1):%Y%m%dT%H%M%SZ}" == signed


async def test_without_the_signature_nobody_reads_the_picture(
    artifacts: ObjectStoreArtifacts,
) -> None:
    stored = await artifacts.store(TASK, "signed", 0, picture())
    with pytest.raises(urllib.error.HTTPError, match="403"):
        await asyncio.to_thread(read_url, stored.url.partition("?")[0])


async def test_the_url_names_the_public_endpoint_and_works_there(
    make: Make, proxy: FaultProxy
) -> None:
    artifacts = make(public_endpoint=proxy.endpoint)
    stored = await artifacts.store(TASK, "public", 0, picture())
    assert proxy.methods == []  # presigning asks nobody
    assert stored.url.startswith(f"{proxy.endpoint}/generation/outputs/")
    assert await asyncio.to_thread(read_url, stored.url) == picture().data
    assert proxy.methods == ["GET"]


@pytest.mark.parametrize("setting", ["s3_endpoint", "s3_public_endpoint"])
@pytest.mark.parametrize(
    ("endpoint", "sent"),
    [
        ("http://LocalHost:9000", "localhost:9000"),
        ("HTTP://Pictures.Example:80/", "pictures.example"),
        ("http://[::1]:9000", "[::1]:9000"),
        ("http://bücher.example", "xn--bcher-kva.example"),
        ("http://pictures.example.:9000", "pictures.example:9000"),
    ],
)
def test_the_url_is_signed_for_the_host_that_clients_send(
    store: StoreOfTwo | MinioServer, plain: Minio, setting: str, endpoint: str, sent: str
) -> None:
    put(plain, "outputs/hosts.png", b"a picture")
    settings = Settings(
        **{setting: endpoint},
        s3_access_key=store.access_key,
        s3_secret_key=SecretStr(store.secret_key),
    )
    artifacts = ObjectStoreArtifacts(store_config(settings), observer=NullObserver())
    url = urlsplit(artifacts._presigner.presigned_get_object(BUCKET, "outputs/hosts.png"))
    assert url.netloc == sent  # what every client connects to and writes into the header
    request = urllib.request.Request(f"{store.endpoint}{url.path}?{url.query}")  # noqa: S310 - http
    request.add_header("Host", sent)
    with urllib.request.urlopen(request, timeout=SOON) as response:  # noqa: S310 - http
        assert response.read() == b"a picture"


@pytest.mark.parametrize("request_id", ["", "a.b", "a/b", "../a", "a b", "a\n", "x" * 65, "ü"])
async def test_no_key_is_made_of_an_unsafe_id(
    artifacts: ObjectStoreArtifacts, seen: Recorder, request_id: str
) -> None:
    with pytest.raises(ValueError, match="a request id is 1-64 characters"):
        await artifacts.store(TASK, request_id, 0, picture())
    assert seen.told == []


async def test_many_pictures_at_once_all_arrive(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    pictures = [picture(shade) for shade in range(40)]
    stored = await asyncio.gather(
        *(artifacts.store(TASK, "many", index, image) for index, image in enumerate(pictures))
    )
    for image, found in zip(pictures, stored, strict=True):
        assert got(plain, found.key) == image.data


# -- inputs ---------------------------------------------------------------------------------------


async def test_an_output_is_fetched_by_its_reference_and_by_its_address(
    artifacts: ObjectStoreArtifacts, seen: Recorder
) -> None:
    stored = await artifacts.store(TASK, "chain", 0, picture())
    by_reference = await artifacts.fetch(reference(stored.key), max_bytes=LIMIT)
    by_address = await artifacts.fetch(f"s3://{BUCKET}/{stored.key}", max_bytes=LIMIT)
    assert by_reference == by_address == picture().data
    assert seen.told == ["", "", ""]


async def test_pictures_inside_the_request_are_decoded(
    artifacts: ObjectStoreArtifacts, seen: Recorder
) -> None:
    text = base64.b64encode(picture().data).decode()
    assert await artifacts.fetch(InlineImage(base64=text), max_bytes=LIMIT) == picture().data
    data_uri = f"data:image/png;base64,{text}"
    assert await artifacts.fetch(data_uri, max_bytes=LIMIT) == picture().data
    assert seen.told == []  # the store was not asked


@pytest.mark.parametrize("size", [30, 31, 32])  # with two, one and no padding signs
async def test_the_size_of_an_inline_picture_is_limited_exactly(
    artifacts: ObjectStoreArtifacts, size: int
) -> None:
    inline = InlineImage(base64=base64.b64encode(bytes(size)).decode())
    assert await artifacts.fetch(inline, max_bytes=size) == bytes(size)
    assert await refusal(artifacts, inline, size - 1) == f"the image has more than {size - 1} bytes"


@pytest.mark.parametrize("text", ["abc", "abcde", "ab=", "abc==="])
async def test_broken_base64_is_a_clear_input_error(
    artifacts: ObjectStoreArtifacts, text: str
) -> None:
    inline = InlineImage.model_construct(base64=text)
    assert await refusal(artifacts, inline) == "the image is not valid base64"


@pytest.mark.parametrize("address", ["http://127.0.0.1/x.png", "https://example.com/x.png"])
async def test_http_inputs_are_refused(
    artifacts: ObjectStoreArtifacts, address: str, seen: Recorder
) -> None:
    assert await refusal(artifacts, address) == "http inputs are not enabled on this worker"
    assert seen.told == []


@pytest.mark.parametrize(
    "source",
    [
        reference("0.png", "private"),
        reference("private/0.png"),
        reference("outputs"),
        reference("outputs-of-others/0.png"),
        "s3://private/outputs/0.png",
    ],
    ids=str,
)
async def test_inputs_from_elsewhere_are_refused_without_asking(
    artifacts: ObjectStoreArtifacts, source: Any, seen: Recorder
) -> None:
    assert (
        await refusal(artifacts, source)
        == "this worker reads no inputs from that bucket and prefix"
    )
    assert seen.told == []


DOTS = ["outputs/../private/0.png", "outputs/./0.png", "outputs//0.png", "outputs/", "outputs/.."]


@pytest.mark.parametrize(
    "key",
    [
        *DOTS,
        " ",
        "outputs/ ",
        "outputs/%2e%2e/x",
        "outputs/a/%2e%2e%20/b",
        "outputs%2F..%5cx",
        "outputs\\..\\x",
    ],
)
async def test_a_key_that_could_lead_elsewhere_is_refused(
    make: Make, key: str, seen: Recorder
) -> None:
    """Even one that has come past the contract; and a blank one, which the SDK does not take."""
    for artifacts in (make(), make(prefix="")):
        source = ArtifactReference.model_construct(bucket=BUCKET, key=key)
        assert await refusal(artifacts, source) == "the key has an empty, `.` or `..` part"
    assert seen.told == []


@pytest.mark.parametrize("key", [*DOTS, "outputs/a\nb", "outputs/a\\..\\b", "", "é" * 513])
async def test_an_address_that_is_none_is_refused(
    artifacts: ObjectStoreArtifacts, key: str, seen: Recorder
) -> None:
    words = "not an address of the form s3://bucket/key"
    assert await refusal(artifacts, f"s3://{BUCKET}/{key}") == words
    assert seen.told == []


async def test_a_listed_place_can_be_read(make: Make, plain: Minio) -> None:
    put(plain, "photos/1.png", b"a photo", bucket="private")
    listed = make(input_prefixes=("private/photos",))
    assert await listed.fetch("s3://private/photos/1.png", max_bytes=LIMIT) == b"a photo"


async def test_keys_that_s3_allows_are_read_as_they_are(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    for key in (f"{PREFIX}/{key}" for key in ODD_KEYS):
        put(plain, key, key.encode())
        for source in (reference(key), f"s3://{BUCKET}/{key}"):
            assert await artifacts.fetch(source, max_bytes=LIMIT) == key.encode()
    assert await refusal(artifacts, f"s3://{BUCKET}/{PREFIX}/in/Z%C3%BCrich.png") == (
        "the object does not exist; keys are not percent-decoded"
    )


async def test_a_missing_object_is_a_clear_input_error(
    make: Make, artifacts: ObjectStoreArtifacts, seen: Recorder
) -> None:
    assert await refusal(artifacts, reference("outputs/none.png")) == "the object does not exist"
    elsewhere = make(input_prefixes=("no-such-bucket",))
    assert await refusal(elsewhere, reference("0.png", "no-such-bucket")) in {
        "the bucket does not exist",
        "the object does not exist",  # a HEAD does not tell which
    }
    assert seen.told == ["", ""]  # it answered


async def test_the_size_of_an_object_is_limited_exactly(
    behind: ObjectStoreArtifacts, plain: Minio, proxy: FaultProxy
) -> None:
    put(plain, "outputs/size.bin", bytes(1000))
    source = reference("outputs/size.bin")
    assert await behind.fetch(source, max_bytes=1000) == bytes(1000)
    proxy.methods.clear()
    assert await refusal(behind, source, 999) == "the object has more than 999 bytes"
    assert proxy.methods == ["HEAD"]  # its content was not asked for


async def test_an_empty_object_is_empty(artifacts: ObjectStoreArtifacts, plain: Minio) -> None:
    put(plain, "outputs/empty", b"")
    assert await artifacts.fetch(reference("outputs/empty"), max_bytes=LIMIT) == b""


async def test_an_object_that_says_it_is_gzip_is_not_unpacked(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    put(plain, "outputs/packed", b"not gzip at all", metadata={"Content-Encoding": "gzip"})
    fetched = await artifacts.fetch(reference("outputs/packed"), max_bytes=LIMIT)
    assert fetched == b"not gzip at all"


async def test_an_object_swapped_between_look_and_read_is_refused(
    behind: ObjectStoreArtifacts, plain: Minio, proxy: FaultProxy
) -> None:
    async def swaps(exchange: Exchange) -> None:
        await asyncio.to_thread(put, plain, "outputs/swapped.png", bytes(2 * LIMIT))
        await passes(exchange)

    put(plain, "outputs/swapped.png", b"small")
    proxy.faults += [passes, swaps]
    source = reference("outputs/swapped.png")
    assert await refusal(behind, source) == "the object changed while it was read"
    assert proxy.methods == ["HEAD", "GET"]


async def test_an_object_cut_short_is_read_again(
    behind: ObjectStoreArtifacts, plain: Minio, proxy: FaultProxy, seen: Recorder
) -> None:
    async def cuts(exchange: Exchange) -> None:
        exchange.writer.write((await exchange.forward())[:-10])

    async def lies(exchange: Exchange) -> None:
        await exchange.answer("200 OK", b"too short", ETag='"x"')

    put(plain, "outputs/cut.png", picture().data)
    proxy.faults += [passes, cuts, passes, lies]
    fetched = await behind.fetch(reference("outputs/cut.png"), max_bytes=LIMIT)
    assert fetched == picture().data
    assert seen.told == ["S3: the object was cut short", "S3: the object was cut short", ""]


async def test_an_answer_without_an_etag_is_none(
    behind: ObjectStoreArtifacts, plain: Minio, proxy: FaultProxy, seen: Recorder
) -> None:
    put(plain, "outputs/looked-at.png", picture().data)
    proxy.faults.append(says("200 OK"))
    fetched = await behind.fetch(reference("outputs/looked-at.png"), max_bytes=LIMIT)
    assert fetched == picture().data
    assert seen.told == ["S3: the answer has no size or no ETag", ""]


async def test_no_more_is_read_than_was_announced(
    behind: ObjectStoreArtifacts, plain: Minio, proxy: FaultProxy
) -> None:
    sent = 0

    async def never_ends(exchange: Exchange) -> None:
        nonlocal sent
        exchange.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while sent < 200 * LIMIT:
            exchange.writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            sent += 0x10000
            await exchange.writer.drain()

    put(plain, "outputs/endless.png", picture().data)
    times = 9  # one more than there are connections: each is given back
    proxy.faults += [passes, never_ends] * times
    async with asyncio.timeout(SOON):
        fetched = await behind.fetch(reference("outputs/endless.png"), max_bytes=LIMIT)
        for _ in proxy.methods:
            await proxy.left.get()
    assert fetched == picture().data
    assert sent < times * 20 * LIMIT  # what fits into the buffers between


async def test_refused_inputs_do_not_use_up_the_connections(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    put(plain, "outputs/once.png", b"x" * 100)
    for _ in range(12):  # more than there are connections
        await refusal(artifacts, reference("outputs/once.png"), 99)
        await refusal(artifacts, reference("outputs/none.png"))
    async with asyncio.timeout(SOON):
        assert len(await artifacts.fetch(reference("outputs/once.png"), max_bytes=100)) == 100


# -- a store that refuses -------------------------------------------------------------------------


async def test_a_missing_bucket_is_a_clear_line_and_apply_creates_it(
    make: Make, seen: Recorder
) -> None:
    artifacts = make(bucket="made-here")
    line = 'S3: the bucket "made-here" does not exist; create it with consumer apply'
    for attempt in (artifacts.probe(), artifacts.store(TASK, "x", 0, picture())):
        with pytest.raises(StoreMisconfigured) as raised:
            await attempt
        assert str(raised.value) == line
    assert seen.told == [line, line]  # told once each: at once, not after the deadline

    assert await artifacts.ensure_bucket() is True
    assert await artifacts.ensure_bucket() is False
    await artifacts.probe()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"secret_key": "wrong-secret"}, "S3: the secret key is wrong"),
        ({"access_key": "wrong-access"}, "S3: the access key is not known"),
    ],
)
async def test_a_wrong_key_pair_is_a_clear_line_everywhere(
    make: Make, seen: Recorder, changes: dict[str, str], line: str
) -> None:
    artifacts = make(**changes)
    for attempt in (
        artifacts.probe(),
        artifacts.ensure_bucket(),
        artifacts.store(TASK, "x", 0, picture()),
        artifacts.fetch(reference("outputs/none.png"), max_bytes=LIMIT),
    ):
        with pytest.raises(StoreMisconfigured) as raised:
            await attempt
        assert str(raised.value) == line
    assert await artifacts.reachable() is False
    assert seen.told == [line] * 5


async def test_a_key_pair_for_one_prefix_is_enough(
    make: Make, store: StoreOfTwo | MinioServer, plain: Minio
) -> None:
    scoped = {"access_key": store.scoped_access_key, "secret_key": store.scoped_secret_key}
    artifacts = make(**scoped)
    await artifacts.probe()
    assert await artifacts.reachable() is True
    assert await artifacts.ensure_bucket() is False
    stored = await artifacts.store(TASK, "scoped", 0, picture())
    assert await artifacts.fetch(reference(stored.key), max_bytes=LIMIT) == picture().data

    put(plain, "photos/2.png", b"a photo", bucket="private")
    allowed_by_us_only = make(**scoped, input_prefixes=("private",))
    source = reference("photos/2.png", "private")
    assert await refusal(allowed_by_us_only, source) == "this worker may not read the object"

    elsewhere = make(**scoped, prefix="elsewhere")
    for attempt in (elsewhere.probe(), elsewhere.ensure_bucket()):
        with pytest.raises(StoreMisconfigured) as raised:
            await attempt
        assert str(raised.value) == (
            'S3: access is denied; reading and writing "generation/elsewhere/*" is needed'
        )


async def test_a_bucket_that_exists_is_ours_or_a_clear_line(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    exists = refuses("409 Conflict", "BucketAlreadyExists")
    proxy.faults += [exists, passes]
    assert await behind.ensure_bucket() is False
    proxy.faults += [exists, says("404 Not IdLookup")]
    with pytest.raises(StoreMisconfigured, match=r"the store refuses \(BucketAlreadyExists\)"):
        await behind.ensure_bucket()


async def test_a_store_that_hides_what_is_missing_is_reachable(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    """As AWS does for those who may not list."""
    proxy.faults.append(refuses("403 Forbidden", "AccessDenied"))
    assert await behind.reachable() is True


async def test_a_probe_leaves_nothing_behind(artifacts: ObjectStoreArtifacts, plain: Minio) -> None:
    await artifacts.probe()
    listed = plain.list_objects(BUCKET, prefix=f"{PREFIX}/probe", recursive=True)
    assert [found.object_name for found in listed] == []


async def test_a_worker_that_may_not_delete_passes_the_probe(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    proxy.faults += [passes, passes, refuses("403 Forbidden", "AccessDenied")]
    await behind.probe()
    assert proxy.methods == ["PUT", "GET", "DELETE"]


async def test_a_probe_finds_a_store_that_gives_back_something_else(
    behind: ObjectStoreArtifacts, proxy: FaultProxy, seen: Recorder
) -> None:
    async def alters(exchange: Exchange) -> None:
        answer = await exchange.forward()
        exchange.writer.write(answer[:-2] + b"?" + answer[-1:])

    proxy.faults += [passes, alters]
    await behind.probe()
    assert seen.told == ["S3: what was written is not what is read", ""]


async def test_tls_to_a_store_without_it_is_a_clear_line(make: Make, store: ObjectStore) -> None:
    with pytest.raises(StoreMisconfigured, match=r"^S3: TLS fails \([a-z0-9 ]+\)$"):
        await make(endpoint=store.endpoint.replace("http:", "https:")).probe()


# -- a store that fails ---------------------------------------------------------------------------

ETAG = '"00000000000000000000000000000000"'
PAGE = b"<html>all is well</html>"
FAILS: dict[str, tuple[Fault, str]] = {
    "silent": (is_silent, "S3: no answer in time"),
    "drip": (drips, "S3: no complete answer in time"),
    "hang-up": (hangs_up, "S3: the connection broke"),
    "503": (refuses("503 Slow Down", "SlowDown"), "S3: the store cannot do it now (SlowDown)"),
    "503-page": (
        says("503 No", PAGE, Content_Type="text/html"),
        "S3: the answer is not that of an S3 store (HTTP 503)",
    ),
    "full": (
        refuses("507 Insufficient Storage", "XMinioStorageFull"),
        "S3: the store cannot do it now (XMinioStorageFull)",
    ),
    "full-500": (
        refuses("500 Internal Server Error", "InsufficientStorage"),
        "S3: the store cannot do it now (InsufficientStorage)",
    ),
    "full-without-words": (
        says("507 Insufficient Storage"),
        "S3: the answer is not that of an S3 store (HTTP 507)",
    ),
    "200-page": (says("200 OK", PAGE), "S3: the answer has no ETag"),
    "empty-etag": (says("200 OK", ETag='""'), "S3: the answer has no ETag"),
    "wrong-etag": (says("200 OK", ETag=ETAG), "S3: the ETag is not the MD5 of what was sent"),
    "redirect": (
        says("307 Elsewhere", Location="http://127.0.0.1:9/"),
        "S3: the answer is not that of an S3 store (HTTP 307)",
    ),
    "no-xml": (
        says("500 No", b"<Error", Content_Type="application/xml"),
        "S3: the answer is not that of an S3 store",
    ),
}


@pytest.mark.parametrize("name", FAILS)
async def test_a_failed_try_is_told_and_tried_again(
    make: Make, proxy: FaultProxy, plain: Minio, seen: Recorder, name: str
) -> None:
    fault, words = FAILS[name]
    # A drip is cut off by the time for one try, silence by the time between two pieces.
    times = {"attempt_timeout": 0.5} if fault is drips else {"read_timeout": 0.5}
    artifacts = make(endpoint=proxy.endpoint, **times)
    proxy.faults.append(fault)
    stored = await artifacts.store(TASK, f"failed-{name}", 0, picture())
    assert got(plain, stored.key) == picture().data
    assert (seen.told[0], seen.told[-1]) == (words, "")
    async with asyncio.timeout(SOON):
        await proxy.left.get()  # the failed try's connection is gone, and with it its thread


async def test_a_body_damaged_on_the_way_is_noticed_and_sent_again(
    behind: ObjectStoreArtifacts, proxy: FaultProxy, plain: Minio, seen: Recorder
) -> None:
    proxy.faults.append(damages_the_body)
    stored = await behind.store(TASK, "damaged", 0, picture())
    assert got(plain, stored.key) == picture().data
    assert len(seen.told) == 2
    assert seen.told[0].startswith("S3: the store did not take it (")


async def test_the_store_itself_is_given_the_checksum(
    artifacts: ObjectStoreArtifacts, seen: Recorder
) -> None:
    wrong = replace(picture(), sha256="00" * 32)
    storing = asyncio.create_task(artifacts.store(TASK, "checksum", 0, wrong))
    codes = ("BadDigest", "XAmzContentSHA256Mismatch")  # SeaweedFS' and MinIO's
    async with asyncio.timeout(SOON):
        said = await seen.news.get()
    assert said in {f"S3: the store did not take it ({code})" for code in codes}
    storing.cancel()
    await asyncio.wait([storing])


async def test_an_etag_that_is_no_md5_is_taken(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    proxy.faults += [
        says("200 OK", ETag='"a1b2-2"'),
        says("200 OK", ETag=ETAG, x_amz_server_side_encryption="aws:kms"),
    ]
    assert (await behind.store(TASK, "parts", 0, picture())).etag == "a1b2-2"
    assert (await behind.store(TASK, "kms", 0, picture())).etag == ETAG.strip('"')


async def test_a_look_is_one_try(
    behind: ObjectStoreArtifacts, proxy: FaultProxy, seen: Recorder
) -> None:
    proxy.faults.append(refuses("503 Slow Down", "SlowDown"))
    assert await behind.reachable() is False
    assert await behind.reachable() is True
    assert seen.told == ["S3: the store cannot do it now (SlowDown)", ""]


async def test_the_pauses_grow_and_are_spread(
    behind: ObjectStoreArtifacts, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        ranges.append((low, high))
        return 0.0

    monkeypatch.setattr("consumer.artifacts.object_store.random.uniform", uniform)
    proxy.faults += [refuses("503 Slow Down", "SlowDown")] * 5
    await behind.store(TASK, "pauses", 0, picture())
    assert ranges == [(0, 0.01), (0, 0.02), (0, 0.04), (0, 0.05), (0, 0.05)]


async def test_a_refused_connection_ends_at_the_deadline(make: Make, seen: Recorder) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    artifacts = make(endpoint=nobody, deadline=2)
    async with asyncio.timeout(SOON):
        with pytest.raises(StoreUnavailable) as raised:
            await artifacts.store(TASK, "refused", 0, picture())
    assert type(raised.value) is StoreUnavailable
    assert str(raised.value) == seen.told[-1]
    assert seen.told[:2] == ["S3: no connection", "S3: no connection"]


async def test_a_silent_store_ends_at_the_deadline(make: Make, proxy: FaultProxy) -> None:
    proxy.faults += [is_silent] * 100
    artifacts = make(endpoint=proxy.endpoint, read_timeout=600, attempt_timeout=600, deadline=1)
    async with asyncio.timeout(SOON):
        with pytest.raises(StoreUnavailable, match="no complete answer in time"):
            await artifacts.fetch(reference("outputs/x.png"), max_bytes=LIMIT)
        await proxy.left.get()


async def test_the_next_store_after_an_outage_is_told_as_recovery(
    tmp_path: Path, seen: Recorder
) -> None:
    with ObjectStore(tmp_path / "store") as store:
        artifacts = ObjectStoreArtifacts(config_for(store, deadline=SOON * 2), observer=seen)
        try:
            await artifacts.ensure_bucket()
            await artifacts.store(TASK, "before", 0, picture())
            store.kill()
            assert await artifacts.reachable() is False
            storing = asyncio.create_task(artifacts.store(TASK, "during", 0, picture()))
            await asyncio.to_thread(store.restart)
            stored = await storing
            assert await artifacts.reachable() is True
            assert got(plain_client(store), stored.key) == picture().data
        finally:
            await artifacts.close()
    assert seen.told[:2] == ["", ""]
    assert "S3: no connection" in seen.told[2:-2]
    assert "" not in seen.told[2:-2]
    assert seen.told[-2:] == ["", ""]


# -- threads, cancellation, the end ---------------------------------------------------------------


async def test_cancelled_calls_give_their_threads_back(
    make: Make, proxy: FaultProxy, plain: Minio, seen: Recorder
) -> None:
    artifacts = make(endpoint=proxy.endpoint, read_timeout=600, attempt_timeout=600, deadline=600)
    proxy.faults += [is_silent] * 8  # as many as there are threads
    stuck = [asyncio.create_task(artifacts.store(TASK, "c", i, picture())) for i in range(12)]
    async with asyncio.timeout(SOON):
        for _ in range(8):
            await proxy.met.get()
        for task in reversed(stuck):  # those that wait first, or they would take freed threads
            task.cancel()
        await asyncio.wait(stuck)
        assert all(task.cancelled() for task in stuck)
        for _ in range(8):
            await proxy.left.get()
        stored = await artifacts.store(TASK, "c", 0, picture(9))
    assert got(plain, stored.key) == picture(9).data
    assert proxy.methods == ["PUT"] * 9  # the four that waited were never sent
    assert seen.told == [""]


async def test_the_event_loop_goes_on_while_every_thread_is_held(
    make: Make, proxy: FaultProxy
) -> None:
    artifacts = make(endpoint=proxy.endpoint, attempt_timeout=0.3, deadline=0.3)
    proxy.faults += [drips] * 100
    async with asyncio.timeout(SOON):  # the proxy itself lives in this loop
        ended = await asyncio.gather(
            *(artifacts.store(TASK, "held", i, picture()) for i in range(24)),
            return_exceptions=True,
        )
    assert {str(end) for end in ended} == {"S3: no complete answer in time"}


async def test_closing_breaks_off_what_is_under_way(make: Make, proxy: FaultProxy) -> None:
    artifacts = make(endpoint=proxy.endpoint, read_timeout=600, attempt_timeout=600, deadline=600)
    proxy.faults += [drips] * 8  # as many as there are threads: the others wait for one
    storing = [asyncio.create_task(artifacts.store(TASK, "e", i, picture())) for i in range(12)]
    async with asyncio.timeout(SOON):
        for _ in range(8):
            await proxy.met.get()
        await artifacts.close()
        ended = await asyncio.gather(*storing, return_exceptions=True)
        for _ in range(8):
            await proxy.left.get()
    assert {(type(end), str(end)) for end in ended} == {
        (StoreUnavailable, "S3: the client is closed")
    }
    assert proxy.methods == ["PUT"] * 8
    with pytest.raises(StoreUnavailable, match="the client is closed"):
        await artifacts.probe()
    assert not any(thread.name.startswith("artifacts") for thread in await live_threads())


async def live_threads() -> list[threading.Thread]:
    """The threads that are there once those of a closed client have had the time to end."""
    for thread in threading.enumerate():
        if thread.name.startswith("artifacts"):
            await asyncio.to_thread(thread.join, SOON)
    return threading.enumerate()


# -- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [fault for fault, _ in FAILS.values()], ids=FAILS)
async def test_no_secret_and_no_address_is_in_what_is_raised(
    make: Make, proxy: FaultProxy, store: ObjectStore, seen: Recorder, fault: Fault
) -> None:
    proxy.faults += [fault] * 100
    times = {"read_timeout": 0.1, "attempt_timeout": 0.1, "deadline": 0.1}
    artifacts = make(endpoint=proxy.endpoint, **times)
    with pytest.raises(StoreUnavailable) as raised:
        await artifacts.store(TASK, "secret", 0, picture())
    shown = "".join(traceback.format_exception(raised.value)) + repr(raised.value)
    for text in (shown.replace(__file__, ""), *seen.told):
        for hidden in (store.secret_key, store.access_key, "X-Amz", "Signature", proxy.endpoint):
            assert hidden not in text
    assert raised.value.__context__ is None  # and no library's exception comes along


# -- outputs that nobody is told of ---------------------------------------------------------------


async def test_two_runs_of_one_request_do_not_touch_each_others_pictures(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    first, second = picture(120), picture(121)
    kept, lost = [await artifacts.store(TASK, "race", 0, image) for image in (first, second)]
    assert kept.key != lost.key
    await artifacts.discard(lost)
    assert got(plain, kept.key) == first.data
    left = plain.list_objects(bucket_name=BUCKET, prefix=f"{PREFIX}/{TASK}/race/")
    assert [one.object_name for one in left] == [kept.key]


async def test_discarding_never_raises_and_says_nothing_about_the_store(
    make: Make, store: StoreOfTwo | MinioServer, seen: Recorder
) -> None:
    scoped = make(access_key=store.scoped_access_key, secret_key=store.scoped_secret_key)
    stored = await scoped.store(TASK, "discarded", 0, picture())
    told = list(seen.told)
    await scoped.discard(stored.model_copy(update={"key": "elsewhere/0.png"}))  # not allowed to
    for _ in range(2):  # the second time it is gone already
        await scoped.discard(stored)
    assert seen.told == told
