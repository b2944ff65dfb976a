"""The versions, and the demonstration models on the device: right, and the same for a seed."""

# mypy: allow-untyped-calls

import hashlib
import importlib.metadata
import platform
import random
import shutil
import subprocess
import time

import torch

from consumer.runners import ModelConfig, ModelRunner, create_runner
from consumer.runners.demonstration.training.prompts import prompt
from consumer.runners.demonstration.training.scenes import draw, some_held_out_scene
from consumer.runners.demonstration.training.sentences import description
from generation_contracts import ImageToTextRequest, Task, TextToImageRequest
from tests.gpu.check import Check
from tests.support.model_runs import run_model
from tests.support.pixel_checker import read_scene, same_scene

SEED = 2_026  # of the scenes
LEAST_RIGHT = 0.85  # share of right images; tests/bench/models.py measures 95 % of hundreds
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "torchao")


def run(check: Check) -> None:
    """Report the versions; draw scenes and describe drawn ones."""
    _report_versions(check)
    number = 40 if check.full else 3
    with check.part("images"):
        _draw(check, number)
    with check.part("texts"):
        _describe(check, number)


def _report_versions(check: Check) -> None:
    check.row("python", platform.python_version())
    for package in _PACKAGES:
        try:
            check.row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            check.row(package, "not installed")
    if check.device != "cuda":
        check.row("device", f"cpu, {torch.get_num_threads()} threads")
        return
    properties = torch.cuda.get_device_properties(0)
    check.row("device", properties.name, note=f"capability {properties.major}.{properties.minor}")
    free, total = torch.cuda.mem_get_info()
    check.row("memory", total / 2**30, "GiB", note=f"{free / 2**30:.1f} GiB free")
    check.row(
        "cuda of torch", str(torch.version.cuda), note=f"cudnn {torch.backends.cudnn.version()}"
    )
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        check.row("driver", answer.stdout.strip() or "unknown")


def _loaded(check: Check, task: Task) -> ModelRunner:
    runner = create_runner(task, ModelConfig(device=check.device))
    began = time.monotonic()
    info = runner.load().info
    check.row(f"loading {task}", time.monotonic() - began, "s", note=f"{info.family}, {info.dtype}")
    check.row(f"device of {task}", info.device, ok=info.device == check.device)
    return runner


def _draw(check: Check, number: int) -> None:
    runner = _loaded(check, Task.TEXT_TO_IMAGE)
    choice = random.Random(SEED)
    scenes = [some_held_out_scene(choice, two=False) for _ in range(number)]
    requests = [
        TextToImageRequest(prompt=prompt(scene, choice), seed=seed)
        for seed, scene in enumerate(scenes)
    ]
    run_model(runner, requests[0])  # the first run of a device is slow
    began = time.monotonic()
    images = [run_model(runner, request).images[0].image for request in requests]
    check.row("one image of 64x64", (time.monotonic() - began) / number * 1000, "ms")
    found = [read_scene(image) for image in images]
    right = sum(s is not None and same_scene(s, w) for s, w in zip(found, scenes, strict=True))
    check.row("right images", f"{right} of {number}", ok=right >= LEAST_RIGHT * number - 1)
    again = run_model(runner, requests[0]).images[0].image
    same = _digest(again.tobytes()) == _digest(images[0].tobytes())
    check.row("the same seed gives the same pixels", "yes" if same else "no", ok=same)
    runner.close()


def _describe(check: Check, number: int) -> None:
    runner = _loaded(check, Task.IMAGE_TO_TEXT)
    choice = random.Random(SEED)
    scenes = [some_held_out_scene(choice, two=False) for _ in range(number)]
    drawn = [draw(scene, choice) for scene in scenes]
    request = ImageToTextRequest(prompt="Describe this picture.", images=("s3://bucket/key",))
    texts = []
    began = time.monotonic()
    for image in drawn:
        output = run_model(runner, request, [image])
        texts.append("" if output.text is None else output.text.text)
    check.row("one text", (time.monotonic() - began) / number * 1000, "ms")
    right = sum(text == description(scene) for text, scene in zip(texts, scenes, strict=True))
    check.row("right texts", f"{right} of {number}", ok=right >= LEAST_RIGHT * number - 1)
    again = run_model(runner, request, [drawn[0]])
    same = again.text is not None and again.text.text == texts[0]
    check.row("the same input gives the same text", "yes" if same else "no", ok=same)
    runner.close()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
