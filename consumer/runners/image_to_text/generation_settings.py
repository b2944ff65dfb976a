"""The rule for each setting of a model's generation_config.json.

`generate` of transformers reads its defaults from that file. Some settings change what it returns,
need an argument or code that is not available here, or break the count of tokens. Each setting that
transformers knows has a rule in `RULES`.
"""

# mypy: allow-untyped-calls

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import structlog
from transformers import GenerationConfig

from consumer.ports.model import ModelUnavailable
from consumer.runners.image_to_text.chats import end_of_turn

log = structlog.get_logger()

FILE = "generation_config.json"


class Rule(Enum):
    """The treatment of a setting."""

    DEFAULT = "the default of a request's parameter"
    BATCHED = "applied; means the same for a row of a batch as for a text alone"
    ALONE = "applied; texts are not batched, because rows of a batch share or shift its meaning"
    REPLACED = "replaced by what the file, the tokenizer and the chat template say together"
    IGNORED = "unset: the daemon decides it, or it has no effect on these models"
    REFUSED = "the model is not loaded"


RULES: Mapping[str, Rule] = {
    # The length of the text, and where it ends.
    "max_new_tokens": Rule.DEFAULT,
    "max_length": Rule.IGNORED,  # max_new_tokens is always given
    "min_length": Rule.ALONE,  # counts the padding
    "min_new_tokens": Rule.ALONE,
    "max_time": Rule.IGNORED,  # the text would depend on the machine's speed
    "stop_strings": Rule.REFUSED,
    "eos_token_id": Rule.REPLACED,
    "pad_token_id": Rule.REPLACED,
    "bos_token_id": Rule.REPLACED,
    "forced_eos_token_id": Rule.IGNORED,  # a text that was cut would look complete
    # How a token is chosen.
    "do_sample": Rule.DEFAULT,
    "temperature": Rule.DEFAULT,
    "top_k": Rule.DEFAULT,
    "top_p": Rule.DEFAULT,
    "repetition_penalty": Rule.DEFAULT,
    "min_p": Rule.ALONE,
    "top_h": Rule.ALONE,
    "typical_p": Rule.ALONE,
    "epsilon_cutoff": Rule.ALONE,
    "eta_cutoff": Rule.ALONE,
    "no_repeat_ngram_size": Rule.ALONE,
    "bad_words_ids": Rule.ALONE,
    "sequence_bias": Rule.ALONE,
    "suppress_tokens": Rule.BATCHED,
    "begin_suppress_tokens": Rule.ALONE,
    "exponential_decay_length_penalty": Rule.ALONE,
    "renormalize_logits": Rule.ALONE,
    "encoder_repetition_penalty": Rule.ALONE,  # these two read the prompt, in spite of their names
    "encoder_no_repeat_ngram_size": Rule.ALONE,
    "watermarking_config": Rule.ALONE,
    "remove_invalid_values": Rule.IGNORED,  # would hide scores that are not numbers
    "guidance_scale": Rule.REFUSED,  # runs the model a second time, without the images
    "token_healing": Rule.IGNORED,  # a chat ends with a control token
    # Decoding methods whose code transformers would fetch from the hub.
    "penalty_alpha": Rule.REFUSED,
    "dola_layers": Rule.REFUSED,
    "constraints": Rule.REFUSED,
    "force_words_ids": Rule.REFUSED,
    # Beam search: it writes no text token by token.
    "num_beams": Rule.IGNORED,
    "num_beam_groups": Rule.IGNORED,
    "diversity_penalty": Rule.IGNORED,
    "early_stopping": Rule.IGNORED,
    "length_penalty": Rule.IGNORED,
    # What `generate` returns.
    "num_return_sequences": Rule.IGNORED,
    "return_dict_in_generate": Rule.IGNORED,
    "output_attentions": Rule.IGNORED,
    "output_hidden_states": Rule.IGNORED,
    "output_scores": Rule.IGNORED,
    "output_logits": Rule.IGNORED,
    # Encoder-decoder models, which are not loaded.
    "decoder_start_token_id": Rule.IGNORED,
    "forced_bos_token_id": Rule.IGNORED,
    # Several tokens a step: steps, ends and streams are counted token by token.
    "use_mtp": Rule.IGNORED,
    "is_assistant": Rule.IGNORED,
    "num_assistant_tokens": Rule.IGNORED,
    "num_assistant_tokens_schedule": Rule.IGNORED,
    "assistant_confidence_threshold": Rule.IGNORED,
    "assistant_early_exit": Rule.IGNORED,
    "assistant_lookbehind": Rule.IGNORED,
    "assistant_ensemble_weight": Rule.IGNORED,
    "target_lookbehind": Rule.IGNORED,
    "prompt_lookup_num_tokens": Rule.IGNORED,
    "max_matching_ngram_size": Rule.IGNORED,
    "speculation_type": Rule.IGNORED,
    # Memory and speed: MODEL_* settings decide.
    "use_cache": Rule.IGNORED,  # training leaves it off, which makes each token slower
    "cache_implementation": Rule.IGNORED,
    "cache_config": Rule.IGNORED,
    "max_cache_len": Rule.IGNORED,
    "low_memory": Rule.IGNORED,
    "prefill_chunk_size": Rule.IGNORED,
    "compile_config": Rule.IGNORED,
    "disable_compile": Rule.IGNORED,
    "continuous_batching_config": Rule.IGNORED,
}

