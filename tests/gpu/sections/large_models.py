"""FLUX.1-dev and Qwen2.5-VL-7B with random weights, against the bare libraries in one process.

The ratio is the time of the bare call over the time of the daemon's runner, the median of rounds in
which both take turns. Below 1 the runner is slower.
"""

# mypy: allow-untyped-calls

import gc
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from generation_contracts import ImageToTextRequest, TextToImageRequest
from tests.gpu import models
from tests.gpu.check import Check
from tests.support.model_runs import run_model

LEAST_RATIO = 0.99  # of the goal
_GIB = 2**30


def run(check: Check) -> None:
    """Build each model, and compare."""
    with check.part("text_to_image"):
        _text_to_image(check)
    gc.collect()
    if check.device == "cuda":
        torch.cuda.empty_cache()
    with check.part("image_to_text"):
        _image_to_text(check)


def _text_to_image(check: Check) -> None:
    placement = models.placement_of(check.device)
    side, steps = (1024, 20) if check.full else (64, 4)
    began = time.monotonic()
    pipe = models.flux(models.FLUX_DEV if check.full else None, placement)
    _report_built(check, "FLUX.1-dev", pipe.transformer, began)
    model = models.diffusion_model(pipe, placement)
    request = TextToImageRequest(
        prompt="a red circle", width=side, height=side, num_inference_steps=steps, seed=1
    )

    def bare() -> None:
        generator = torch.Generator("cpu").manual_seed(1)
        with torch.inference_mode():
            pipe(
                prompt="a red circle",
                width=side,
                height=side,
                num_inference_steps=steps,
                generator=generator,
                output_type="np",
            )

    _compare(
        check,
        f"one image of {side}x{side} in {steps} steps",
        bare,
        lambda: run_model(model, request),
        of=steps,
        unit="step",
    )
    model.close()


def _image_to_text(check: Check) -> None:
    placement = models.placement_of(check.device)
    side, tokens = (1008, 128) if check.full else (56, 16)
    began = time.monotonic()
    model, processor = models.qwen(models.QWEN_7B if check.full else None, placement)
    _report_built(check, "Qwen2.5-VL-7B", model, began)
    runner = models.vision_model(model, processor, placement)
    image = _noise(side)
    question = "What is it?"
    request = ImageToTextRequest(
        prompt=question, images=("s3://bucket/key",), max_new_tokens=tokens, temperature=0
    )
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    ]

    def bare() -> str:
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=[text], images=[image], return_tensors="pt").to(placement.device)
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return str(processor.batch_decode(made[:, inputs["input_ids"].shape[1] :])[0])

    def ours() -> int:
        output = run_model(runner, request, [image])
        assert output.text is not None
        return output.text.completion_tokens

    made = ours()
    check.row("tokens of a text", made, ok=made == tokens)
    name = f"{tokens} tokens about one image of {side}x{side}"
    _compare(check, name, bare, ours, of=tokens, unit="token")
    runner.close()


def _noise(side: int) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _compare(
    check: Check,
    name: str,
    bare: Callable[[], Any],
    ours: Callable[[], Any],
    *,
    of: int,
    unit: str,
) -> None:
    """Time both in turn, after one run of each, and report the medians and the peak of memory."""
    for warm_up in (bare, ours):
        warm_up()
    if check.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rounds = range(5 if check.full else 2)
    seconds = [(_timed(check, bare), _timed(check, ours)) for _ in rounds]
    ratio = statistics.median(one / other for one, other in seconds)
    milliseconds = [statistics.median(column) / of * 1000 for column in zip(*seconds, strict=True)]
    check.row(f"{name}: bare library", milliseconds[0], f"ms a {unit}")
    check.row(f"{name}: this daemon", milliseconds[1], f"ms a {unit}")
    ok = ratio >= LEAST_RATIO if check.full else None
    check.row(f"{name}: ratio", round(ratio, 3), ok=ok, note=f"goal: at least {LEAST_RATIO}")
    check.row(f"{name}: peak of memory", _peak(check), "GiB")


def _timed(check: Check, call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    if check.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _peak(check: Check) -> float:
    if check.device == "cuda":
        return torch.cuda.max_memory_allocated() / _GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB


def _report_built(check: Check, name: str, module: Any, began: float) -> None:
    weights = sum(one.numel() for one in module.parameters())
    what = name if check.full else f"tiny model like {name}"
    check.row(
        f"{what}: built", time.monotonic() - began, "s", note=f"{weights / 1e9:.3g} billion weights"
    )
