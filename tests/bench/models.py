"""Accuracy of the demonstration models: `python -m tests.bench.models`.

Every prompt has a combination of colour, shape and background that is not in the training data.
`tests.support.pixel_checker` reads the scene from the pixels of an image. A description is compared
with the one correct sentence. The models run as in the daemon.
"""

import importlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import click

from consumer.runners import ModelConfig, ModelRunner, create_runner
from consumer.runners.demonstration import folder_of
from consumer.runners.demonstration.training.prompts import prompt
from consumer.runners.demonstration.training.scenes import (
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    draw,
    some_held_out_scene,
)
from consumer.runners.demonstration.training.sentences import description
from consumer.runners.task_settings import runner_spec
from generation_contracts import ImageToTextRequest, Task, TextToImageRequest
from tests.support.model_runs import run_model
from tests.support.pixel_checker import read_scene, same_scene

if TYPE_CHECKING:
    from PIL.Image import Image

SEED = 2_026  # of the scenes, the prompts and the images
# Sentences with words that are not in the training data.
OTHER_WORDS = (
    "could you sketch {thing} {background} {place} for my website?",
    "we'd love to see {thing}, {place}, {background}",
    "{thing} located {place} and placed {background}, high quality",
)
TIMED = 10  # images
_LIBRARIES = {
    Task.TEXT_TO_IMAGE: "consumer.runners.text_to_image.diffusion",
    Task.IMAGE_TO_TEXT: "consumer.runners.image_to_text.vision_language",
}
QUESTIONS = ("Describe this picture.", "What do you see?", "Describe this image in one sentence.")


@dataclass(frozen=True)
class Bar:
    """One line of the table: number of correct cases, number of cases, required share."""

    name: str
    right: int
    of: int
    least: float | None = None  # the required share

    @property
    def passed(self) -> bool:
        """Whether the share reaches the bar."""
        return self.least is None or self.right >= self.least * self.of

    def __str__(self) -> str:
        bar = (
            ""
            if self.least is None
            else f"  bar {self.least:.0%}  {'ok' if self.passed else 'MISSED'}"
        )
        return f"{self.name:<58} {self.right:>4} of {self.of:<4} {self.right / self.of:>6.1%}{bar}"


class Bench:
    """Both models, loaded as in a daemon.

    Args:
        models: A folder with `text_to_image` and `image_to_text`; None for the shipped ones.
    """

    def __init__(self, models: Path | None) -> None:
        self.seconds: dict[str, float] = {}  # of loading, without the import of libraries
        self._generates = self._loaded(Task.TEXT_TO_IMAGE, models)
        self._describes = self._loaded(Task.IMAGE_TO_TEXT, models)

    def image(self, prompt_text: str, seed: int, **parameters: float) -> "Image":
        """Generate an image for a prompt."""
        request = TextToImageRequest(prompt=prompt_text, seed=seed, **parameters)
        output = run_model(self._generates, request, (), on_step=_ignore, cancelled=_never)
        return output.images[0].image

    def text(self, images: Sequence["Image"], question: str) -> str:
        """Generate the text for a question about images."""
        request = ImageToTextRequest(prompt=question, images=("s3://bucket/key",) * len(images))
        output = run_model(self._describes, request, images, on_step=_ignore, cancelled=_never)
        return "" if output.text is None else output.text.text

    def close(self) -> None:
        """Close both models."""
        self._generates.close()
        self._describes.close()

    def _loaded(self, task: Task, models: Path | None) -> ModelRunner:
        importlib.import_module(_LIBRARIES[task])
        # Use the defaults of the shipped models; a folder alone would get those of its family.
        config = (
            ModelConfig()
            if models is None
            else ModelConfig(
                model_id=str(models / task), defaults=runner_spec(task).demonstration or {}
            )
        )
        runner = create_runner(task, config)
        began = time.monotonic()
        runner.load()
        self.seconds[task] = time.monotonic() - began
        return runner


def _ignore(*_: int) -> None:
    pass


def _never() -> bool:
    return False


