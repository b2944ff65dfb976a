"""Which requests are written in one `generate`, each as a row, padded on its left side.

A text of a batch is the one that its request would get alone: padding is masked and the positions
are counted without it, so that the scores differ by rounding only. In float32 that is 1e-7 of 0.5
with tiny models of random weights and 4e-6 of 16 with the demonstration model. Where the two best
tokens are nearer to each other than that, the other one can be chosen, and the text goes on from
there: in float32 in none of 400 texts (14,344 tokens, batches of eight); in bfloat16, whose scores
are equal more often, in 22 of 320 of the random weights and 1 of 80 of the demonstration model.

That was measured for the families of `MEASURED` and for no other.
"""

from collections.abc import Hashable
from typing import Any

from consumer.runners.config import ModelConfig
from consumer.runners.image_to_text.generation_settings import can_be_batched
from consumer.runners.image_to_text.sampling import Sampling
from generation_contracts import ImageToTextRequest

MEASURED = frozenset({"llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"})


class BatchKeys:
    """Says which requests can be written in one `generate`.

    Args:
        model: The model of transformers.
        tokenizer: Its tokenizer.
        config: How it was loaded.
    """

    def __init__(self, model: Any, tokenizer: Any, config: ModelConfig) -> None:
        self._possible = (
            model.config.model_type in MEASURED
            and tokenizer.pad_token is not None
            and can_be_batched(model.generation_config)
            # Columns with a large value in any row are multiplied in 16 bits, for all rows.
            and config.quantization != "bitsandbytes-8bit"
        )

    def key(self, request: ImageToTextRequest, sampling: Sampling) -> Hashable | None:
        """Equal for requests that go together; None for one that runs alone.

        Alone are the texts that are drawn by chance: there is one random generator for all rows, so
        that no seed would give its text again. And those that are told as they grow.
        """
        if not self._possible or request.stream or sampling.options["do_sample"]:
            return None
        return tuple(sorted(sampling.options.items()))
