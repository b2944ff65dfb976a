"""What the daemon does about the store before it takes requests."""

from typing import Any

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from consumer.app.daemon import Daemon
from consumer.artifacts import StoreMisconfigured
from consumer.ports.store import StoreUnavailable
from consumer.settings import Settings, SettingsError

ADDRESS = "http://127.0.0.1:9333"


class FailingStore:
    """A store whose probe fails."""

    def __init__(self, error: StoreUnavailable) -> None:
        self._error = error

    async def probe(self) -> None:
        raise self._error


async def check_store(error: StoreUnavailable) -> None:
    settings = Settings(
        model_type="text_to_image",
        s3_endpoint=ADDRESS,
        s3_access_key="key",
        s3_secret_key=SecretStr("secret"),
    )
    runner: Any = None
    store: Any = FailingStore(error)
    await Daemon(settings, lambda _: runner)._check_store(store)


async def test_a_store_that_is_away_is_logged_with_its_address() -> None:
    with capture_logs() as logs:
        await check_store(StoreUnavailable("S3: no connection"))
    (line,) = logs
    assert line == {
        "event": "started_without_store",
        "log_level": "warning",
        "reason": f"S3 at {ADDRESS}: no connection",
    }


async def test_a_store_that_refuses_the_worker_ends_the_start() -> None:
    with pytest.raises(StoreMisconfigured) as raised:
        await check_store(StoreMisconfigured("S3: the secret key is wrong"))
    assert str(raised.value) == f"S3 at {ADDRESS}: the secret key is wrong"


def test_missing_keys_are_reported_before_a_runner_is_made() -> None:
    def make_runner(_: Settings) -> Any:
        pytest.fail("called")

    with pytest.raises(SettingsError) as raised:
        Daemon(Settings(model_type="text_to_image"), make_runner)
    names = [line.partition(":")[0] for line in str(raised.value).splitlines()]
    assert names == ["S3_ACCESS_KEY", "S3_SECRET_KEY"]
