"""A runner that classifies images in batches: `MODEL_RUNNER=classifier:Classifier`.

`CLASSIFIER_MODEL` is a folder or a hub id that AutoModelForImageClassification loads.
"""

import os
from collections.abc import Hashable, Sequence

import torch
from pydantic import Field
from transformers import AutoImageProcessor, AutoModelForImageClassification

from generation_runner import Context, Json, Output, Parameters, Runner


class ClassifierParameters(Parameters):
    """Which labels are returned."""

    top: int = Field(default=3, ge=1, le=10, description="number of labels")


class Classifier(Runner[ClassifierParameters]):
    """An image classifier of transformers."""

    parameters = ClassifierParameters
    min_images = max_images = 1
    name = "classifier"

    def load(self, device: str) -> None:
        """Load the weights to the device."""
        source = os.environ["CLASSIFIER_MODEL"]
        self._device = device
        self._processor = AutoImageProcessor.from_pretrained(source)
        self._model = AutoModelForImageClassification.from_pretrained(source).to(device).eval()

    def run(self, parameters: ClassifierParameters, context: Context) -> Output:
        """Classify one image."""
        (output,) = self.run_batch([parameters], [context])
        return output

    def batch_key(self, _: ClassifierParameters) -> Hashable:
        """All requests can share a batch, whatever number of labels they want."""
        return "any"

    def run_batch(
        self, parameters: Sequence[ClassifierParameters], contexts: Sequence[Context]
    ) -> list[Output]:
        """Classify several images at once."""
        inputs = self._processor([each.images[0] for each in contexts], return_tensors="pt")
        with torch.inference_mode():
            logits = self._model(**inputs.to(self._device)).logits
        outputs: list[Output] = []
        for one, context, scores in zip(parameters, contexts, logits.softmax(-1), strict=True):
            best = scores.topk(min(one.top, len(scores)))
            outputs.append(
                Json(
                    [
                        {"label": self._model.config.id2label[index], "score": round(score, 4)}
                        for score, index in zip(
                            best.values.tolist(), best.indices.tolist(), strict=True
                        )
                    ]
                )
            )
            context.step(1, 1)
        return outputs
