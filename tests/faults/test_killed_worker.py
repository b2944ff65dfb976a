"""kill -9 of a worker at every stage: one terminal event, one set of objects."""

import signal

from tests.faults.scene import ACK_WAIT, Scene


async def test_killed_in_run(scene: Scene) -> None:
    dying = await scene.start("killed_in_run")
    request_id = await scene.submit()
    assert await scene.ended(dying) == -signal.SIGKILL
    await scene.start()
    event = await scene.event(request_id, within=ACK_WAIT + 1)
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 2)
    await scene.emptied()
    assert scene.runs() == [request_id] * 2
    assert len(await scene.keys()) == 1
