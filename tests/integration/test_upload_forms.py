"""Upload forms and the lifecycle of uploads, on real S3 servers."""

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.error import S3Error
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule

from consumer.app.probes import NullObserver
from consumer.artifacts import ObjectStoreArtifacts, StoreConfig, StoreMisconfigured, object_store
from consumer.devstack import ObjectStore
from consumer.ports.store import UploadTooLarge
from generation_contracts import UploadReply, UploadRequest
from tests.integration import minio_server
from tests.integration.minio_server import MinioServer
from tests.support.plain_s3 import plain_s3_client

BUCKET = "generation"
PNG = UploadRequest(size=10, media_type="image/png")


Store = ObjectStore | MinioServer


@pytest.fixture(
    scope="module", params=["weed", *(["minio"] if minio_server.is_installed() else [])]
)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    kind = ObjectStore if request.param == "weed" else MinioServer
    with kind(tmp_path_factory.mktemp("store")) as server:
        yield server


def config(store: Store, **changes: Any) -> StoreConfig:
    values: dict[str, Any] = {
        "endpoint": store.endpoint,
        "access_key": store.access_key,
        "secret_key": store.secret_key,
        "bucket": BUCKET,
        "prefix": "team/outputs",
    }
    return StoreConfig(**(values | changes))


@pytest.fixture
async def artifacts(store: Store) -> AsyncIterator[ObjectStoreArtifacts]:
    opened = ObjectStoreArtifacts(config(store), observer=NullObserver())
    await opened.ensure_bucket()
    yield opened
    await opened.close()


@pytest.fixture
def admin(store: Store, artifacts: ObjectStoreArtifacts) -> Minio:
    return plain_s3_client(store)


def post(form: UploadReply, data: bytes) -> int:
    answer = httpx2.post(form.url, data=form.fields, files={"file": ("x", data)})
    return answer.status_code


def test_a_form_stores_the_file_under_the_prefix(
    artifacts: ObjectStoreArtifacts, admin: Minio
) -> None:
    form = artifacts.sign_upload(PNG)
    assert form.key.startswith("team/outputs/uploads/")
    assert post(form, b"0123456789") in {200, 204}
    stored = admin.get_object(form.bucket, form.key)
    assert stored.read() == b"0123456789"
    assert stored.headers["Content-Type"] == "image/png"


@pytest.mark.parametrize(
    ("changes", "data"),
    [
        ({}, b"0123456789+"),
        ({}, b"012345678"),
        ({"Content-Type": "text/html"}, b"0123456789"),
        ({"key": "team/outputs/uploads/other.png"}, b"0123456789"),
        ({"key": "team/outputs/text_to_image/a/0-1.png"}, b"0123456789"),
        ({"x-amz-meta-other": "1"}, b"0123456789"),
        ({"x-amz-signature": "0" * 64}, b"0123456789"),
        ({"x-amz-signature": ""}, b"0123456789"),
    ],
    ids=[
        *("too large", "too small", "other type", "other key", "key of an output", "other field"),
        *("other signature", "no signature"),
    ],
)
def test_a_form_accepts_only_the_file_that_it_was_signed_for(
    artifacts: ObjectStoreArtifacts, admin: Minio, changes: dict[str, str], data: bytes
) -> None:
    form = artifacts.sign_upload(PNG)
    changed = UploadReply(**{**dict(form), "fields": {**form.fields, **changes}})
    assert 400 <= post(changed, data) < 500
    with pytest.raises(S3Error):
        admin.stat_object(BUCKET, changed.fields["key"])


def test_an_expired_form_is_refused(
    artifacts: ObjectStoreArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_UPLOAD_TTL", timedelta(seconds=-1))
    form = artifacts.sign_upload(PNG)
    assert form.expires_at < datetime.now(UTC)
    assert post(form, b"0123456789") == 403


def test_a_form_expires_within_minutes(artifacts: ObjectStoreArtifacts) -> None:
    left = artifacts.sign_upload(PNG).expires_at - datetime.now(UTC)
    assert timedelta(minutes=9) < left <= timedelta(minutes=10)


async def test_the_form_has_the_public_address(store: Store) -> None:
    addresses = {
        "https://s3.example.com": "https://s3.example.com/generation/",
        "https://s3.us-east-1.amazonaws.com": "https://generation.s3.us-east-1.amazonaws.com/",
    }
    for public, url in addresses.items():
        signing = ObjectStoreArtifacts(
            config(store, public_endpoint=public), observer=NullObserver()
        )
        assert signing.sign_upload(PNG).url == url
        await signing.close()


def test_a_file_over_the_limit_is_not_signed(artifacts: ObjectStoreArtifacts) -> None:
    limit = 20 * 2**20
    artifacts.sign_upload(UploadRequest(size=limit, media_type="image/jpeg"))
    with pytest.raises(UploadTooLarge, match=f"more than {limit} bytes"):
        artifacts.sign_upload(UploadRequest(size=limit + 1, media_type="image/jpeg"))


async def test_the_lifecycle_rule_is_added_once_and_other_rules_stay(
    artifacts: ObjectStoreArtifacts, admin: Minio
) -> None:
    other = Rule(
        ENABLED, rule_filter=Filter(prefix="logs/"), rule_id="logs", expiration=Expiration(days=9)
    )
    admin.set_bucket_lifecycle(BUCKET, LifecycleConfig([other]))
    assert await artifacts.expire_uploads()
    assert not await artifacts.expire_uploads()
    found = admin.get_bucket_lifecycle(BUCKET)
    assert found is not None
    rules = {
        rule.rule_filter.prefix: rule.expiration.days
        for rule in found.rules
        if rule.rule_filter is not None and rule.expiration is not None
    }
    assert rules == {"logs/": 9, "team/outputs/uploads/": 1}


async def test_a_store_that_refuses_the_rule_is_reported(store: Store) -> None:
    refused = ObjectStoreArtifacts(config(store, bucket="absent"), observer=NullObserver())
    try:
        with pytest.raises(StoreMisconfigured):
            await refused.expire_uploads()
    finally:
        await refused.close()
