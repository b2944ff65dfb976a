"""Options for memory and speed that are refused, each with the line that stops the start.

A combination of options, the machine, or the model can be the reason.
"""

# mypy: allow-untyped-calls

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from consumer.runners import ModelConfig, options
from consumer.runners.device import Placement
from consumer.runners.image_to_text import vision_loading
from consumer.runners.task_settings import runner_spec
from generation_contracts import Task
from generation_contracts.base import DEFAULT_QUEUES
from tests.integration.small_runs import load_error
from tests.support.tiny_models import Folder

SD3, SDXL, FLUX, VISION = "stable_diffusion_3", "stable_diffusion_xl", "flux", "vision_language"
IMAGES, TEXTS = Task.TEXT_TO_IMAGE, Task.IMAGE_TO_TEXT

Machine = Callable[[int], None]


@pytest.fixture(autouse=True, scope="module")
def _libraries() -> None:
    """Import the libraries before the tests simulate GPUs."""
    for library in (
        "torch._inductor.config",
        "consumer.runners.text_to_image.diffusion",
        "consumer.runners.image_to_text.vision_language",
        "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.auto.processing_auto",
    ):
        importlib.import_module(library)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a function that simulates a number of GPUs, which the test must not use."""

    def with_gpus(count: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)

    return with_gpus


def without(folder: Path, part: str) -> Path:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), part: [None, None]}))
    return folder


# -- combinations that are refused before anything is loaded --------------------------------------

BY_PARTS = (
    "MODEL_QUANTIZATION, MODEL_OFFLOAD: quantized weights are moved as whole parts only; "
    "take none or model"
)
COMPILED = (
    "MODEL_COMPILE, MODEL_OFFLOAD: the weights of compiled blocks stay in them; take none or model"
)
SEVERAL_GPUS = "MODEL_DEVICE_MAP, MODEL_OFFLOAD: parts on several GPUs stay there; set one of them"
GGUF_FOLDER = "MODEL_QUANTIZATION, MODEL_ID: gguf needs a folder with the model"
ONLY_IMAGES = "only for MODEL_TYPE=text_to_image"


@pytest.mark.parametrize(
    ("task", "gpus", "values", "line"),
    [
        (
            IMAGES,
            0,
            {"offload": "model"},
            "MODEL_OFFLOAD: the device is cpu, there is nothing to offload from",
        ),
        (
            IMAGES,
            0,
            {"device_map": "balanced"},
            "MODEL_DEVICE_MAP: needs the device cuda, this one is cpu",
        ),
        (TEXTS, 1, {"device_map": "balanced"}, "MODEL_DEVICE_MAP: needs 2 GPUs, there is 1"),
        (IMAGES, 2, {"device_map": "balanced", "offload": "model"}, SEVERAL_GPUS),
        (TEXTS, 2, {"device_map": "balanced", "offload": "sequential"}, SEVERAL_GPUS),
        (
            IMAGES,
            2,
            {"device_map": "balanced", "quantization": "bitsandbytes-4bit"},
            "MODEL_DEVICE_MAP, MODEL_QUANTIZATION: not compatible for a pipeline; set one of them",
        ),
        *(
            (task, 0, {"quantization": kind}, f"MODEL_QUANTIZATION: {kind} needs the device cuda")
            for kind in ("bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int4")
            for task in DEFAULT_QUEUES
        ),
        (
            IMAGES,
            1,
            {"quantization": "torchao-int4", "dtype": "float16"},
            "MODEL_QUANTIZATION, MODEL_DTYPE: torchao-int4 needs bfloat16",
        ),
        (
            TEXTS,
            1,
            {"quantization": "torchao-int4", "offload": "model"},
            "MODEL_QUANTIZATION, MODEL_OFFLOAD: torchao-int4 stays on its device; take none",
        ),
        (IMAGES, 1, {"quantization": "torchao-int8", "offload": "sequential"}, BY_PARTS),
        (IMAGES, 1, {"quantization": "gguf", "offload": "group"}, BY_PARTS),
        (TEXTS, 1, {"quantization": "bitsandbytes-4bit", "offload": "sequential"}, BY_PARTS),
        (IMAGES, 0, {"quantization": "gguf"}, GGUF_FOLDER),
        (IMAGES, 0, {"quantization": "gguf", "model_id": ""}, GGUF_FOLDER),
        (
            TEXTS,
            0,
            {"quantization": "gguf"},
            f"MODEL_QUANTIZATION: gguf is {ONLY_IMAGES}",
        ),
        (IMAGES, 1, {"compile": True, "offload": "sequential"}, COMPILED),
        (IMAGES, 1, {"compile": True, "offload": "group"}, COMPILED),
        (
            IMAGES,
            0,
            {"compile": True, "adapters": {"pixels": "/a/folder"}},
            "MODEL_COMPILE, MODEL_ADAPTERS: each change of adapters would recompile; set one",
        ),
        (
            TEXTS,
            1,
            {"offload": "group"},
            "MODEL_OFFLOAD: group is for pipelines; take model or sequential",
        ),
        (TEXTS, 0, {"vae_tiling": True}, f"MODEL_VAE_TILING: {ONLY_IMAGES}"),
        (TEXTS, 0, {"vae_slicing": True}, f"MODEL_VAE_SLICING: {ONLY_IMAGES}"),
        (TEXTS, 0, {"channels_last": True}, f"MODEL_CHANNELS_LAST: {ONLY_IMAGES}"),
        (TEXTS, 0, {"safety_checker": "a.b:c"}, f"MODEL_SAFETY_CHECKER: {ONLY_IMAGES}"),
        (
            TEXTS,
            0,
            {"adapters": {"pixels": "/a/folder"}, "step_cache": 0.1},
            f"MODEL_STEP_CACHE, MODEL_ADAPTERS: {ONLY_IMAGES}",
        ),
        (
            IMAGES,
            0,
            {"max_image_pixels": 1_000_000},
            "MODEL_MAX_IMAGE_PIXELS: only for MODEL_TYPE=image_to_text",
        ),
    ],
)
def test_incompatible_settings_are_refused_before_anything_is_loaded(
    task: Task, gpus: int, values: dict[str, Any], line: str, machine: Machine
) -> None:
    machine(gpus)
    assert load_error("no/model", task, **values) == line


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("bitsandbytes-4bit", "bitsandbytes"),
        ("bitsandbytes-8bit", "bitsandbytes"),
        ("torchao-int8", "torchao"),
        ("torchao-int4", "torchao"),
        ("gguf", "gguf"),
    ],
)
def test_a_quantization_without_its_package_is_refused(
    kind: str, package: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(1)
    monkeypatch.setattr(
        "consumer.runners.quantization.find_spec", lambda name: None if name == package else name
    )
    line = f"MODEL_QUANTIZATION: the package {package} is not installed"
    assert load_error("no/model", quantization=kind) == line


def test_compatible_settings_are_accepted(machine: Machine) -> None:
    machine(2)
    cuda = Placement(torch.device("cuda"), torch.bfloat16)
    compatible: list[dict[str, Any]] = [
        {"quantization": "bitsandbytes-4bit", "offload": "model", "vae_tiling": True},
        {"quantization": "torchao-int4", "compile": True, "step_cache": 0.1},
        {"device_map": "balanced", "compile": True},
        {"offload": "group", "adapters": {"pixels": "/a/folder"}, "channels_last": True},
    ]
    for values in compatible:
        options.validate_options(IMAGES, ModelConfig(**values), cuda)
    both = ModelConfig(device_map="balanced", quantization="bitsandbytes-8bit", compile=True)
    options.validate_options(TEXTS, both, cuda)


# -- missing features of a model ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "absent", "values", "line"),
    [
        (
            SD3,
            None,
            {"attention": "native"},
            "MODEL_ATTENTION: StableDiffusion3 has no selectable attention backend",
        ),
        (SD3, None, {"step_cache": 0.1}, "MODEL_STEP_CACHE: StableDiffusion3 has no step cache"),
        (SDXL, None, {"step_cache": 0.1}, "MODEL_STEP_CACHE: StableDiffusionXL has no step cache"),
        (
            SD3,
            "vae",
            {"vae_tiling": True},
            "MODEL_VAE_TILING: StableDiffusion3 has no vae with tiling",
        ),
        (
            SD3,
            "vae",
            {"vae_slicing": True},
            "MODEL_VAE_SLICING: StableDiffusion3 has no vae with slicing",
        ),
        (
            FLUX,
            "vae",
            {"channels_last": True},
            "MODEL_CHANNELS_LAST: Flux has no two-dimensional convolutions",
        ),
        (
            FLUX,
            None,
            {"quantization": "gguf"},
            "MODEL_QUANTIZATION: gguf needs one .gguf file in transformer, there are 0",
        ),
        (
            "hunyuan_dit",
            None,
            {"quantization": "gguf"},
            "MODEL_QUANTIZATION: gguf is not for transformer of HunyuanDiT2DModel",
        ),
    ],
)
def test_an_option_that_the_pipeline_does_not_support_is_refused(
    family: str, absent: str | None, values: dict[str, Any], line: str, own_folder: Folder
) -> None:
    folder = own_folder(family)
    assert load_error(without(folder, absent) if absent else folder, **values) == line


def test_the_known_attention_backends_are_those_of_the_libraries() -> None:
    backends = {b.value for b in AttentionBackendName if not b.value.endswith("_hub")}
    assert set(runner_spec(IMAGES).attention) == backends
    assert set(runner_spec(TEXTS).attention) == set(vision_loading.ATTENTION)


@pytest.mark.parametrize("name", ["flash_hub", "sage_hub", "no such", "FLEX"])
def test_an_unknown_attention_backend_or_one_of_the_hub_is_refused(
    name: str, model_folder: Folder
) -> None:
    line = load_error(model_folder(FLUX), attention=name)
    assert line.startswith("MODEL_ATTENTION: must be one of _flash_3, ")
    assert "hub" not in line


@pytest.mark.parametrize(("name", "package"), [("flash", "flash-attn"), ("sage", "sageattention")])
def test_an_attention_backend_without_its_package_is_refused(
    name: str, package: str, model_folder: Folder
) -> None:
    line = load_error(model_folder(FLUX), attention=name)
    assert line.startswith("MODEL_ATTENTION: ")
    assert f"Please install `{package}" in line


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("kernels-community/flash-attn2", "must be one of eager, sdpa, flex_attention, "),
        ("paged|eager", "must be one of eager, sdpa, flex_attention, flash_attention_2"),
        ("flex_attention", "Qwen2_5_VLForConditionalGeneration has no flex_attention"),
        ("flash_attention_2", "the package flash-attn is not installed"),
    ],
)
def test_an_unsupported_attention_of_a_vision_language_model_is_refused(
    name: str, line: str, model_folder: Folder
) -> None:
    assert load_error(model_folder(VISION), TEXTS, attention=name).startswith(
        f"MODEL_ATTENTION: {line}"
    )
