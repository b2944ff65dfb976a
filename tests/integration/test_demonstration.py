"""The models that ship with the package generate images and texts of acceptable quality.

`tests.bench.models` measures the quality with many prompts and strict bounds. These tests use few
prompts and loose bounds.
"""

import random
import zipfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
from PIL import Image

from consumer.runners.demonstration import folder_of
from consumer.runners.demonstration.training.scenes import SHAPES, Scene, Thing, draw
from consumer.runners.demonstration.training.sentences import description
from generation_contracts import Task
from generation_contracts.base import DEFAULT_QUEUES
from tests.bench.models import Bench, measure, measure_autoencoder
from tests.contracts.test_wheel import uv
from tests.support.pixel_checker import read_scene

MAX_BYTES = 10_000_000  # of the weights of both models


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    yield (loaded := Bench(None))
    loaded.close()


def test_both_models_are_small_and_only_in_safetensors() -> None:
    files = [
        file for task in DEFAULT_QUEUES for file in folder_of(task).rglob("*") if file.is_file()
    ]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 6
    assert sum(file.stat().st_size for file in weights) < MAX_BYTES
    texts = [file.read_text("utf-8") for file in files if file.suffix == ".json"]
    # No file contains a path of the machine that trained the models.
    assert not any('"_name_or_path": "/' in text for text in texts)
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".jinja"}


def test_images_and_descriptions_reach_the_bounds(bench: Bench) -> None:
    for bar in measure(bench, 6):
        if bar.least is not None:
            assert bar.right >= bar.least * bar.of - 1, str(bar)


def test_the_bench_can_load_the_models_from_a_folder(bench: Bench) -> None:
    folder = Bench(folder_of(Task.TEXT_TO_IMAGE).parent)
    images = [models.image("a red circle", 1).tobytes() for models in (bench, folder)]
    folder.close()
    assert images[0] == images[1]


def test_the_autoencoder_reproduces_unknown_colours() -> None:
    """An autoencoder that was trained with ten colours only returned red on gray as orange."""
    bar = measure_autoencoder(None, 40)
    assert bar.right >= 38, str(bar)


def test_the_prompt_of_the_demonstration_gives_its_image_and_description(bench: Bench) -> None:
    prompt = "a small red star on a white background at the top"
    scene = Scene("white", (Thing("red", "star", "small"),), "top")
    images = [bench.image(prompt, seed) for seed in range(3)]
    texts = [bench.text([image], "Describe this picture.") for image in images]
    # The checker is stricter than the eye with a star of twelve pixels.
    assert sum(read_scene(image) == scene for image in images) >= 2
    assert sum(text == description(scene) for text in texts) >= 2


def test_a_shape_without_a_place_is_in_the_center_on_white(bench: Bench) -> None:
    things = [Thing(colour, shape) for colour, shape in zip(cycle(("red", "black")), SHAPES)]
    images = [bench.image(f"a {t.colour} {t.shape}", n) for n, t in enumerate(things)]
    expected = [Scene("white", (thing,)) for thing in things]
    right = sum(read_scene(p) == scene for p, scene in zip(images, expected, strict=True))
    assert right >= len(things) - 1


def test_another_seed_gives_another_image_of_the_same_scene(bench: Bench) -> None:
    first, second = (bench.image("a blue square", seed) for seed in (1, 2))
    assert first.tobytes() != second.tobytes()
    assert read_scene(first) == read_scene(second) == Scene("white", (Thing("blue", "square"),))


def test_a_negative_prompt_excludes_a_colour(bench: Bench) -> None:
    """A prompt without a colour gives any colour, except one in the negative prompt."""
    colours = {}
    for negative in ("", "red"):
        scenes = [
            read_scene(bench.image("a circle", n, negative_prompt=negative)) for n in range(5)
        ]
        colours[negative] = {scene.things[0].colour for scene in scenes if scene is not None}
    assert len(colours[""]) > 1
    assert "red" not in colours["red"]


def test_guidance_makes_an_image_follow_its_prompt(bench: Bench) -> None:
    scene = Scene("green", (Thing("pink", "heart", "large"),), "left")
    prompt = "a large pink heart on a green background on the left"
    images = {scale: bench.image(prompt, 5, guidance_scale=scale) for scale in (0.0, 4.0)}
    assert read_scene(images[4.0]) == scene
    assert images[0.0].tobytes() != images[4.0].tobytes()


def test_questions_about_details_are_answered(bench: Bench) -> None:
    scene = Scene("yellow", (Thing("purple", "cross", "large"),), "bottom right")
    image = draw(scene, random.Random(0))
    answers = {
        "What colour is the cross?": "The cross is purple.",
        "What color is the background?": "The background is yellow.",
        "What shape is it?": "The shape is a cross.",
        "Where is the cross?": "The cross is in the bottom right corner.",
        "Is there a circle?": "No, there is not a circle.",
        "How many shapes are there?": "There is one shape.",
    }
    texts = {question: bench.text([image], question) for question in answers}
    wrong = {question for question in answers if texts[question] != answers[question]}
    assert len(wrong) <= 1, texts


def test_two_images_in_one_request_are_distinguished(bench: Bench) -> None:
    scenes = [
        Scene("white", (Thing("red", "circle"),)),
        Scene("black", (Thing("yellow", "star", "large"),), "top"),
    ]
    images = [draw(scene, random.Random(1)) for scene in scenes]
    for ordered, nth in ((images, "second"), (images[::-1], "first")):
        assert bench.text(ordered, "Which picture has a star?") == f"The {nth} picture."
    assert bench.text(images, "Describe both pictures.") == (
        "The first picture: a red circle on a white background in the center. "
        "The second picture: a large yellow star on a black background at the top."
    )


def test_a_larger_image_is_described(bench: Bench) -> None:
    scene = Scene("blue", (Thing("orange", "triangle"),), "top left")
    large = draw(scene, random.Random(2)).resize((1024, 1024), Image.Resampling.BICUBIC)
    assert bench.text([large], "What is this?") == description(scene)


def test_the_wheel_contains_both_models(tmp_path: Path) -> None:
    uv("build", "--package", "generation-consumer", "--wheel", "-o", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    for task in DEFAULT_QUEUES:
        folder = folder_of(task)
        for file in folder.rglob("*"):
            name = f"consumer/runners/demonstration/{task}/{file.relative_to(folder).as_posix()}"
            assert file.is_dir() or name in names, name
    assert "consumer/runners/demonstration/README.md" in names
