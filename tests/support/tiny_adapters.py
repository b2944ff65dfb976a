"""LoRA adapters with random matrices for the tiny models, saved by diffusers.

This module imports torch.
"""

# mypy: allow-untyped-calls

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from consumer.runners import ModelRunner

FILE = "pytorch_lora_weights.safetensors"
RANK = 2
STRENGTH = 0.5  # standard deviation of the matrices; large enough to change every image


def pipeline(runner: ModelRunner) -> Any:
    model: Any = runner._model
    return model._pipe


def denoiser(pipe: Any) -> str:
    return "unet" if "unet" in pipe.components else "transformer"


def save_adapter(
    pipe: Any,
    folder: Path,
    *,
    seed: int = 1,
    part: str = "",
    layers: Collection[str] = ("to_q", "to_v", "to_out.0"),
    wider: int = 1,
) -> Path:
    """Save an adapter for the layers with these names, and return its file.

    Args:
        pipe: A pipeline. It is not changed.
        folder: The target folder.
        seed: Seed of the random matrices.
        part: The adapted component of the pipeline. By default the denoiser.
        layers: Suffixes of the layer names.
        wider: Factor on the number of inputs of each layer.
    """
    part = part or denoiser(pipe)
    chance = torch.Generator().manual_seed(seed)
    matrices = {}
    for name, layer in getattr(pipe, part).named_modules():
        if not isinstance(layer, torch.nn.Linear) or not name.endswith(tuple(layers)):
            continue
        inputs, outputs = layer.in_features * wider, layer.out_features
        for half, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            matrix = torch.randn(shape, generator=chance) * STRENGTH
            matrices[f"{name}.lora_{half}.weight"] = matrix
    assert matrices
    type(pipe).save_lora_weights(folder, **{f"{part}_lora_layers": matrices})
    return folder / FILE


def add_weights(file: Path, **weights: torch.Tensor) -> None:
    """Add other tensors to an adapter file; `__` in a name stands for a dot."""
    named = {name.replace("__", "."): weight for name, weight in weights.items()}
    save_file({**load_file(file), **named}, file)


def change_weights(
    file: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]
) -> None:
    """Rename, replace or drop each weight of a file."""
    changed = [change(name, weight) for name, weight in load_file(file).items()]
    save_file(dict(pair for pair in changed if pair is not None), file)


def save_as_peft_does(file: Path, folder: Path, part: str, **config: Any) -> Path:
    """Save the adapter of a file in the layout of `PeftModel.save_pretrained`.

    The matrices are divided by the scale of the configuration, so both adapters have an equal
    effect.

    Args:
        file: A file of `save_adapter`.
        folder: The target folder.
        part: The adapted component of the pipeline.
        config: Fields of adapter_config.json, for example `lora_alpha` and `alpha_pattern`.
    """
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, **config}
    weights = {}
    for name, weight in load_file(file).items():
        module = name.removeprefix(f"{part}.")
        patterns = config.get("alpha_pattern", {})
        pattern = get_pattern_key(list(patterns), module.partition(".lora_")[0])
        alpha = patterns.get(pattern, config["lora_alpha"])
        scale = alpha / (RANK**0.5 if config.get("use_rslora") else RANK)
        weights[f"base_model.model.{module}"] = weight / scale if ".lora_B." in name else weight
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
