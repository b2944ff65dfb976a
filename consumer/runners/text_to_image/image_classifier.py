"""A safety checker from a model: an image classifier of transformers, as MODEL_SAFETY_CHECKER."""

# mypy: allow-untyped-calls

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from PIL import Image as Pillow
from transformers import AutoImageProcessor, AutoModelForImageClassification

from consumer.ports.model import ModelMisconfigured, ModelUnavailable
from consumer.runners.config import ModelConfig
from consumer.runners.faults import load_failure
from consumer.runners.libraries import reported_warnings
from consumer.runners.source import Source, find_model
from consumer.runners.weights import require_no_new_weights

if TYPE_CHECKING:
    from PIL.Image import Image

SETTING = "MODEL_SAFETY_CHECKER"
_LABELS = "MODEL_SAFETY_LABELS"
_SIDE = 64  # pixels of the image that is classified at the start

# Nothing is read from outside the folder, and no code in the folder is run.
_LOCALLY = {"local_files_only": True, "trust_remote_code": False}


class ImageClassifier:
    """Flags an image if the labels together have at least the threshold's probability.

    A model for several labels at once (`problem_type` is `multi_label_classification`) gives each
    label its own probability; the highest one counts.

    Args:
        model: The model, in float32 on its device.
        processor: Its image processor.
        labels: Indices of the labels that flag an image.
        threshold: Probability from which an image is flagged.
    """

    def __init__(self, model: Any, processor: Any, labels: Sequence[int], threshold: float) -> None:
        self._model = model
        self._processor = processor
        self._labels = list(labels)
        self._threshold = threshold

    def __call__(self, images: "Sequence[Image]") -> list[bool]:
        """Return one flag for each image."""
        inputs = self._processor(images=list(images), return_tensors="pt")
        with torch.inference_mode():
            scores = self._model(inputs["pixel_values"].to(self._model.device)).logits.float()
        if self._model.config.problem_type == "multi_label_classification":
            found = scores.sigmoid()[:, self._labels].amax(dim=1)
        else:
            found = scores.softmax(dim=1)[:, self._labels].sum(dim=1)
        if not found.isfinite().all():
            raise ValueError("the classifier's scores are not numbers")
        return [bool(flag) for flag in (found >= self._threshold).tolist()]


def load_classifier(config: ModelConfig, device: torch.device) -> ImageClassifier:
    """Load the classifier from a folder or the hub, and classify one image with it.

    Raises:
        ModelUnavailable: The model cannot be loaded; the message is one line.
        ModelMisconfigured: It is no classifier with safetensors, or lacks a label.
    """
    with reported_warnings():
        source = find_model(config.safety_checker, None, _download, setting=SETTING)
        try:
            classifier = _load(source, config, device)
            classifier([Pillow.new("RGB", (_SIDE, _SIDE))])
        except ModelUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - the libraries raise dozens of kinds
            failure = load_failure(error, name=source.id, folder=source.folder)
        else:
            return classifier
    raise ModelUnavailable(f"{SETTING}: {failure}")


def _load(source: Source, config: ModelConfig, device: torch.device) -> ImageClassifier:
    if not any(source.folder.glob("*.safetensors")):
        raise ModelMisconfigured(f"{SETTING}: {source.id} has no weights in safetensors files")
    loaded: Any = AutoModelForImageClassification.from_pretrained(
        source.folder,
        dtype=torch.float32,  # the models are small, and a flag should not depend on the device
        use_safetensors=True,
        output_loading_info=True,
        **_LOCALLY,
    )
    model, info = loaded
    require_no_new_weights(info, f"{SETTING}: {source.id}")
    labels = _indices(model.config.id2label, config.safety_labels, source)
    processor = AutoImageProcessor.from_pretrained(source.folder, **_LOCALLY)
    model.to(device).eval()
    return ImageClassifier(model, processor, labels, config.safety_threshold)


def _indices(names: dict[int, str], wanted: Sequence[str], source: Source) -> list[int]:
    by_name = {name.lower(): index for index, name in names.items()}
    missing = [label for label in wanted if label.lower() not in by_name]
    if missing:
        raise ModelMisconfigured(
            f"{_LABELS}: {source.id} has no label {missing[0]}; "
            f"it has {', '.join(names[index] for index in sorted(names))}"
        )
    return [by_name[label.lower()] for label in wanted]


def _download(model_id: str, revision: str | None, *, cached_only: bool) -> str:
    """Download the files of a classifier, and return its folder."""
    return huggingface_hub.snapshot_download(
        model_id,
        revision=revision,
        local_files_only=cached_only,
        allow_patterns=["*.json", "*.safetensors"],
        ignore_patterns=["*/*"],
    )