def measure(bench: Bench, number: int, **parameters: float) -> list[Bar]:
    """Measure every bar except the autoencoder with this number of prompts."""
    choice = random.Random(SEED)
    alone = [some_held_out_scene(choice, two=False) for _ in range(number)]
    pairs = [some_held_out_scene(choice, two=True) for _ in range(number // 2)]
    generated = [bench.image(prompt(s, choice), n, **parameters) for n, s in enumerate(alone)]
    of_two = [bench.image(prompt(s, choice), n, **parameters) for n, s in enumerate(pairs)]
    other = [
        bench.image(_in_other_words(s, choice), n, **parameters)
        for n, s in enumerate(alone[: number // 2])
    ]
    shown = [read_scene(image) for image in generated]
    descriptions = [bench.text([image], choice.choice(QUESTIONS)) for image in generated]
    descriptions_of_pairs = [bench.text([image], choice.choice(QUESTIONS)) for image in of_two]
    drawn_scenes = [(scene, draw(scene, choice)) for scene in alone + pairs]
    descriptions_of_drawn = [
        bench.text([image], choice.choice(QUESTIONS)) for _, image in drawn_scenes
    ]

    def right(get: Callable[[Scene], object]) -> int:
        return sum(s is not None and get(s) == get(w) for s, w in zip(shown, alone, strict=True))

    everything_right = _right(generated, alone)
    readable = [(s, t) for s, t in zip(shown, descriptions, strict=True) if s is not None]
    return [
        Bar("images: background", right(lambda s: s.background), number),
        Bar("images: colour", right(lambda s: s.things[0].colour), number),
        Bar("images: shape", right(lambda s: s.things[0].shape), number),
        Bar("images: position", right(lambda s: s.place), number),
        Bar("images: size", right(lambda s: s.things[0].size), number),
        Bar("images: colours, shape and position together", right(_without_size), number, 0.95),
        Bar("images: colours, shape, position and size together", everything_right, number),
        Bar("images: two shapes and their relation", _right(of_two, pairs), len(pairs)),
        Bar("images: prompts with words not in the training", _right(other, alone), len(other)),
        Bar(
            "descriptions: drawn images, word for word",
            sum(_says(t, s) for t, (s, _) in zip(descriptions_of_drawn, drawn_scenes, strict=True)),
            len(drawn_scenes),
            0.95,
        ),
        Bar(
            "descriptions: generated images, word for word",
            sum(_says(text, scene) for scene, text in readable),
            len(readable),
            0.90,
        ),
        Bar(
            "round trip: prompt to image to description",
            sum(_says(text, scene) for text, scene in zip(descriptions, alone, strict=True)),
            number,
            0.90,
        ),
        Bar(
            "round trip: two shapes",
            sum(
                _says(text, scene) for text, scene in zip(descriptions_of_pairs, pairs, strict=True)
            ),
            len(pairs),
        ),
    ]


def measure_unsaid(bench: Bench) -> list[Bar]:
    """Measure prompts of a colour and a shape, which mean medium size, centered on white."""
    prompts = [
        (f"{'an' if colour == 'orange' else 'a'} {colour} {shape}", Thing(colour, shape))
        for colour, shape in product(COLOURS, SHAPES)
        if colour != "white"
    ]
    shown = [(read_scene(bench.image(text, n)), thing) for n, (text, thing) in enumerate(prompts)]
    found = [(scene, thing) for scene, thing in shown if scene is not None]
    of_the_kind = [
        (scene, thing)
        for scene, thing in found
        if (scene.things[0].colour, scene.things[0].shape) == (thing.colour, thing.shape)
    ]
    as_meant = sum(scene == Scene("white", (thing,)) for scene, thing in of_the_kind)
    return [
        Bar("images: only a colour and a shape in the prompt", len(of_the_kind), len(prompts)),
        Bar("images: of these, centered on white", as_meant, len(prompts)),
    ]


def measure_autoencoder(models: Path | None, number: int) -> Bar:
    """Measure drawn images after the autoencoder alone: the upper bound for generated images."""
    torch = importlib.import_module("torch")
    images = importlib.import_module("PIL.Image")
    diffusers = importlib.import_module("diffusers")
    autoencoder = importlib.import_module("consumer.runners.demonstration.training.autoencoder")
    pixels = importlib.import_module("consumer.runners.demonstration.training.pixels")
    task = Task.TEXT_TO_IMAGE
    folder = folder_of(task) if models is None else models / task
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").float().eval()
    choice = random.Random(SEED)
    scenes = [some_held_out_scene(choice, two=False) for _ in range(number)]
    drawn = pixels.tensors([draw(scene, choice) for scene in scenes])
    with torch.inference_mode():
        back = vae.decode(autoencoder.encoded(vae, drawn)).sample
    bytes_ = ((back + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    right = _right([images.fromarray(one) for one in bytes_], scenes)
    return Bar("autoencoder: drawn images, encoded and decoded", right, number)


def _without_size(scene: Scene) -> object:
    return scene.background, scene.place, [(t.colour, t.shape) for t in scene.things]


def _right(images: "Sequence[Image]", scenes: Sequence[Scene]) -> int:
    shown = [read_scene(image) for image in images]
    return sum(s is not None and same_scene(s, w) for s, w in zip(shown, scenes, strict=False))


def _says(text: str, scene: Scene) -> bool:
    return text == description(scene)


def _in_other_words(scene: Scene, choice: random.Random) -> str:
    sentence = description(scene).removesuffix(".")
    thing, rest = sentence.split(" on ", 1)
    background, place = rest.split(" background ", 1)
    return choice.choice(OTHER_WORDS).format(
        thing=thing[0].lower() + thing[1:], background=f"on {background} background", place=place
    )


@click.command()
@click.option(
    "--models", type=click.Path(path_type=Path), help="default: the weights of the package"
)
@click.option("--number", default=400, show_default=True, help="number of prompts")
@click.option("--steps", type=int)
@click.option("--guidance", type=float)
def main(models: Path | None, number: int, steps: int | None, guidance: float | None) -> None:
    """Print the accuracy of the demonstration models; exit with 1 when a bar is missed."""
    parameters = {"num_inference_steps": steps, "guidance_scale": guidance}
    bench = Bench(models)
    bars = [measure_autoencoder(models, number)]
    bars += measure(bench, number, **{k: v for k, v in parameters.items() if v is not None})
    bars += measure_unsaid(bench)
    for bar in bars:
        click.echo(bar)
    quick = [_quick(f"loading {task}", seconds, 2.0) for task, seconds in bench.seconds.items()]
    began = time.monotonic()
    for number_of in range(TIMED):
        bench.image("a red circle", number_of)
    quick.append(_quick("one image, on one core", (time.monotonic() - began) / TIMED, 1.0))
    sys.exit(0 if all(quick) and all(bar.passed for bar in bars) else 1)


def _quick(name: str, seconds: float, most: float) -> bool:
    click.echo(
        f"{name:<58} {seconds:.2f} s  bar {most:g} s  {'ok' if seconds < most else 'MISSED'}"
    )
    return seconds < most


if __name__ == "__main__":
    main()