_APPLIED = {Rule.DEFAULT, Rule.BATCHED, Rule.ALONE}

# Keys that transformers writes and that are not settings.
METADATA = frozenset({"transformers_version"})

# Values without an effect, as is None; older versions of transformers wrote them into every file.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "min_length": (0,),
    "min_new_tokens": (0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ([], {}),
    "begin_suppress_tokens": ([],),
    "renormalize_logits": (False,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "stop_strings": ([], ""),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "constraints": ([],),
    "force_words_ids": ([],),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "early_stopping": (False,),
    "length_penalty": (1.0,),
    "num_return_sequences": (1,),
    "return_dict_in_generate": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "use_mtp": (False,),
    "is_assistant": (False,),
    "use_cache": (True,),
    "cache_implementation": ("dynamic",),
    "low_memory": (False,),
}


def load_settings(folder: Path, name: str) -> dict[str, Any]:
    """Read a model's generation_config.json, or the same settings in the config.json of old models.

    transformers uses its built-in defaults where the file cannot be read, and refuses some
    settings that are ignored here.

    Args:
        folder: The model's folder.
        name: The model's name in messages.

    Raises:
        ModelUnavailable: The file is no JSON object, or has a setting that is refused.
    """
    path = folder / FILE
    if path.is_file():
        settings = _read_object(path, name)
    else:
        config = _read_object(folder / "config.json", name)
        settings = {
            key: value
            for part in (config.get("text_config") or {}, config)
            for key, value in part.items()
            if key in RULES
        }
    refused = [key for key in _active(settings) if RULES.get(key) is Rule.REFUSED]
    if refused:
        raise ModelUnavailable(f"{name}: {FILE}: {', '.join(refused)}: not supported; remove it")
    return settings


def prepared(settings: Mapping[str, Any], processor: Any, name: str) -> GenerationConfig:
    """Return the generation config of a model for `generate`.

    Args:
        settings: From `load_settings`.
        processor: The model's processor, with a tokenizer and a chat template.
        name: The model's name in messages.

    Raises:
        ModelUnavailable: The end tokens are not token ids.
        ValueError: transformers refuses a value.
    """
    active = _active(settings)
    ignored = [key for key in active if RULES.get(key, Rule.IGNORED) is Rule.IGNORED]
    if ignored:
        log.warning("generation_settings_ignored", model=name, settings=ignored)
    applied = {key: settings[key] for key in active if RULES.get(key) in _APPLIED}
    tokenizer = processor.tokenizer
    ends = _end_tokens(settings.get("eos_token_id"), processor, name)
    # `generate` pads the ended rows of a batch; the padding is removed from the result.
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    return GenerationConfig(**applied, eos_token_id=ends, pad_token_id=padding)


def can_be_batched(generation: GenerationConfig) -> bool:
    """Return whether texts of a model with these defaults can be rows of one batch."""
    return not any(RULES.get(key) is Rule.ALONE for key in _active(vars(generation)))


def _read_object(path: Path, name: str) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # also raised for invalid UTF-8
        settings = None
    if not isinstance(settings, dict):
        raise ModelUnavailable(f"{name}: {path.name} is not a JSON object")
    return settings


def _active(settings: Mapping[str, Any]) -> list[str]:
    return [
        key
        for key, value in settings.items()
        if not key.startswith("_")
        and key not in METADATA
        and value is not None
        and value not in _NEUTRAL.get(key, ())
    ]


def _end_tokens(named: Any, processor: Any, name: str) -> list[int]:
    """Join the end tokens of the file, the tokenizer and the chat template.

    Each source can be incomplete: fine-tuning a base model may change only the template.
    """
    ends = [] if named is None else named if isinstance(named, list) else [named]
    if not all(isinstance(end, int) for end in ends):
        raise ModelUnavailable(f"{name}: {FILE}: eos_token_id: must be numbers of tokens")
    joined = {*ends, processor.tokenizer.eos_token_id, end_of_turn(processor)} - {None}
    # Some files have -1 for "none".
    known = sorted(end for end in joined if end >= 0)
    if not known:
        raise ModelUnavailable(f"{name}: neither {FILE} nor its tokenizer names an end token")
    return known
