"""Batches: which requests share one call of `generate`, each as a row padded on its left side.

Padding is masked and not counted in the positions, so the scores of a row differ from those of a
single run by rounding only: in float32 by 1e-7 of 0.5 with tiny models of random weights, and by
4e-6 of 16 with the demonstration model. If the scores of the two best tokens differ by less than
that, the other token can be chosen, and the rest of the text differs. Measured in batches of eight:

- float32: in none of 400 texts (14,344 tokens);
- bfloat16, where scores are equal more often: in 22 of 320 texts of random weights, and in 1 of 80
  of the demonstration model.

Only the families in `MEASURED` were measured.
"""

from collections.abc import Hashable
from typing import Any

from consumer.runners.config import ModelConfig
from consumer.runners.image_to_text.generation_settings import can_be_batched
from consumer.runners.image_to_text.sampling import Sampling
from generation_contracts import ImageToTextRequest

MEASURED = frozenset({"llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"})


class BatchKeys:
    """Computes which requests can share one call of `generate`.

    Args:
        model: The model of transformers.
        tokenizer: Its tokenizer.
        config: The configuration that the model was loaded with.
    """

    def __init__(self, model: Any, tokenizer: Any, config: ModelConfig) -> None:
        self._possible = (
            model.config.model_type in MEASURED
            and tokenizer.pad_token is not None
            and can_be_batched(model.generation_config)
            # A column with a large value in any row is multiplied in 16 bits for all rows.
            and config.quantization != "bitsandbytes-8bit"
        )

    def key(self, request: ImageToTextRequest, sampling: Sampling) -> Hashable | None:
        """Return a key that is equal for requests of one batch; None: the request runs alone.

        Sampled texts run alone: all rows of a call share one random generator, so a seed would not
        reproduce its text. Streamed texts run alone too.
        """
        if not self._possible or request.stream or sampling.options["do_sample"]:
            return None
        return tuple(sorted(sampling.options.items()))
