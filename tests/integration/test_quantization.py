"""Weights in eight and four bits, as far as a CPU supports them."""

# mypy: allow-untyped-calls

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from consumer.runners import ModelConfig, ModelRunner, quantization
from consumer.runners.device import Placement
from consumer.runners.image_to_text.vision_loading import load_vision_language
from consumer.runners.source import Source
from generation_contracts import Task
from tests.integration.small_runs import (
    SMALL,
    generate_image,
    generate_text,
    largest_difference,
    load_error,
    pipeline,
)
from tests.support.tiny_models import Folder, Load

FLUX, VISION = "flux", "vision_language"
CPU = Placement(torch.device("cpu"), torch.float32)
CUDA = Placement(torch.device("cuda"), torch.bfloat16)
Q8_0 = gguf.GGMLQuantizationType.Q8_0
Q8_BLOCK = 32  # weights

Shared = Callable[..., ModelRunner]


def classes_of(model: Any) -> set[str]:
    return {type(parameter).__name__ for parameter in model.parameters()}


def as_gguf(folder: Path, *, leave_out: str = "") -> Path:
    """Replace the safetensors file of a folder's transformer with a GGUF file."""
    (safe,) = (folder / "transformer").glob("*.safetensors")
    writer = gguf.GGUFWriter(safe.with_name("tiny-Q8_0.gguf"), "flux")
    for name, weight in load_file(safe).items():
        array = weight.float().numpy()
        if name == leave_out:
            continue
        if array.ndim == 2 and array.shape[-1] % Q8_BLOCK == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    safe.unlink()
    return folder


def test_torchao_int8_quantizes_the_transformer(
    model_folder: Folder, load: Load, shared_runner: Shared
) -> None:
    runner = load(model_folder(FLUX), quantization="torchao-int8", defaults=SMALL)
    pipe = pipeline(runner)
    assert "Int8Tensor" in classes_of(pipe.transformer)
    assert pipe.transformer.proj_out.weight.qdata.dtype is torch.int8
    for small in (pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        assert classes_of(small) == {"Parameter"}
    assert 0 < largest_difference(generate_image(runner), generate_image(shared_runner(FLUX))) < 20


def test_torchao_int8_also_quantizes_a_large_text_encoder(
    model_folder: Folder, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    always = partial(quantization.for_transformers, min_bytes=0)
    monkeypatch.setattr(quantization, "for_transformers", always)
    pipe = pipeline(load(model_folder(FLUX), quantization="torchao-int8", defaults=SMALL))
    assert "Int8Tensor" in classes_of(pipe.text_encoder_2)


def test_torchao_int8_quantizes_a_vision_language_model(model_folder: Folder, load: Load) -> None:
    runner = load(model_folder(VISION), Task.IMAGE_TO_TEXT, quantization="torchao-int8")
    model: Any = runner._model
    assert "Int8Tensor" in classes_of(model._model)
    assert generate_text(runner)


@pytest.mark.parametrize(("kind", "layer"), [("bitsandbytes-4bit", "Linear4bit")])
def test_bitsandbytes_replaces_the_layers_of_a_vision_language_model(
    kind: Any, layer: str, model_folder: Folder
) -> None:
    # The settings refuse it on a CPU, where it is slow; this test calls the loader directly.
    config = ModelConfig(quantization=kind)
    model, _ = load_vision_language(Source(model_folder(VISION), VISION), CPU, config)
    assert layer in {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bitsandbytes-4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("bitsandbytes-8bit", {"load_in_8bit": True}),
    ],
)
def test_bitsandbytes_quantizes_the_denoiser_only(kind: Any, expected: dict[str, Any]) -> None:
    index = {"transformer": ["diffusers", "X"], "vae": ["diffusers", "Y"]}
    arguments = quantization.for_diffusers(ModelConfig(quantization=kind), CUDA, index)
    config = arguments["quantization_config"]
    given = config._resolve_quant_config(is_diffusers=True, module_name="transformer").to_dict()
    assert expected.items() <= given.items()
    assert config._resolve_quant_config(is_diffusers=True, module_name="vae") is None
    assert "device_map" not in arguments


def test_torchao_int4_packs_groups_of_128_weights_on_the_device() -> None:
    config = ModelConfig(quantization="torchao-int4")
    arguments = quantization.for_diffusers(config, CUDA, {"transformer": ["diffusers", "X"]})
    config = arguments["quantization_config"]._resolve_quant_config(module_name="transformer")
    assert (config.quant_type.group_size, config.quant_type.int4_packing_format) == (
        128,
        "tile_packed_to_4d",
    )
    assert arguments["device_map"] == "cuda"


def test_a_transformer_stored_as_gguf_is_read_and_stays_quantized(
    own_folder: Folder, load: Load, shared_runner: Shared
) -> None:
    runner = load(as_gguf(own_folder(FLUX)), quantization="gguf", defaults=SMALL)
    transformer = pipeline(runner).transformer
    assert "GGUFParameter" in classes_of(transformer)
    assert transformer.proj_out.weight.dtype is torch.uint8
    assert 0 < largest_difference(generate_image(runner), generate_image(shared_runner(FLUX))) < 20


def test_a_gguf_file_without_one_of_the_weights_is_refused(own_folder: Folder) -> None:
    folder = as_gguf(own_folder(FLUX), leave_out="proj_out.weight")
    assert load_error(folder, quantization="gguf") == (
        "MODEL_QUANTIZATION: the weights in the .gguf file are not those of FluxTransformer2DModel"
    )


def test_two_gguf_files_are_refused(own_folder: Folder) -> None:
    folder = as_gguf(own_folder(FLUX))
    (folder / "transformer" / "other.gguf").touch()
    assert load_error(folder, quantization="gguf") == (
        "MODEL_QUANTIZATION: gguf needs one .gguf file in transformer, there are 2"
    )
