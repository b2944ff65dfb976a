"""Check that each tokenizer has a vocabulary.

transformers creates a tokenizer even if the folder has no vocabulary. Such a tokenizer encodes
every prompt as the same unknown word or as nothing, and the output does not depend on the prompt.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from consumer.ports.model import ModelUnavailable

_WORD = "red"  # in every vocabulary, at least as single letters


def require_vocabulary_files(folder: Path, index: Mapping[str, Any], name: str) -> None:
    """Refuse a pipeline with a tokenizer that has no vocabulary file.

    Args:
        folder: The pipeline's folder.
        index: Its model_index.json.
        name: The pipeline's name in messages.

    Raises:
        ModelUnavailable: Names the tokenizer.
    """
    for part, entry in index.items():
        class_name = entry[-1] if isinstance(entry, list) and entry else None
        kind = getattr(transformers, class_name, None) if isinstance(class_name, str) else None
        if not (inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
            continue
        files = kind.vocab_files_names.values()  # one is enough; none: it encodes bytes
        if files and not any((folder / part / file).is_file() for file in files):
            raise ModelUnavailable(f"{name}: {part}: its vocabulary is missing")


def require_vocabulary(tokenizer: Any, name: str) -> None:
    """Refuse a loaded tokenizer that cannot encode a word.

    Args:
        tokenizer: A tokenizer of transformers.
        name: The model's name in messages.

    Raises:
        ModelUnavailable: The tokenizer has no vocabulary.
    """
    tokens = tokenizer(_WORD, add_special_tokens=False)["input_ids"]
    if not tokenizer.decode(tokens, skip_special_tokens=True).strip():
        raise ModelUnavailable(
            f"{name}: its tokenizer has no vocabulary: tokenizer.json, or an equivalent file, is"
            " missing"
        )
