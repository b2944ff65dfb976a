"""The daemon's own connection: lost for good, late at the start."""

from tests.faults.scene import Scene

EXIT_UNAVAILABLE = 69
AT_ONCE = 15.0  # seconds; the run that goes on meanwhile takes a minute


async def test_a_bus_that_is_closed_for_good_ends_the_daemon_while_a_job_runs(
    scene: Scene,
) -> None:
    # One job at a time: nothing is pulled meanwhile.
    worker = await scene.start("bus_closed", CONSUMER_JOBS_IN_FLIGHT="1")
    request_id = await scene.submit()
    assert await scene.ended(worker, within=AT_ONCE) == EXIT_UNAVAILABLE
    assert "the client has given up" in worker.log_since_start()
    await scene.start()
    assert (await scene.event(request_id))["type"] == "generation.v1.succeeded"


async def test_a_bus_that_is_closed_for_good_ends_the_daemon_while_the_model_is_loaded(
    scene: Scene,
) -> None:
    worker = scene.launch("bus_closed_while_loading")
    assert await scene.ended(worker) == EXIT_UNAVAILABLE


async def test_a_jetstream_that_answers_late_is_waited_for_at_the_start(scene: Scene) -> None:
    await scene.start("late_jetstream")
    request_id = await scene.submit()
    assert (await scene.event(request_id))["type"] == "generation.v1.succeeded"
