"""Options for memory and speed: their effects, as far as a CPU supports them."""

# mypy: allow-untyped-calls

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import diffusers.pipelines.pipeline_loading_utils as device_maps
import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from consumer.ports.model import Interrupted, ModelUnavailable
from consumer.runners import ModelConfig, ModelRunner, options
from consumer.runners.device import Placement
from consumer.runners.image_to_text import vision_loading
from consumer.runners.source import Source
from consumer.runners.text_to_image.pipeline_loading import load_pipeline
from generation_contracts import Task, TextToImageRequest
from tests.integration.small_runs import (
    SMALL,
    generate_image,
    generate_text,
    largest_difference,
    load_error,
    pipeline,
)
from tests.support.model_runs import run_model
from tests.support.tiny_models import Folder, Load

SD3, SDXL, FLUX, VISION = "stable_diffusion_3", "stable_diffusion_xl", "flux", "vision_language"
TEXTS = Task.IMAGE_TO_TEXT
CPU = Placement(torch.device("cpu"), torch.float32)

Shared = Callable[..., ModelRunner]


@pytest.fixture
def default_attention() -> Iterator[None]:
    """Reset the attention backend, which diffusers sets for the whole process."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_vae_tiling_and_slicing_are_separate_options(model_folder: Folder, load: Load) -> None:
    assert not pipeline(load(model_folder(SD3))).vae.use_tiling
    vae = pipeline(load(model_folder(SD3), vae_tiling=True, vae_slicing=True)).vae
    assert (vae.use_tiling, vae.use_slicing) == (True, True)
    vae = pipeline(load(model_folder(SD3), vae_slicing=True)).vae
    assert (vae.use_tiling, vae.use_slicing) == (False, True)


def test_a_run_that_saves_memory_keeps_the_configured_tiling(
    model_folder: Folder, load: Load
) -> None:
    runner = load(model_folder(SD3), vae_tiling=True)
    request = TextToImageRequest(prompt="a cat", num_inference_steps=1)
    run_model(runner, request, [], save_memory=True)
    assert pipeline(runner).vae.use_tiling


def test_channels_last_reorders_the_convolutions(
    model_folder: Folder, load: Load, shared_runner: Shared
) -> None:
    runner = load(model_folder(SDXL), channels_last=True)
    pipe = pipeline(runner)
    for convolution in (pipe.unet.conv_in, pipe.vae.decoder.conv_in):
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
        assert not convolution.weight.is_contiguous()
    assert largest_difference(generate_image(runner), generate_image(shared_runner(SDXL))) <= 1


def test_the_configured_attention_backend_is_used(
    model_folder: Folder, load: Load, shared_runner: Shared, default_attention: None
) -> None:
    runner = load(model_folder(FLUX), attention="_native_math", defaults=SMALL)
    processors = pipeline(runner).transformer.attn_processors.values()
    assert {p._attention_backend for p in processors} == {AttentionBackendName._NATIVE_MATH}
    assert largest_difference(generate_image(runner), generate_image(shared_runner(FLUX))) <= 1


def test_an_attention_backend_that_fails_on_this_device_stops_the_start(
    model_folder: Folder, default_attention: None
) -> None:
    line = load_error(model_folder(FLUX), attention="_native_cudnn", defaults=SMALL)
    assert line == "MODEL_ATTENTION: the first run failed: RuntimeError"


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_configured_attention_of_a_vision_language_model_is_used(
    name: str, model_folder: Folder, load: Load
) -> None:
    runner = load(model_folder(VISION), TEXTS, attention=name)
    model: Any = runner._model
    config = model._model.config
    assert {config.text_config._attn_implementation, config.vision_config._attn_implementation} == {
        name
    }
    assert generate_text(runner)


CACHE = {"step_cache": 0.9, "defaults": SMALL}  # so high that nearly every step is skipped


def test_a_job_with_the_step_cache_is_not_affected_by_other_jobs(
    model_folder: Folder, load: Load, shared_runner: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(options, "options_needing_probe", lambda _: ())
        alone = generate_image(load(model_folder(FLUX), **CACHE))
    assert (
        largest_difference(alone, generate_image(shared_runner(FLUX))) > 0
    )  # the cache skips steps

    runner = load(model_folder(FLUX), **CACHE)
    assert generate_image(runner).tobytes() == alone.tobytes()  # after the probe run
    steps: list[int] = []
    cancelled = TextToImageRequest(prompt="a dog", **SMALL, num_inference_steps=4, seed=8)
    with pytest.raises(Interrupted):
        run_model(
            runner,
            cancelled,
            [],
            on_step=lambda step, _: steps.append(step),
            cancelled=lambda: len(steps) == 2,
        )
    assert generate_image(runner).tobytes() == alone.tobytes()  # after a cancelled job


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Replace torch.compile's backend, which takes seconds; return the counters of graphs."""
    real = torch.nn.Module.compile

    def compile_eagerly(module: torch.nn.Module, **options: Any) -> None:
        real(module, **options, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    # pytest would store thousands of its log records.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    stats: dict[str, int] = torch._dynamo.utils.counters["stats"]
    return stats


def test_the_blocks_are_compiled_at_load(
    model_folder: Folder, load: Load, shared_runner: Shared, eager_compiler: dict[str, int]
) -> None:
    runner = load(model_folder(FLUX), compile=True, defaults=SMALL)
    graphs = eager_compiler["unique_graphs"]
    assert graphs > 0
    image = generate_image(runner)
    assert eager_compiler["unique_graphs"] == graphs
    assert largest_difference(image, generate_image(shared_runner(FLUX))) <= 1


def test_a_compiled_pipeline_accepts_requests_of_many_shapes(
    model_folder: Folder, load: Load, eager_compiler: dict[str, int]
) -> None:
    """The requests need more graphs than the default limit of torch, which is 8 for a function."""
    runner = load(model_folder("z_image"), compile=True, defaults={"width": 128, "height": 128})
    for guidance_scale, number in itertools.product((5.0, 0.0), (1, 2, 3)):
        generate_image(
            runner, guidance_scale=guidance_scale, num_images=number, num_inference_steps=2
        )
    assert eager_compiler["unique_graphs"] > 8


@pytest.mark.parametrize(
    ("option", "whole"), [({}, True), ({"step_cache": 0.9}, False)], ids=["plain", "step cache"]
)
def test_blocks_are_compiled_as_full_graphs_unless_a_step_cache_is_on(
    option: dict[str, Any],
    whole: bool,
    model_folder: Folder,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda _, **options: calls.append(options))
    load(model_folder(FLUX), compile=True, defaults=SMALL, **option)
    assert calls == [{"fullgraph": whole}] * 2


def test_compile_compiles_the_layers_of_a_vision_language_model(
    model_folder: Folder, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        "torch.nn.Module.compile",
        lambda self, **options: compiled.append((type(self).__name__, options)),
    )
    load(model_folder(VISION), TEXTS, compile=True)
    assert {name for name, _ in compiled} == {"Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"}
    assert all(options == {"dynamic": True} for _, options in compiled)


# -- several devices, simulated on a CPU ----------------------------------------------------------


def test_a_device_map_includes_parts_that_diffusers_does_not_load(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")  # not the string "cpu", which means that a part fits on no GPU
    monkeypatch.setattr(device_maps, "get_max_memory", lambda _: {device: 2**40})
    folder = model_folder(FLUX)
    pipe = load_pipeline(Source(folder, FLUX), CPU, ModelConfig(device_map="balanced"))
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    assert pipe.hf_device_map == dict.fromkeys(parts, device)
    for part in parts:
        assert isinstance(getattr(pipe, part)._hf_hook, AlignDevicesHook)


def test_a_part_that_fits_on_no_gpu_is_refused(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_maps, "get_max_memory", lambda _: {torch.device("cpu"): 2**40})
    monkeypatch.setattr(
        device_maps,
        "_assign_components_to_devices",
        lambda *_, **__: {torch.device("cpu"): ["transformer", "vae"], "cpu": ["text_encoder"]},
    )
    validate = "consumer.runners.text_to_image.diffusion.options.validate_options"
    monkeypatch.setattr(validate, lambda *_: None)
    line = load_error(model_folder(FLUX), device_map="balanced")
    assert line.startswith("MODEL_DEVICE_MAP: text_encoder")
    assert line.endswith(" does not fit on a GPU")


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_layers_that_fit_on_no_gpu_are_refused(device: str) -> None:
    model: Any = torch.nn.Module()
    model.hf_device_map = {"model.visual": 0, "model.language_model": device}
    with pytest.raises(ModelUnavailable, match="MODEL_DEVICE_MAP: the model does not fit"):
        vision_loading._require_all_on_gpus(model, ModelConfig(device_map="balanced"))
