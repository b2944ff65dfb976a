"""A model whose faults depend on the seed of the request, so that a soak is repeatable."""

import ctypes
import os
import secrets
import signal
import threading
import time
from collections.abc import Sequence

from PIL import Image

from consumer.ports.model import DeviceLost, ModelError, OutOfMemory, RunnerOutput
from consumer.settings import Settings
from generation_contracts import Request, TextToImageRequest
from tests.soak.fates import RUNS, SEEDS, UNFATED, Fate, fate
from tests.support.quick_runner import STEPS, QuickRunner, first_time, note

LONG = 3.0  # seconds; longer than the soak's ack_wait

# Calls through PyDLL keep the GIL; calls through ctypes.CDLL release it.
_HOLDING_THE_GIL = ctypes.PyDLL(None)


class SoakRunner(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        if not save_memory:
            note(RUNS, f"{_id(request)} {time.time()}")
        match _fate(request):
            case Fate.OUT_OF_MEMORY:
                raise OutOfMemory("injected")
            case Fate.OUT_OF_MEMORY_ONCE if not save_memory:
                raise OutOfMemory("injected")
            case _:
                pass

    def step(self, request: Request, number: int) -> None:
        super().step(request, number)
        match _fate(request):
            case Fate.SLOW if isinstance(request, TextToImageRequest):
                time.sleep(LONG / (request.num_inference_steps or STEPS))
            case Fate.HOLDS_THE_GIL if number == 1:
                _HOLDING_THE_GIL.usleep(round(LONG * 1_000_000))
            case Fate.RAISES:
                raise ModelError("injected")
            case Fate.RAISES_ONCE if _first_run(request):
                raise ModelError("injected")
            case Fate.DEVICE_LOST_ONCE if _first_run(request):
                raise DeviceLost
            case Fate.KILLED:
                _die()
            case Fate.KILLED_ONCE if _first_run(request):
                _die()
            case Fate.HANGS_ONCE if _first_run(request):
                threading.Event().wait()
            case _:
                pass

    def output(self, request: Request, images: Sequence[Image.Image]) -> RunnerOutput:
        if request.seed is None:  # like real models: another image in every run
            request = request.model_copy(update={"seed": secrets.randbelow(SEEDS)})
        return super().output(request, images)


def _fate(request: Request) -> Fate:
    return Fate.PLAIN if UNFATED in request.prompt else fate(request.seed or 0)


def _id(request: Request) -> str:
    # The id is not always in the body, so the sender also puts it into the prompt.
    return request.prompt.split()[0]


def _first_run(request: Request) -> bool:
    return first_time(f"once-{_id(request)}")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make_runner(_: Settings) -> SoakRunner:
    return SoakRunner()
