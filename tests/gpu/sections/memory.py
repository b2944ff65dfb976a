"""Memory that is short for real: the guard, the repetition, the baseline; and a lost device.

On a GPU a tensor occupies all memory but a few gigabytes. On a CPU the address space of the process
is limited, and the section gives the guard the amount of free memory.
"""

# mypy: allow-untyped-calls

import asyncio
import gc
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from consumer.app.apply import apply
from consumer.devstack import Daemon, DevStack
from consumer.ports.model import OutOfMemory, RunnerOutput
from consumer.settings import Settings
from generation_client import GenerationClient
from generation_contracts import Task, TextToImageRequest
from tests.gpu import models
from tests.gpu.check import Check
from tests.support.model_runs import run_model
from tests.support.quick_runner import FOLDER

MODEL_LOST = 70  # exit code
WITHIN = 60.0  # seconds; only bounds a wait for something that must happen
_POLL = 0.05  # seconds
_ROOT = Path(__file__).parents[3]
_MIB = 2**20
_SLACK = 16 * _MIB  # that libraries keep for themselves after a run, for example cuBLAS


def run(check: Check) -> None:
    """Let memory be short for the guard, then for the run, and lose a device."""
    with check.part("memory"):
        _Memory(check).run()
    with check.part("lost device"):
        _lose_device(check)


class _Memory:
    """One model and the memory that it may use."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._left: int | None = None  # free bytes for the guard on a CPU
        self._placement = models.placement_of(check.device)
        pipe = models.flux(models.FLUX_SHORT if check.full else None, self._placement)
        if check.device == "cuda":
            self._model = models.diffusion_model(pipe, self._placement)
        else:
            free = self._free_bytes
            self._model = models.diffusion_model(pipe, self._placement, free=free)

    def run(self) -> None:
        """Run with enough memory, with too little for decoding, and with too little for a step."""
        check = self._check
        small, large = (1024, 2048) if check.full else (64, 512)
        first = self._image(small)
        baseline = self._allocated()
        check.row("memory of the weights", baseline / _MIB, "MiB")
        # One image of 2048x2048 needs 6 GiB to be decoded, and its steps need less than 4.
        with self._leaving(int(4 * 1024 * _MIB) if check.full else 60 * _MIB, told=_MIB):
            output = self._image(large)
            warned = any("memory was short" in line for line in output.warnings)
            note = "; ".join(output.warnings)
            check.row(f"guard before {large}x{large}", "decoded in tiles", ok=warned, note=note)
        with self._leaving(200 * _MIB if check.full else 2 * _MIB, told=None):
            self._run_out(large)
        gc.collect()
        left_over = self._allocated() - baseline
        check.row(
            "memory over the baseline afterwards",
            max(0, left_over) / _MIB,
            "MiB",
            ok=left_over <= _SLACK if check.device == "cuda" else None,
        )
        same = self._image(small).images[0].image.tobytes() == first.images[0].image.tobytes()
        check.row("the next run draws as before", "yes" if same else "no", ok=same)
        self._model.close()

    def _run_out(self, side: int) -> None:
        """Run as the inference thread does: again with less memory after `OutOfMemory`."""
        for save_memory, what in ((False, "too little memory"), (True, "again, saving memory")):
            try:
                output = self._image(side, save_memory=save_memory)
            except OutOfMemory as error:
                tried = ", ".join(error.tried) or "nothing"
                self._check.row(what, "OutOfMemory", ok=True, note=f"tried: {tried}")
            else:
                note = "; ".join(output.warnings)
                # The first run must not fit: else this has shown nothing.
                self._check.row(what, "an image", ok=save_memory, note=note)
                return

    def _image(self, side: int, *, save_memory: bool = False) -> RunnerOutput:
        request = TextToImageRequest(
            prompt="a red circle", width=side, height=side, num_inference_steps=2, seed=1
        )
        return run_model(self._model, request, save_memory=save_memory)

    def _allocated(self) -> int:
        gc.collect()
        if self._check.device == "cuda":
            torch.cuda.empty_cache()
            return int(torch.cuda.memory_allocated())
        return _resident()

    @contextmanager
    def _leaving(self, left: int, *, told: int | None) -> Iterator[None]:
        """Leave so many bytes free in the block."""
        if self._check.device == "cuda":
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            ballast = torch.empty(max(0, free - left), dtype=torch.uint8, device="cuda")
            try:
                yield
            finally:
                del ballast
                torch.cuda.empty_cache()
            return
        before = resource.getrlimit(resource.RLIMIT_AS)
        self._left = told
        resource.setrlimit(resource.RLIMIT_AS, (_virtual() + left, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            self._left = None

    def _free_bytes(self, _: torch.device) -> int | None:
        return self._left


def _virtual() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# -- a lost device --------------------------------------------------------------------------------


def _lose_device(check: Check) -> None:
    with tempfile.TemporaryDirectory() as folder, DevStack(Path(folder), persist=False) as stack:
        asyncio.run(_lose(check, stack))


async def _lose(check: Check, stack: DevStack) -> None:
    # A lease that is longer than the test: only a returned request can be delivered again.
    settings = {
        **stack.environment(),
        "MODEL_TYPE": str(Task.TEXT_TO_IMAGE),
        "CONSUMER_ACK_WAIT": str(4 * WITHIN),
    }
    values: dict[str, Any] = {name.lower(): value for name, value in settings.items()}
    await apply(Settings(**values))
    losing = _Worker("losing", settings, stack, device=check.device)
    try:
        losing.start()
        await asyncio.to_thread(losing.wait_ready)
        async with GenerationClient(stack.nats.url) as client:
            running = asyncio.create_task(client.run(TextToImageRequest(prompt="a red circle")))
            code = await _exit_code(losing)
            check.row("exit code of the worker", str(code), ok=code == MODEL_LOST)
            with _Worker("next", settings, stack, device="none"):
                event = await asyncio.wait_for(running, WITHIN)
            check.row("its request, by the next worker", event.type, ok=event.attempt == 2)
    finally:
        losing.kill()
    logged = '"event": "device_lost"' in losing.log.read_text()
    check.row("its log says device_lost", "yes" if logged else "no", ok=logged)


class _Worker(Daemon):
    """`tests.gpu.lost_device_worker` as a child process."""

    def __init__(
        self, name: str, settings: Mapping[str, str], stack: DevStack, *, device: str
    ) -> None:
        path = os.pathsep.join([str(_ROOT), str(_ROOT / "contracts"), *sys.path])
        environment = {**settings, "PYTHONPATH": path, FOLDER: str(stack.directory)}
        super().__init__(name, environment, log=stack.logs / f"{name}.log")
        self.argv = (sys.executable, "-P", "-m", "tests.gpu.lost_device_worker", device)


async def _exit_code(worker: Daemon) -> int | None:
    async with asyncio.timeout(WITHIN):
        while worker.alive:  # noqa: ASYNC110 - another process sends no notification
            await asyncio.sleep(_POLL)
    return worker.returncode
