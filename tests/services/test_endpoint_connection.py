"""The second connection of a worker, for calls, cancellations and `$SRV`."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from consumer.devstack import DevStack
from tests.support.observations import readiness
from tests.support.scene import Scene

SUCCEEDED = "generation.v1.succeeded"


async def test_a_worker_with_closed_endpoints_finishes_its_request_and_stops(
    tmp_path: Path,
) -> None:
    """The restarted server allows too few subscriptions for the endpoints' connection."""
    stack = DevStack(tmp_path / "stack", persist=False)
    async with AsyncExitStack() as parts:
        parts.enter_context(stack)
        scene = Scene(stack, tmp_path, parts)
        await scene.open()
        worker = await scene.start("held_in_run")
        request_id = await scene.submit()
        await scene.until_noted("run")
        stack.nats.kill()
        stack.nats._config = "max_subscriptions: 8"
        stack.nats.start()
        await asyncio.to_thread(stack.nats.wait_ready)
        await scene.until_logged(worker, "endpoints_lost")
        await scene.until_logged(worker, "bus_reconnected")
        status, conditions = await readiness(worker)
        assert status == 503
        assert (conditions["bus"], conditions["daemon"]) == ("not connected", "draining")
        (tmp_path / "run.go").touch()
        assert await scene.exit_code(worker) == 69
        event = await scene.event(request_id)
        assert (event["type"], event["attempt"]) == (SUCCEEDED, 1)
