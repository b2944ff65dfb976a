"""Settings in generation_config.json of a model: each is applied, ignored, or refused."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from structlog.testing import capture_logs

from consumer.ports.model import GeneratedText
from consumer.runners import ModelRunner
from generation_contracts import ImageToTextRequest, Task
from tests.integration.small_runs import load_error
from tests.support.model_runs import run_model
from tests.support.tiny_models import Folder, Load

RED = Image.new("RGB", (60, 60), "red")
FILE = "generation_config.json"

Shared = Callable[..., ModelRunner]


@pytest.fixture
def settings() -> Any:
    """Return the module with the rules, which imports transformers."""
    return importlib.import_module("consumer.runners.image_to_text.generation_settings")


@pytest.fixture
def folder(own_folder: Folder) -> Path:
    return own_folder("vision_language")


def set_to(folder: Path, **values: Any) -> None:
    content = json.loads((folder / FILE).read_text()) | values
    (folder / FILE).write_text(json.dumps(content))


def generate_text(runner: ModelRunner, **fields: Any) -> GeneratedText:
    request = ImageToTextRequest(
        **{"prompt": "What?", "images": ("s3://inputs/0.png",), "max_new_tokens": 9, **fields}
    )
    text = run_model(runner, request, [RED]).text
    assert text is not None
    return text


def test_each_setting_of_transformers_has_a_rule(settings: Any) -> None:
    """This test fails if a new version of transformers has settings without a rule."""
    known = vars(importlib.import_module("transformers").GenerationConfig())
    assert {key for key in known if not key.startswith("_")} == {
        *settings.RULES,
        *settings.METADATA,
    }


def test_the_page_about_models_names_each_setting_that_is_not_ignored(settings: Any) -> None:
    page = (Path(__file__).parents[2] / "docs/reference/models.md").read_text()
    section = page.partition("### Generation settings")[2]
    for name, rule in settings.RULES.items():
        if rule is not settings.Rule.IGNORED:
            assert f"`{name}`" in section


IGNORED = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_attentions": True,
    "num_return_sequences": 2,
    "num_beams": 3,
    "num_beam_groups": 3,
    "early_stopping": True,
    "length_penalty": 2.0,
    "prompt_lookup_num_tokens": 3,
    "use_mtp": True,
    "is_assistant": True,
    "assistant_early_exit": 1,
    "cache_implementation": "quantized",
    "compile_config": {"backend": "inductor"},
    "use_cache": False,
    "max_time": 1e-9,
    "max_length": 1,
    "forced_eos_token_id": 5,
    "token_healing": True,
    "remove_invalid_values": True,
    "chat_format": "chatml",  # a setting of the first Qwen-VL that transformers does not have
}


def test_settings_that_the_daemon_controls_are_ignored_and_logged(
    folder: Path, load: Load, shared_runner: Shared
) -> None:
    set_to(folder, **IGNORED)
    with capture_logs() as logs:
        runner = load(folder, Task.IMAGE_TO_TEXT)
    (line,) = [entry for entry in logs if entry["event"] == "generation_settings_ignored"]
    assert set(line["settings"]) == IGNORED.keys()
    assert generate_text(runner) == generate_text(shared_runner("vision_language"))


def test_each_ignored_setting_changes_nothing(settings: Any) -> None:
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=2)
    processor = SimpleNamespace(tokenizer=tokenizer, apply_chat_template=None)
    plain = settings.prepared({}, processor, "model")
    for name, rule in settings.RULES.items():
        if rule is settings.Rule.IGNORED:
            assert settings.prepared({name: 7}, processor, "model") == plain, name


def test_remove_invalid_values_does_not_hide_scores_that_are_not_numbers(folder: Path) -> None:
    set_to(folder, remove_invalid_values=True)
    tensors = importlib.import_module("safetensors.torch")
    weights = tensors.load_file(folder / "model.safetensors")
    weights["lm_head.weight"].fill_(float("nan"))
    tensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "scores that are not numbers" in load_error(folder, Task.IMAGE_TO_TEXT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop_strings", ["."]),
        ("guidance_scale", 2.0),
        ("penalty_alpha", 0.6),
        ("dola_layers", "low"),
        ("constraints", ["a"]),
        ("force_words_ids", [[5]]),
    ],
)
def test_an_unsupported_setting_stops_the_start(name: str, value: Any, folder: Path) -> None:
    set_to(folder, **{name: value})
    expected = f"vision_language: {FILE}: {name}: not supported; remove it"
    assert load_error(folder, Task.IMAGE_TO_TEXT) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repetition_penalty": 0.0}, "`penalty` has to be a strictly positive float"),
        (
            {"min_p": 2.0},
            "`min_p` has to be a float",
        ),  # the default is greedy; the probe run samples
        ({"temperature": "0.7", "do_sample": True}, f"{FILE}: temperature: must be a number"),
        ({"eos_token_id": "<|im_end|>"}, f"{FILE}: eos_token_id: must be numbers of tokens"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
    ],
)
def test_an_invalid_value_of_a_setting_stops_the_start(
    values: dict[str, Any], message: str, folder: Path
) -> None:
    set_to(folder, **values)
    assert message in load_error(folder, Task.IMAGE_TO_TEXT)


def test_neutral_values_of_unsupported_settings_are_accepted(
    folder: Path, load: Load, shared_runner: Shared, settings: Any
) -> None:
    neutral = {name: values[0] for name, values in settings._NEUTRAL.items()}
    set_to(folder, **neutral)
    with capture_logs() as logs:
        runner = load(folder, Task.IMAGE_TO_TEXT)
    assert "generation_settings_ignored" not in {entry["event"] for entry in logs}
    assert generate_text(runner) == generate_text(shared_runner("vision_language"))
    model: Any = runner._model
    assert settings.can_be_batched(model._model.generation_config)


def test_a_setting_that_is_applied_changes_the_text(
    folder: Path, load: Load, shared_runner: Shared, settings: Any
) -> None:
    set_to(folder, no_repeat_ngram_size=1)
    runner = load(folder, Task.IMAGE_TO_TEXT)
    text = generate_text(runner).text
    assert len(set(text)) == len(text)
    assert text != generate_text(shared_runner("vision_language")).text
    model: Any = runner._model
    assert not settings.can_be_batched(model._model.generation_config)


def test_a_seed_determines_a_text_with_a_watermark(folder: Path, load: Load) -> None:
    set_to(folder, watermarking_config={"bias": 3.0, "seeding_scheme": "selfhash"})
    runner = load(folder, Task.IMAGE_TO_TEXT)
    fields = {"temperature": 1.0, "seed": 5}
    first = generate_text(runner, **fields)
    generate_text(runner, temperature=2.0, seed=6)
    assert generate_text(runner, **fields) == first


def test_a_top_k_of_minus_1_means_every_token(folder: Path, load: Load) -> None:
    set_to(folder, do_sample=True, top_k=-1)
    runner = load(folder, Task.IMAGE_TO_TEXT)
    model: Any = runner._model
    assert model.description.defaults["top_k"] == 0
    assert generate_text(runner).text


# -- end tokens -----------------------------------------------------------------------------------


def make_likely(folder: Path, token: str) -> None:
    """Make the model generate a control token soon: no other control token is allowed."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    number = next(t["id"] for t in tokenizer["added_tokens"] if t["content"] == token)
    bias = [[[number], 50.0]]
    suppressed = json.loads((folder / FILE).read_text())["suppress_tokens"]
    suppressed.remove(number)
    set_to(folder, sequence_bias=bias, suppress_tokens=suppressed)


