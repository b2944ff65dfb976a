"""The warning of the demonstration models about words that they do not know."""

import pytest

from consumer.ports.model import RunnerOutput
from consumer.runners import ModelConfig, ModelRunner, create_runner
from consumer.runners.demonstration.known_words import count_unknown_words, warnings
from consumer.runners.demonstration.training.words import every_word
from generation_contracts import Task, TextToImageRequest
from generation_contracts.base import DEFAULT_QUEUES
from tests.support.model_runs import run_request


@pytest.mark.parametrize(
    ("prompt", "unknown", "words"),
    [
        ("a small red star on a white background at the top", 0, 11),
        ("A RED circle!", 0, 3),
        ("Obama on a bicycle", 2, 4),
        ("一个红色的圆圈", 1, 1),
        ("🔴 on ⬜ 🎉", 3, 4),
        ("3 red circles", 2, 3),
        ("x", 1, 1),
    ],
    ids=["known", "capitals", "other words", "Chinese", "emoji", "number and plural", "a letter"],
)
def test_unknown_words_of_an_image_prompt_are_counted(
    prompt: str, unknown: int, words: int
) -> None:
    assert count_unknown_words(Task.TEXT_TO_IMAGE, prompt) == (unknown, words)


@pytest.mark.parametrize("task", DEFAULT_QUEUES)
def test_every_word_of_the_training_is_known(task: Task) -> None:
    unknown = [text for text in every_word() if count_unknown_words(task, text)[0]]
    assert unknown == []


def test_a_warning_counts_the_unknown_words_and_quotes_none() -> None:
    assert warnings(TextToImageRequest(prompt="a red circle")) == ()
    (warning,) = warnings(TextToImageRequest(prompt="a secret"))
    assert warning == (
        "the demonstration model does not know 1 of the 2 words of the prompt; it draws coloured "
        'shapes, for example "a red circle on a blue background"'
    )


def test_only_the_outputs_of_requests_with_unknown_words_have_the_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outputs = (RunnerOutput(warnings=("first",)), RunnerOutput(warnings=("first",)), None)
    monkeypatch.setattr(ModelRunner, "run", lambda *_, **__: outputs)
    runs = [
        run_request(TextToImageRequest(prompt=prompt))
        for prompt in ("a red circle", "a secret", "a secret")
    ]
    known, unknown, cancelled = create_runner(Task.TEXT_TO_IMAGE, ModelConfig()).run(runs)
    assert known is not None
    assert unknown is not None
    assert known.warnings == ("first",)
    assert unknown.warnings == ("first", *warnings(TextToImageRequest(prompt="a secret")))
    assert cancelled is None
