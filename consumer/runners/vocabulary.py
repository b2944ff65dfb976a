"""Completeness of tokenizers: each must have come with its vocabulary.

transformers makes a tokenizer of a folder without a vocabulary. Such a tokenizer reads every prompt
as the same unknown word, or as nothing, and the output has nothing to do with the prompt.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from consumer.ports.model import ModelUnavailable

_WORD = "red"  # in every vocabulary, at least as letters


def require_all_weights(folder: Path, index: Mapping[str, Any], name: str) -> None:
    """Refuse a pipeline one of whose tokenizers has no vocabulary.

    Args:
        folder: Of the pipeline.
        index: Its model_index.json.
        name: What to call the pipeline.

    Raises:
        ModelUnavailable: Names the tokenizer.
    """
    for part, entry in index.items():
        class_name = entry[-1] if isinstance(entry, list) and entry else None
        kind = getattr(transformers, class_name, None) if isinstance(class_name, str) else None
        if not (inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
            continue
        files = kind.vocab_files_names.values()  # any one will do; none: it reads bytes
        if files and not any((folder / part / file).is_file() for file in files):
            raise ModelUnavailable(f"{name}: {part}: its vocabulary is missing")


def require_vocabulary(tokenizer: Any, name: str) -> None:
    """Refuse a loaded tokenizer that cannot read a word.

    Args:
        tokenizer: Of transformers.
        name: What to call the model.

    Raises:
        ModelUnavailable: The tokenizer has no vocabulary.
    """
    tokens = tokenizer(_WORD, add_special_tokens=False)["input_ids"]
    if not tokenizer.decode(tokens, skip_special_tokens=True).strip():
        raise ModelUnavailable(
            f"{name}: its tokenizer has no vocabulary: tokenizer.json, or what stands for it, is"
            " missing"
        )
