"""Warnings for prompts with words that a demonstration model does not know.

The models know the words of their small world. Any other word is a sequence of bytes to them, and
the output does not depend on its meaning.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from consumer.ports.model import RunnerOutput, RunRequest
from consumer.runners.demonstration import folder_of
from consumer.runners.runner import ModelRunner
from generation_contracts import Request, Task

# Words, numbers and single symbols; an emoji is a symbol.
_WORDS = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")
_WORLD = {
    Task.TEXT_TO_IMAGE: 'it draws coloured shapes, for example "a red circle on a blue background"',
    Task.IMAGE_TO_TEXT: "it describes images of coloured shapes",
}


class DemonstrationRunner(ModelRunner):
    """The runner of a demonstration model: a prompt with unknown words adds a warning."""

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> Sequence[RunnerOutput | None]:
        """Run the model once; see `consumer.ports.model.Runner.run`."""
        outputs = super().run(runs, save_memory=save_memory)
        return [
            None
            if output is None
            else replace(output, warnings=output.warnings + warnings(run.request))
            for run, output in zip(runs, outputs, strict=True)
        ]


def warnings(request: Request) -> tuple[str, ...]:
    """Return the warning about the unknown words of a request; it quotes nothing of the prompt."""
    task = request.task
    unknown, words = count_unknown_words(task, str(getattr(request, "prompt", "")))
    if not unknown:
        return ()
    counts = f"{unknown} of the {words} words of the prompt"
    return (f"the demonstration model does not know {counts}; {_WORLD[task]}",)


def count_unknown_words(task: Task, prompt: str) -> tuple[int, int]:
    """Return how many words of a prompt the task's model does not know, and how many it has.

    A run of letters or digits is a word, and so is a symbol that is not ASCII. Repeated words count
    each time.
    """
    found = [
        word for word in _WORDS.findall(prompt.lower()) if word.isalnum() or not word.isascii()
    ]
    known = _known_words(task)
    return sum(word not in known for word in found), len(found)


@functools.cache
def _known_words(task: Task) -> frozenset[str]:
    """Return the words that are one token of the task's tokenizer, in lower case."""
    folder = folder_of(task)
    if task is Task.TEXT_TO_IMAGE:
        # CLIP marks the token that ends a word. Other tokens are parts of words.
        tokens = _vocabulary(folder / "tokenizer")
        words = {token.removesuffix("</w>") for token in tokens if token.endswith("</w>")}
    else:  # Qwen's tokens begin with the space or hyphen before the word
        words = {token.lstrip("Ġ-").lower() for token in _vocabulary(folder)}
    # Each single letter is a token, because all bytes are. Two of them are words.
    return frozenset(word for word in words if word.isalpha() and (len(word) > 1 or word in "ai"))


def _vocabulary(folder: Path) -> Iterable[str]:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens: dict[str, int] = document["model"]["vocab"]
    return tokens
