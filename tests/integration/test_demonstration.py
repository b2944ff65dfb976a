"""The models that ship with the package draw and describe; `tests.bench.models` measures how well.

Here are a few prompts each, and bounds that chance does not miss: the bench has the bars.
"""

import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from consumer.runners.demonstration import folder_of
from consumer.runners.demonstration.training.scenes import SHAPES, Scene, Thing, draw
from consumer.runners.demonstration.training.sentences import description
from generation_contracts import Task
from tests.bench.models import Bench, measure, measure_autoencoder
from tests.contracts.test_wheel import uv
from tests.support.pixel_checker import read_scene

MOST_BYTES = 10_000_000  # of both models' weights


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    yield (loaded := Bench(None))
    loaded.close()


def test_both_models_are_small_and_in_safetensors_only() -> None:
    files = [file for task in Task for file in folder_of(task).rglob("*") if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 6
    assert sum(file.stat().st_size for file in weights) < MOST_BYTES
    texts = [file.read_text("utf-8") for file in files if file.suffix == ".json"]
    assert not any('"_name_or_path": "/' in text for text in texts)  # of whoever trained them
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".jinja"}


def test_pictures_and_descriptions_are_right(bench: Bench) -> None:
    for bar in measure(bench, 12):
        if bar.least is not None:
            assert bar.right >= bar.least * bar.of - 2, str(bar)


def test_a_folder_of_weights_is_measured_as_if_it_were_shipped(bench: Bench) -> None:
    folder = Bench(folder_of(Task.TEXT_TO_IMAGE).parent)
    pictures = [models.picture("a red circle", 1).tobytes() for models in (bench, folder)]
    folder.close()
    assert pictures[0] == pictures[1]


def test_the_autoencoder_keeps_what_it_has_never_seen() -> None:
    """Red on gray came back in orange from one that was trained on the ten colours alone."""
    bar = measure_autoencoder(None, 100)
    assert bar.right >= 97, str(bar)


def test_the_prompt_of_the_demonstration_is_drawn_and_described(bench: Bench) -> None:
    wanted = "a small red star on a white background at the top"
    scene = Scene("white", (Thing("red", "star", "small"),), "top")
    pictures = [bench.picture(wanted, seed) for seed in range(6)]
    told = [bench.text([picture], "Describe this picture.") for picture in pictures]
    # The checker wants more of a star of twelve pixels than the eye does.
    assert sum(read_scene(picture) == scene for picture in pictures) >= 5
    assert sum(text == description(scene) for text in told) >= 5


def test_a_thing_alone_means_it_in_the_center_on_white(bench: Bench) -> None:
    things = [Thing(colour, shape) for colour in ("red", "black") for shape in SHAPES]
    pictures = [bench.picture(f"a {t.colour} {t.shape}", n) for n, t in enumerate(things)]
    meant = [Scene("white", (thing,)) for thing in things]
    right = sum(read_scene(p) == scene for p, scene in zip(pictures, meant, strict=True))
    assert right >= len(things) - 2


def test_another_seed_is_another_picture_of_the_same(bench: Bench) -> None:
    first, second = (bench.picture("a blue square", seed) for seed in (1, 2))
    assert first.tobytes() != second.tobytes()
    assert read_scene(first) == read_scene(second) == Scene("white", (Thing("blue", "square"),))


def test_a_negative_prompt_keeps_away_what_it_names(bench: Bench) -> None:
    """Without a colour in the prompt any may come; named in the negative prompt it does not."""
    colours = {}
    for negative in ("", "red"):
        shown = [
            read_scene(bench.picture("a circle", n, negative_prompt=negative)) for n in range(8)
        ]
        colours[negative] = {scene.things[0].colour for scene in shown if scene is not None}
    assert len(colours[""]) > 2
    assert "red" not in colours["red"]


def test_guidance_makes_a_picture_follow_its_prompt(bench: Bench) -> None:
    scene = Scene("green", (Thing("pink", "heart", "large"),), "left")
    wanted = "a large pink heart on a green background on the left"
    pictures = {scale: bench.picture(wanted, 5, guidance_scale=scale) for scale in (0.0, 4.0)}
    assert read_scene(pictures[4.0]) == scene
    assert pictures[0.0].tobytes() != pictures[4.0].tobytes()


def test_questions_about_details_are_answered(bench: Bench) -> None:
    scene = Scene("yellow", (Thing("purple", "cross", "large"),), "bottom right")
    picture = draw(scene, random.Random(0))
    answers = {
        "What colour is the cross?": "The cross is purple.",
        "What color is the background?": "The background is yellow.",
        "What shape is it?": "The shape is a cross.",
        "Where is the cross?": "The cross is in the bottom right corner.",
        "Is there a circle?": "No, there is not a circle.",
        "How many shapes are there?": "There is one shape.",
    }
    given = {question: bench.text([picture], question) for question in answers}
    wrong = {question for question in answers if given[question] != answers[question]}
    assert len(wrong) <= 1, given


def test_two_pictures_in_one_request_are_told_apart(bench: Bench) -> None:
    scenes = [
        Scene("white", (Thing("red", "circle"),)),
        Scene("black", (Thing("yellow", "star", "large"),), "top"),
    ]
    pictures = [draw(scene, random.Random(1)) for scene in scenes]
    for ordered, nth in ((pictures, "second"), (pictures[::-1], "first")):
        assert bench.text(ordered, "Which picture has a star?") == f"The {nth} picture."
    assert bench.text(pictures, "Describe both pictures.") == (
        "The first picture: a red circle on a white background in the center. "
        "The second picture: a large yellow star on a black background at the top."
    )


def test_a_larger_picture_is_described_as_well(bench: Bench) -> None:
    scene = Scene("blue", (Thing("orange", "triangle"),), "top left")
    large = draw(scene, random.Random(2)).resize((1024, 1024), Image.Resampling.BICUBIC)
    assert bench.text([large], "What is this?") == description(scene)


def test_the_wheel_has_both_models(tmp_path: Path) -> None:
    uv("build", "--package", "generation-consumer", "--wheel", "-o", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    for task in Task:
        folder = folder_of(task)
        for file in folder.rglob("*"):
            name = f"consumer/runners/demonstration/{task}/{file.relative_to(folder).as_posix()}"
            assert file.is_dir() or name in names, name
    assert "consumer/runners/demonstration/README.md" in names
