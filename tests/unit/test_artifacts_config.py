"""The configuration of the object store: allowed locations and refused values."""

from typing import Any

import pytest
from pydantic import SecretStr

from consumer.artifacts import StoreConfig, StoreMisconfigured, store_config
from consumer.ports.store import StoreUnavailable
from consumer.settings import Settings, SettingsError


def config(**changes: Any) -> StoreConfig:
    values: dict[str, Any] = {
        "endpoint": "http://127.0.0.1:9000",
        "access_key": "the-access-key",
        "secret_key": "the-secret-key",
        "bucket": "generation",
        "prefix": "outputs",
    }
    return StoreConfig(**(values | changes))


def test_keys_start_with_the_prefix() -> None:
    assert config().key("text_to_image", "a", "0.png") == "outputs/text_to_image/a/0.png"
    assert config(prefix="a/b").key("c") == "a/b/c"
    assert config(prefix="").key("text_to_image", "a") == "text_to_image/a"


@pytest.mark.parametrize(
    ("bucket", "key", "allowed"),
    [
        ("generation", "outputs/text_to_image/a/0.png", True),
        ("generation", "outputs/Zürich 100%/a?b#c.png", True),
        ("generation", "outputs", False),
        ("generation", "outputs-of-others/0.png", False),
        ("generation", "private/0.png", False),
        ("generation-2", "outputs/0.png", False),
        ("other", "outputs/0.png", False),
    ],
)
def test_only_the_prefix_of_the_worker_is_readable(bucket: str, key: str, allowed: bool) -> None:
    assert config().may_read(bucket, key) is allowed


def test_configured_read_locations_replace_the_prefix() -> None:
    listed = config(input_prefixes=("uploads/photos", "archive", "generation/outputs/"))
    assert listed.may_read("uploads", "photos/1.png")
    assert not listed.may_read("uploads", "photos2/1.png")
    assert not listed.may_read("uploads", "1.png")
    assert listed.may_read("archive", "1.png")

    assert listed.may_read("generation", "outputs/1.png")
    assert not config(input_prefixes=("archive",)).may_read("generation", "outputs/1.png")


def test_uploads_are_always_allowed() -> None:
    listed = config(input_prefixes=("archive",))
    assert listed.may_read("generation", "outputs/uploads/1.png")
    assert not listed.may_read("generation", "outputs/text_to_image/1.png")
    assert not listed.may_read("other", "outputs/uploads/1.png")
    assert config(prefix="", input_prefixes=("archive",)).may_read("generation", "uploads/1.png")


def test_without_a_prefix_the_bucket_is_readable() -> None:
    assert config(prefix="").may_read("generation", "anything.png")
    assert not config(prefix="").may_read("other", "anything.png")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"access_key": ""}, "S3_ACCESS_KEY: set it to the access key of the store"),
        ({"secret_key": ""}, "S3_SECRET_KEY: set it to the secret key of the store"),
        ({"endpoint": "127.0.0.1:9000"}, "S3_ENDPOINT: scheme in endpoint must be http or https"),
        ({"endpoint": "http://x/path"}, "S3_ENDPOINT: path in endpoint is not allowed"),
        ({"public_endpoint": "ftp://x"}, "S3_PUBLIC_ENDPOINT: scheme in endpoint must be http or"),
        ({"bucket": "a..b"}, "S3_BUCKET: bucket name a..b contains invalid successive characters"),
        ({"bucket": "A_B"}, "S3_BUCKET: invalid bucket name A_B"),
        ({"region": "no region"}, "S3_REGION: invalid region no region"),
        ({"url_ttl": 0}, "S3_URL_TTL: must be 1 to 604800 seconds"),
        ({"url_ttl": 604_801}, "S3_URL_TTL: must be 1 to 604800 seconds"),
        ({"prefix": "a//b"}, "S3_PREFIX: must be names between slashes"),
        ({"prefix": "/a"}, "S3_PREFIX: must be names between slashes"),
        ({"prefix": "a/../b"}, "S3_PREFIX: must be names between slashes"),
    ],
)
def test_a_wrong_setting_is_reported_in_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingsError) as raised:
        config(**changes)
    (found,) = str(raised.value).splitlines()
    assert found.startswith(line)


def test_every_wrong_setting_is_reported() -> None:
    with pytest.raises(SettingsError) as raised:
        config(access_key="", secret_key="", bucket="A_B")
    names = [line.partition(":")[0] for line in str(raised.value).splitlines()]
    assert names == ["S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_BUCKET"]


def test_configuration_error_is_a_store_error() -> None:
    assert issubclass(StoreMisconfigured, StoreUnavailable)


def test_repr_has_no_keys() -> None:
    assert "the-" not in repr(config())


def test_settings_become_the_configuration() -> None:
    settings = Settings(
        s3_endpoint="http://127.0.0.1:9333",
        s3_access_key="the-access-key",
        s3_secret_key=SecretStr("the-secret-key"),
        s3_bucket="pictures",
        s3_prefix="a/b",
        s3_region="eu-west-1",
        s3_public_endpoint="https://pictures.example",
        s3_url_ttl=60,
        s3_input_prefixes=("uploads/photos",),
    )
    actual = store_config(settings)
    assert actual == config(
        endpoint="http://127.0.0.1:9333",
        bucket="pictures",
        prefix="a/b",
        region="eu-west-1",
        public_endpoint="https://pictures.example",
        url_ttl=60,
        input_prefixes=("uploads/photos",),
    )
