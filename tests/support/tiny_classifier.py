"""Saves a tiny image classifier with random weights that tells bright images from dark ones."""

# mypy: allow-untyped-calls

from pathlib import Path
from typing import Any

import torch
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

LABELS = ("normal", "NSFW", "drawing")
_SIDE = 32  # pixels


def save(folder: Path, *, problem_type: str | None = None) -> None:
    """Save a classifier that is sure of `NSFW` for bright images and of `normal` for dark ones."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=4,
            hidden_sizes=[4],
            depths=[1],
            id2label=dict(enumerate(LABELS)),
            label2id={label: number for number, label in enumerate(LABELS)},
            problem_type=problem_type,
        )
    ).eval()
    processor = ConvNextImageProcessor(
        size={"shortest_edge": _SIDE}, crop_pct=1.0, resample=2, do_normalize=False
    )
    _separate(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _separate(model: Any) -> None:
    """Set the last layer: the features of black and white images are on its two sides."""
    size = (1, 3, _SIDE, _SIDE)
    with torch.no_grad():
        dark, bright = (
            model.resnet(image).pooler_output.flatten()
            for image in (torch.zeros(size), torch.ones(size))
        )
        between = bright - dark
        weight = 40 * between / between.dot(between)
        layer = model.classifier[-1]
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([0.0, 0.0, -20.0]))
        layer.weight[1] = weight
        layer.bias[1] = -weight.dot((bright + dark) / 2)
