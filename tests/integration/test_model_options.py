"""Options for memory and speed: what each does, where a CPU can show it."""

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
from tests.integration.small_runs import SMALL, largest_difference, made, pipeline, refusal, written
from tests.support.model_runs import run_model
from tests.support.tiny_models import Folder, Load

SD3, SDXL, FLUX, VISION = "stable_diffusion_3", "stable_diffusion_xl", "flux", "vision_language"
TEXTS = Task.IMAGE_TO_TEXT
CPU = Placement(torch.device("cpu"), torch.float32)

Shared = Callable[..., ModelRunner]


@pytest.fixture
def default_attention() -> Iterator[None]:
    """Takes back what diffusers sets for the whole process."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_the_vae_decodes_in_parts(model_folder: Folder, load: Load) -> None:
    assert not pipeline(load(model_folder(SD3))).vae.use_tiling
    vae = pipeline(load(model_folder(SD3), vae_tiling=True, vae_slicing=True)).vae
    assert (vae.use_tiling, vae.use_slicing) == (True, True)
    vae = pipeline(load(model_folder(SD3), vae_slicing=True)).vae
    assert (vae.use_tiling, vae.use_slicing) == (False, True)


def test_a_run_that_saves_memory_leaves_the_tiling_of_the_settings_on(
    model_folder: Folder, load: Load
) -> None:
    runner = load(model_folder(SD3), vae_tiling=True)
    request = TextToImageRequest(prompt="a cat", num_inference_steps=1)
    run_model(runner, request, [], save_memory=True)
    assert pipeline(runner).vae.use_tiling


def test_convolutions_are_ordered_channels_last(
    model_folder: Folder, load: Load, shared_runner: Shared
) -> None:
    runner = load(model_folder(SDXL), channels_last=True)
    pipe = pipeline(runner)
    for convolution in (pipe.unet.conv_in, pipe.vae.decoder.conv_in):
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
        assert not convolution.weight.is_contiguous()
    assert largest_difference(made(runner), made(shared_runner(SDXL))) <= 1


def test_the_attention_backend_is_the_one_asked_for(
    model_folder: Folder, load: Load, shared_runner: Shared, default_attention: None
) -> None:
    runner = load(model_folder(FLUX), attention="_native_math", defaults=SMALL)
    processors = pipeline(runner).transformer.attn_processors.values()
    assert {p._attention_backend for p in processors} == {AttentionBackendName._NATIVE_MATH}
    assert largest_difference(made(runner), made(shared_runner(FLUX))) <= 1


def test_an_attention_backend_that_does_not_run_here_stops_the_start(
    model_folder: Folder, default_attention: None
) -> None:
    line = refusal(model_folder(FLUX), attention="_native_cudnn", defaults=SMALL)
    assert line == "MODEL_ATTENTION: the first run failed: RuntimeError"


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_vision_language_model_has_the_attention_asked_for(
    name: str, model_folder: Folder, load: Load
) -> None:
    runner = load(model_folder(VISION), TEXTS, attention=name)
    model: Any = runner._model
    config = model._model.config
    assert {config.text_config._attn_implementation, config.vision_config._attn_implementation} == {
        name
    }
    assert written(runner)


CACHE = {"step_cache": 0.9, "defaults": SMALL}  # so high that nearly every step is skipped


def test_a_job_with_the_step_cache_is_as_it_is_alone(
    model_folder: Folder, load: Load, shared_runner: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(options, "options_needing_probe", lambda _: ())
        alone = made(load(model_folder(FLUX), **CACHE))
    assert largest_difference(alone, made(shared_runner(FLUX))) > 0  # the cache does skip something

    runner = load(model_folder(FLUX), **CACHE)
    assert made(runner).tobytes() == alone.tobytes()  # after the first run
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
    assert made(runner).tobytes() == alone.tobytes()  # after one that was stopped in the middle


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """torch.compile without the compiler of kernels, which takes seconds; its counters."""
    real = torch.nn.Module.compile

    def compile_eagerly(module: torch.nn.Module, **how: Any) -> None:
        real(module, **how, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    # pytest would keep thousands of its records.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    stats: dict[str, int] = torch._dynamo.utils.counters["stats"]
    return stats


def test_the_blocks_are_compiled_before_the_first_job(
    model_folder: Folder, load: Load, shared_runner: Shared, eager_compiler: dict[str, int]
) -> None:
    runner = load(model_folder(FLUX), compile=True, defaults=SMALL)
    graphs = eager_compiler["unique_graphs"]
    assert graphs > 0
    image = made(runner)
    assert eager_compiler["unique_graphs"] == graphs
    assert largest_difference(image, made(shared_runner(FLUX))) <= 1


def test_a_compiled_pipeline_takes_requests_of_all_kinds(
    model_folder: Folder, load: Load, eager_compiler: dict[str, int]
) -> None:
    """More kinds than the 8 graphs that torch has for one function, unless it is told otherwise."""
    runner = load(model_folder("z_image"), compile=True, defaults={"width": 128, "height": 128})
    for guidance_scale, number in itertools.product((5.0, 0.0), (1, 2, 3)):
        made(runner, guidance_scale=guidance_scale, num_images=number, num_inference_steps=2)
    assert eager_compiler["unique_graphs"] > 8


@pytest.mark.parametrize(("given", "whole"), [({}, True), ({"step_cache": 0.9}, False)])
def test_blocks_are_compiled_whole_but_for_the_step_cache_which_decides_within_one(
    given: dict[str, Any],
    whole: bool,
    model_folder: Folder,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how: list[dict[str, Any]] = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda _, **options: how.append(options))
    load(model_folder(FLUX), compile=True, defaults=SMALL, **given)
    assert how == [{"fullgraph": whole}] * 2


def test_compile_compiles_the_layers_of_a_vision_language_model(
    model_folder: Folder, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        "torch.nn.Module.compile", lambda self, **how: compiled.append((type(self).__name__, how))
    )
    load(model_folder(VISION), TEXTS, compile=True)
    assert {name for name, _ in compiled} == {"Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"}
    assert all(how == {"dynamic": True} for _, how in compiled)


# -- several devices, as far as one machine without any can show ----------------------------------


def test_a_device_map_reaches_the_parts_that_diffusers_does_not_load(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = torch.device("cpu")  # not the word "cpu", which would mean that it fits nowhere
    monkeypatch.setattr(device_maps, "get_max_memory", lambda _: {there: 2**40})
    folder = model_folder(FLUX)
    pipe = load_pipeline(Source(folder, FLUX), CPU, ModelConfig(device_map="balanced"))
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    assert pipe.hf_device_map == dict.fromkeys(parts, there)
    for part in parts:
        assert isinstance(getattr(pipe, part)._hf_hook, AlignDevicesHook)


def test_a_part_that_fits_on_no_gpu_is_told(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_maps, "get_max_memory", lambda _: {torch.device("cpu"): 2**40})
    monkeypatch.setattr(
        device_maps,
        "_assign_components_to_devices",
        lambda *_, **__: {torch.device("cpu"): ["transformer", "vae"], "cpu": ["text_encoder"]},
    )
    fitting = "consumer.runners.text_to_image.diffusion.options.validate_options"
    monkeypatch.setattr(fitting, lambda *_: None)
    line = refusal(model_folder(FLUX), device_map="balanced")
    assert line.startswith("MODEL_DEVICE_MAP: text_encoder")
    assert line.endswith(" does not fit on a GPU")


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_layers_that_fit_on_no_gpu_are_told(place: str) -> None:
    model: Any = torch.nn.Module()
    model.hf_device_map = {"model.visual": 0, "model.language_model": place}
    with pytest.raises(ModelUnavailable, match="MODEL_DEVICE_MAP: the model does not fit"):
        vision_loading._require_all_on_gpus(model, ModelConfig(device_map="balanced"))