END, PADDING = 256, 257  # <|im_end|>, <|endoftext|>


@pytest.mark.parametrize("named", [PADDING, [PADDING], None, -1])
def test_a_text_ends_with_the_tokenizers_end_token_too(
    named: int | list[int] | None, folder: Path, load: Load
) -> None:
    make_likely(folder, "<|im_end|>")
    set_to(folder, eos_token_id=named)
    text = generate_text(load(folder, Task.IMAGE_TO_TEXT))
    assert (text.finish_reason, text.completion_tokens) == ("stop", 1)


def test_a_text_ends_with_the_turn_although_no_file_names_its_end_token(
    folder: Path, load: Load
) -> None:
    """The files of a model that was fine-tuned on chats may still name the end of a document."""
    make_likely(folder, "<|im_end|>")
    set_to(folder, eos_token_id=PADDING)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}))
    text = generate_text(load(folder, Task.IMAGE_TO_TEXT))
    assert (text.finish_reason, text.completion_tokens) == ("stop", 1)


def test_the_end_tokens_of_a_model_without_generation_config_are_in_its_config(
    folder: Path, load: Load
) -> None:
    make_likely(folder, "<|im_end|>")
    runner = load(folder, Task.IMAGE_TO_TEXT)
    with_file: Any = runner._model
    (folder / FILE).unlink()
    without_file: Any = load(folder, Task.IMAGE_TO_TEXT)._model
    assert with_file._ends == {END, PADDING}
    assert without_file._ends == {END}


def test_a_minimum_length_applies_to_every_end_token(folder: Path, load: Load) -> None:
    make_likely(folder, "<|im_end|>")
    set_to(folder, eos_token_id=PADDING, min_new_tokens=4)
    assert generate_text(load(folder, Task.IMAGE_TO_TEXT)).completion_tokens == 5
