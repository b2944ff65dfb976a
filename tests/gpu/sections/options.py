"""Each MODEL_* option of a runner: it works, or it is refused with one line.

The models are short ones of full width, saved and loaded as MODEL_ID. Time and memory are compared
with a run without options, of the same model in the same process.
"""

# mypy: allow-untyped-calls

import gc
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from consumer.ports.model import ModelUnavailable
from consumer.runners import ModelConfig, create_runner
from generation_contracts import ImageToTextRequest, Request, Task, TextToImageRequest
from tests.gpu import models
from tests.gpu.check import Check, one_line
from tests.support.model_runs import run_model

Option = Mapping[str, Any]

# The ones that can break the process, or take long, come last.
TEXT_TO_IMAGE: tuple[Option, ...] = (
    {"offload": "model"},
    {"offload": "group"},
    {"offload": "sequential"},
    {"quantization": "bitsandbytes-4bit"},
    {"quantization": "bitsandbytes-8bit"},
    {"quantization": "torchao-int8"},
    {"quantization": "torchao-int4"},
    {"quantization": "bitsandbytes-4bit", "offload": "model"},
    {"vae_tiling": True},
    {"vae_slicing": True},
    {"channels_last": True},
    {"step_cache": 0.1},
    {"dtype": "float16"},
    {"dtype": "float32"},
    {"device_map": "balanced"},
    {"attention": "native"},
    {"attention": "_native_cudnn"},
    {"attention": "_native_flash"},
    {"attention": "_native_efficient"},
    {"attention": "flash"},
    {"attention": "sage"},
    {"attention": "xformers"},
    {"attention": "flex"},
    {"compile": True},
)
IMAGE_TO_TEXT: tuple[Option, ...] = (
    {"offload": "model"},
    {"offload": "sequential"},
    {"quantization": "bitsandbytes-4bit"},
    {"quantization": "bitsandbytes-8bit"},
    {"quantization": "torchao-int8"},
    {"quantization": "torchao-int4"},
    {"attention": "eager"},
    {"attention": "sdpa"},
    {"attention": "flash_attention_2"},
    {"attention": "flex_attention"},
    {"dtype": "float16"},
    {"compile": True},
)
_ON_CPU = ("attention", "channels_last", "offload", "quantization", "step_cache", "vae_tiling")
_GIB = 2**30


@dataclass(frozen=True)
class _Measured:
    """One model with one option.

    Attributes:
        seconds: Of the second run.
        peak: Bytes of device memory at most, while it was loaded and run; 0 on a CPU.
    """

    seconds: float
    peak: int


def run(check: Check) -> None:
    """Save a model of each task, and try its options."""
    with tempfile.TemporaryDirectory() as name:
        with check.part("text_to_image"):
            _text_to_image(check, Path(name) / "flux").try_all(TEXT_TO_IMAGE)
        with check.part("image_to_text"):
            _image_to_text(check, Path(name) / "qwen").try_all(IMAGE_TO_TEXT)


def _text_to_image(check: Check, folder: Path) -> "_Model":
    placement = models.placement_of(check.device)
    models.flux(models.FLUX_SHORT if check.full else None, placement).save_pretrained(folder)
    side, steps = (1024, 8) if check.full else (64, 2)
    request = TextToImageRequest(
        prompt="a red circle", width=side, height=side, num_inference_steps=steps, seed=1
    )
    return _Model(check, Task.TEXT_TO_IMAGE, folder, request)


def _image_to_text(check: Check, folder: Path) -> "_Model":
    placement = models.placement_of(check.device)
    for part in models.qwen(models.QWEN_SHORT if check.full else None, placement):
        part.save_pretrained(folder)
    request = ImageToTextRequest(
        prompt="What is it?",
        images=("s3://bucket/key",),
        max_new_tokens=32 if check.full else 4,
        temperature=0,
    )
    side = 448 if check.full else 56
    values = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return _Model(check, Task.IMAGE_TO_TEXT, folder, request, (Image.fromarray(values),))


@dataclass(frozen=True)
class _Model:
    """A saved model, and the request that measures an option."""

    check: Check
    task: Task
    folder: Path
    request: Request
    images: tuple[Image.Image, ...] = ()

    def try_all(self, options: tuple[Option, ...]) -> None:
        """Measure the model without options, then with each one that is quick enough here."""
        plain = self._measure({})
        name = f"{self.task}: without options"
        self.check.row(name, plain.seconds * 1000, "ms", note=_memory(plain))
        for option in options:
            if self.check.full or _is_quick(option):
                self._try(option, plain)

    def _try(self, option: Option, plain: _Measured) -> None:
        name = f"{self.task}: " + ", ".join(f"{key}={value}" for key, value in option.items())
        row = partial(self.check.row, name)
        try:
            found = self._measure(option)
        except ModelUnavailable as error:
            row("refused", ok="\n" not in str(error), note=str(error))
        except Exception as error:  # noqa: BLE001 - what the option raises is the finding
            row("failed", ok=False, note=one_line(error))
        else:
            times = f"{found.seconds / plain.seconds:.2f} times the time"
            row(found.seconds * 1000, "ms", ok=True, note=f"{times}; {_memory(found)}")

    def _measure(self, option: Option) -> _Measured:
        device = self.check.device
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        config = ModelConfig(model_id=str(self.folder), **{"device": device, **option})
        runner = create_runner(self.task, config)
        try:
            runner.load()
            run_model(runner, self.request, self.images)
            began = time.perf_counter()
            run_model(runner, self.request, self.images)
            seconds = time.perf_counter() - began
        finally:
            runner.close()
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        return _Measured(seconds, peak)


def _memory(found: _Measured) -> str:
    return f"{found.peak / _GIB:.2f} GiB at most" if found.peak else "memory not measured"


def _is_quick(option: Option) -> bool:
    """Return whether to try an option on a CPU: without compilation and without half precision."""
    return all(key in _ON_CPU for key in option) and "flex" not in str(option.get("attention", ""))
