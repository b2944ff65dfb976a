"""`consumer check --model` loads the model, generates one output, and reports both times."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from consumer.app.check import Finding, check, check_model
from consumer.app.composition import make_runner
from consumer.devstack import free_ports
from consumer.ports.model import OutOfMemory, RunnerOutput, RunRequest
from consumer.runners.text_to_image.diffusion import DiffusionModel
from consumer.settings import Settings
from tests.support import tiny_classifier
from tests.support.tiny_models import Folder

SECONDS = r"\d+\.\d s"


def settings_of(folder: Path | str, task: str = "text_to_image", **options: Any) -> Settings:
    return Settings(model_type=task, model_id=str(folder), **options)


async def test_the_check_of_a_pipeline_describes_it_and_generates_an_image(
    model_folder: Folder,
) -> None:
    reported: list[Finding] = []
    settings = settings_of(
        model_folder("stable_diffusion_3"), model_defaults='{"num_inference_steps": 2}'
    )
    findings = await check_model(make_runner(settings), settings.task, reported.append)
    assert findings == reported
    assert [(finding.name, finding.exit_code) for finding in reported] == [
        ("model", 0),
        ("output", 0),
        ("memory", 0),
    ]
    model, output, memory = (finding.text for finding in reported)
    libraries = ", ".join(
        f"{library.__name__} {library.__version__}" for library in (diffusers, torch, transformers)
    )
    assert model.startswith(
        f"stable_diffusion_3: StableDiffusion3, float32 on cpu; {libraries}; parameters "
    )
    assert "defaults width 64, height 64, num_inference_steps 2, " in model
    assert re.search(
        r"; width and height are multiples of 16 pixels, at most \d+ pixels per image; "
        rf"loaded in {SECONDS}$",
        model,
    )
    assert re.fullmatch(rf"an image of 64x64 pixels in {SECONDS}", output)
    assert re.fullmatch(r"main memory at most \d+\.\d\d GiB", memory)


async def test_the_check_reports_how_the_run_saved_memory(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = DiffusionModel.run

    def short_of_memory(
        model: DiffusionModel, runs: Sequence[RunRequest], *, save_memory: bool
    ) -> Sequence[RunnerOutput | None]:
        if not save_memory:
            raise OutOfMemory("the device's memory did not suffice")
        return run(model, runs, save_memory=save_memory)

    monkeypatch.setattr(DiffusionModel, "run", short_of_memory)
    reported: list[Finding] = []
    settings = settings_of(
        model_folder("stable_diffusion_3"), model_defaults='{"num_inference_steps": 2}'
    )
    await check_model(make_runner(settings), settings.task, reported.append)
    assert re.fullmatch(
        rf"an image of 64x64 pixels in {SECONDS}; memory was short: .+", reported[1].text
    )


async def test_the_check_reports_an_output_that_the_safety_checker_refuses(
    model_folder: Folder, tmp_path: Path
) -> None:
    tiny_classifier.save(tmp_path)
    reported: list[Finding] = []
    settings = settings_of(
        model_folder("stable_diffusion_3"),
        model_defaults='{"num_inference_steps": 2}',
        model_safety_checker=str(tmp_path),
        model_safety_labels=("normal", "nsfw"),
        model_safety_policy="fail",
    )
    await check_model(make_runner(settings), settings.task, reported.append)
    assert reported[1].exit_code == 0
    refused = rf"an output that the safety checker refused in {SECONDS}"
    assert re.fullmatch(refused, reported[1].text)


async def test_the_check_of_a_vision_language_model_generates_a_text(model_folder: Folder) -> None:
    reported: list[Finding] = []
    settings = settings_of(
        model_folder("vision_language"), "image_to_text", model_defaults='{"max_new_tokens": 3}'
    )
    await check_model(make_runner(settings), settings.task, reported.append)
    model, output, _ = reported
    assert "parameters" in model.text
    assert "pixels" not in model.text
    assert re.fullmatch(rf'"[^\n]*", 3 tokens in {SECONDS}', output.text)


async def test_a_model_that_cannot_be_loaded_is_reported_with_exit_code_70(tmp_path: Path) -> None:
    reported: list[Finding] = []
    settings = settings_of(tmp_path)
    await check_model(make_runner(settings), settings.task, reported.append)
    assert reported == [
        Finding("model", f"{tmp_path.name}: there is no model_index.json in it", 70)
    ]


async def test_unusable_output_is_reported_with_exit_code_70(own_folder: Folder) -> None:
    folder = own_folder("stable_diffusion_3")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"][:] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    reported: list[Finding] = []
    settings = settings_of(folder, model_defaults='{"num_inference_steps": 1}')
    await check_model(make_runner(settings), settings.task, reported.append)
    assert [(finding.name, finding.exit_code) for finding in reported] == [
        ("model", 0),
        ("output", 70),
        ("memory", 0),
    ]
    assert reported[1].text == "the model made pixels that are not numbers"


@pytest.mark.parametrize("model", [True, False], ids=["model", "no model"])
async def test_the_model_is_checked_only_on_request_although_no_service_is_up(
    model: bool, tmp_path: Path
) -> None:
    bus, store = free_ports(2)
    reported: list[Finding] = []
    settings = settings_of(
        tmp_path,
        nats_url=f"nats://127.0.0.1:{bus}",
        s3_endpoint=f"http://127.0.0.1:{store}",
        s3_access_key="someone",
        s3_secret_key="something",
    )
    assert await check(settings, reported.append, model=model) == 69
    assert [finding.name for finding in reported] == ["nats", "s3", *(["model"] if model else [])]
    assert reported[0].text == (f"cannot connect to nats://127.0.0.1:{bus}: Connection refused")
    assert reported[1].text == f"http://127.0.0.1:{store}: no connection"
