"""The vocabularies of the tokenizers: whole words of the training texts, and bytes."""

import itertools
import json
import random
from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from consumer.runners.demonstration.training.prompts import prompt, vague_prompt
from consumer.runners.demonstration.training.questions import (
    ask_about,
    ask_about_two,
    ask_for_description,
)
from consumer.runners.demonstration.training.scenes import single_scenes, some_scene

_SCENES = 4_000  # number of sampled scenes

# The printable characters that stand for the 256 bytes in byte-level tokenizers.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def merges(
    texts: Iterable[str], split: pre_tokenizers.PreTokenizer, *, end_of_word: str = ""
) -> Any:
    """Return the BPE merges, in order, with which every word of the sentences is one token.

    Args:
        texts: The sentences.
        split: Splits a sentence into words.
        end_of_word: The suffix that CLIP's tokenizer adds to a word.
    """
    model = models.BPE()
    model.end_of_word_suffix = end_of_word or None
    learner = tokenizers.Tokenizer(model)
    learner.pre_tokenizer = split
    words = sorted({word for sentence in texts for word in sentence.split(" ")})
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # no limit: the training ends when no pairs are left
        min_frequency=1,
        initial_alphabet=BYTES,
        end_of_word_suffix=end_of_word,
        show_progress=False,
    )
    learner.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    return [(first, second) for first, second in learned]


def vocabulary(joined: Iterable[tuple[str, str]], alphabet: Iterable[str]) -> dict[str, int]:
    """Return the id of each token: the alphabet first, then the results of the merges."""
    pieces = dict.fromkeys(alphabet)
    pieces |= dict.fromkeys(first + second for first, second in joined)
    return {piece: number for number, piece in enumerate(pieces)}


def every_word() -> list[str]:
    """Return a sample of the training texts, from which the tokenizers learn their words."""
    choice = random.Random(0)
    scenes = [some_scene(choice, of_two=0.5) for _ in range(_SCENES)]
    scenes += list(single_scenes())[::7]
    texts = [prompt(scene, choice) for scene in scenes]
    texts += [vague_prompt(scene, choice) for scene in scenes[:1000]]
    for scene, other in itertools.pairwise(scenes):
        for question in (
            ask_for_description(scene, choice),
            ask_about(scene, choice),
            ask_about_two((scene, other), choice),
        ):
            texts += [question.question, question.answer]
    return texts
