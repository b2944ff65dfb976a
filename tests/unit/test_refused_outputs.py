"""A job whose output the safety checker has refused."""

from consumer.ports.model import RunnerOutput
from generation_contracts import FailedEvent
from tests.support.behaviour import request_body, soon
from tests.support.memory_world import MemoryWorld


async def test_a_refused_output_fails_the_request_at_once_and_stores_no_file(
    world: MemoryWorld,
) -> None:
    world.runner.script_runs(lambda _: RunnerOutput(refused=True, warnings=("a warning",)))
    await world.send(request_body(seed=3))
    await soon(world.work())
    event = await world.result("a")
    assert isinstance(event, FailedEvent)
    assert event.attempt == 1
    assert (event.failure.code, event.failure.details) == (
        "model_error",
        {"cause": "safety_checker"},
    )
    assert not world.artifacts.objects
