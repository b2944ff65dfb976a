"""Invalid output of a real model is not published, and does not affect the next request.

`tests/integration` tests that the runners reject such outputs, for both tasks. These tests check
the outcome of the request, with the real runner and codec, and ports in memory.
"""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import pytest
import torch
from PIL import Image

from consumer.inference.run_queue import RunQueue
from consumer.inference.worker import InferenceWorker
from consumer.jobs.admission import Admission
from consumer.jobs.executor import Executor, Limits
from consumer.media.codec import ImageCodec
from consumer.runners import ModelConfig, ModelRunner, create_runner
from generation_contracts import FailedEvent, FailureCode, ImageArtifact, SucceededEvent, Task
from tests.support.memory_ports import MemoryDelivery
from tests.support.memory_world import LONG, MemoryWorld
from tests.support.tiny_models import Folder

TASK = Task.TEXT_TO_IMAGE
SIDE = 32  # pixels


class Worker:
    """A worker with a real model.

    Attributes:
        world: What surrounds it.
        pipe: The model's pipeline.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.world = MemoryWorld(task=TASK)
        self._runner = runner
        self._run_queue = RunQueue()
        self._inference = InferenceWorker(runner, self._run_queue)
        self._executor: Executor

    async def open(self) -> None:
        model = await self._inference.start()
        self.pipe: Any = vars(self._runner._model)["_pipe"]
        world = self.world
        self._executor = Executor(
            worker="worker-1",
            admission=Admission(TASK, world.subjects, ()),
            limits=Limits(ack_wait=LONG, max_attempts=3, stall_timeout=LONG, retry_delay=0.0),
            model=model,
            runner=self._runner,
            run_queue=self._run_queue,
            events=world.events,
            queue=world.queue,
            workers=world.workers,
            artifacts=world.artifacts,
            images=ImageCodec(),
            observer=world.observer,
        )

    async def close(self) -> None:
        await self._inference.stop()
        self.world.close()

    async def deliver(self, request_id: str) -> MemoryDelivery:
        """Deliver one request repeatedly until it has a terminal event."""
        size = {"width": SIDE, "height": SIDE, "num_inference_steps": 1, "seed": 7}
        body = {"request_id": request_id, "prompt": "a circle", **size}
        await self.world.send(json.dumps(body).encode())
        while len(self.world.queue):
            delivery = self.world.queue.take()
            assert await self._executor.handle(delivery) is None
        return delivery

    async def pixels(self, request_id: str) -> bytes:
        """Return the pixels of a request that succeeds in its first attempt."""
        assert (await self.deliver(request_id)).attempt == 1
        event = await self.world.result(request_id)
        assert isinstance(event, SucceededEvent)
        (output,) = event.outputs
        assert isinstance(output, ImageArtifact)
        file = await self.world.object(output.bucket, output.key)
        return Image.open(BytesIO(file)).tobytes()


@pytest.fixture
async def worker(model_folder: Folder) -> AsyncIterator[Worker]:
    config = ModelConfig(model_id=str(model_folder("stable_diffusion_3")))
    opened = Worker(create_runner(TASK, config))
    await opened.open()
    yield opened
    await opened.close()


@contextmanager
def not_numbers(pipe: Any) -> Iterator[None]:
    """A weight of the autoencoder is not a number."""
    bias = pipe.vae.decoder.conv_out.bias
    original = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
        yield
        bias.copy_(original)


@contextmanager
def too_small(pipe: Any) -> Iterator[None]:
    """Make the pipeline assume twice the real scale factor of its autoencoder."""
    factor = pipe.vae_scale_factor
    pipe.vae_scale_factor = 2 * factor
    yield
    pipe.vae_scale_factor = factor


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (not_numbers, "the model made pixels that are not numbers"),
        (too_small, "the model made images of another shape than requested"),
    ],
)
async def test_invalid_output_is_a_model_error_and_the_next_request_succeeds(
    worker: Worker, fault: Any, reason: str
) -> None:
    before = await worker.pixels("before")
    with fault(worker.pipe):
        last = await worker.deliver("bad")
    assert last.attempt == 3
    event = await worker.world.result("bad")
    assert isinstance(event, FailedEvent)
    assert event.failure.code is FailureCode.MODEL_ERROR
    assert event.failure.details == {"exception": reason}
    ((letter, _),) = await worker.world.dead_letters()
    assert letter.code is FailureCode.MODEL_ERROR
    assert await worker.pixels("after") == before
    assert {key.split("/")[-2] for key in await worker.world.objects()} == {"before", "after"}
