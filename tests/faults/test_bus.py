"""The NATS connection of the daemon: permanent loss, and unanswered calls at the start."""

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from consumer.app.apply import apply
from consumer.app.check import check
from consumer.bus import topology
from consumer.bus.nats_internals import RobustClient
from consumer.settings import Settings
from tests.support.scene import Scene

EXIT_UNAVAILABLE = 69
AT_ONCE = 15.0  # seconds; the run takes a minute


async def test_permanently_closed_connection_ends_the_daemon_during_a_job(
    scene: Scene,
) -> None:
    # One job at a time: nothing is pulled meanwhile.
    worker = await scene.start("bus_closed", CONSUMER_JOBS_IN_FLIGHT="1")
    request_id = await scene.submit()
    assert await scene.exit_code(worker, within=AT_ONCE) == EXIT_UNAVAILABLE
    assert "the client has closed the connection permanently" in worker.log_since_start()
    await scene.start()
    assert (await scene.event(request_id))["type"] == "generation.v1.succeeded"


async def test_permanently_closed_connection_ends_the_daemon_during_loading(
    scene: Scene,
) -> None:
    worker = scene.launch("bus_closed_while_loading")
    assert await scene.exit_code(worker) == EXIT_UNAVAILABLE


async def test_unanswered_calls_are_retried_at_the_start(scene: Scene) -> None:
    worker = await scene.start("unanswered_calls")
    log = worker.log_since_start()
    for call in (
        "$JS.API.STREAM.INFO",
        "$JS.API.CONSUMER",
        "the service of this worker does not reply",
    ):
        assert call in log
    request_id = await scene.submit()
    assert (await scene.event(request_id))["type"] == "generation.v1.succeeded"


@pytest.mark.parametrize("command", ["apply", "check"])
async def test_command_retries_an_unanswered_call(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    values: dict[str, Any] = {name.lower(): value for name, value in scene.settings().items()}
    settings = Settings(**values)
    monkeypatch.setattr(topology, "API_TIMEOUT", 0.2)
    request, unanswered = RobustClient.request, ["$JS.API."]

    async def request_or_hang(self: RobustClient, subject: str, *args: Any, **options: Any) -> Any:
        if unanswered and subject.startswith(unanswered[0]):
            unanswered.clear()
            await asyncio.Event().wait()  # until the timeout of the caller
        return await request(self, subject, *args, **options)

    monkeypatch.setattr(RobustClient, "request", request_or_hang)
    with capture_logs() as logs:
        if command == "apply":
            assert set((await apply(settings)).values()) == {"unchanged"}
        else:
            assert await check(settings, lambda _: None, model=False) == 0
    assert unanswered == []
    assert "bus_not_available_yet" in {line["event"] for line in logs}
