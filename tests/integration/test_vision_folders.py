"""Folders of vision-language models: incomplete ones, and those of other versions and tools.

A folder that cannot answer a request is refused at the start, in one line. Settings that a folder
has in several files, or in an old format, are read from all of them.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from consumer.ports.model import UnsupportedParameter
from consumer.runners import ModelRunner
from generation_contracts import ImageToTextRequest, Task
from tests.integration.small_runs import load_error
from tests.support.model_runs import run_model
from tests.support.tiny_models import Folder, Load

WEIGHTS = "model.safetensors"
Change = Callable[[Path], None]


@pytest.fixture
def folder(own_folder: Folder) -> Iterator[Path]:
    path = own_folder("vision_language")
    yield path
    shutil.rmtree(path)


def edited(name: str, **values: Any) -> Change:
    """Set keys of a JSON file, or remove those whose value is None."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        remaining = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(remaining))

    return change


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def holding(name: str, content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def generate_text(runner: ModelRunner, *images: Image.Image, **fields: Any) -> Any:
    sources = tuple(f"s3://inputs/{number}.png" for number in range(len(images)))
    request = ImageToTextRequest(
        **{"prompt": "What is this?", "images": sources, "max_new_tokens": 6, **fields}
    )
    output = run_model(runner, request, images)
    assert output.text is not None
    return output.text


def image(*size: int) -> Image.Image:
    return Image.new("RGB", size or (60, 60), "red")


# -- unusable folders -----------------------------------------------------------------------------


def in_two_files(folder: Path) -> None:
    tensors = importlib.import_module("safetensors.torch")
    weights = tensors.load_file(folder / WEIGHTS)
    files = {name: f"model-0000{1 + (name > 'model.m')}-of-00002.safetensors" for name in weights}
    for file in set(files.values()):
        part = {name: weights[name] for name in weights if files[name] == file}
        tensors.save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def without_a_shard(folder: Path) -> None:
    in_two_files(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def with_a_torn_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def renamed(rename: Callable[[str], str | None]) -> Change:
    """Rename the weights; a weight whose new name is None is removed."""

    def change(folder: Path) -> None:
        tensors = importlib.import_module("safetensors.torch")
        weights = tensors.load_file(folder / WEIGHTS)
        named = {rename(name): tensor.clone() for name, tensor in weights.items()}
        named.pop(None, None)
        tensors.save_file(named, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def with_another_layer(folder: Path) -> None:
    tensors = importlib.import_module("safetensors.torch")
    weights = tensors.load_file(folder / WEIGHTS)
    last = {n.replace("layers.1.", "layers.2."): w.clone() for n, w in weights.items()}
    tensors.save_file({**last, **weights}, folder / WEIGHTS, metadata={"format": "pt"})


def with_another_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    last = max(content["added_tokens"], key=lambda token: int(token["id"]))
    new = {**last, "id": last["id"] + 1, "content": "<new>", "special": False}
    path.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], new]}))


def with_the_vocabulary_alone(folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer.json").unlink()


def as_preprocessor(**values: Any) -> Change:
    """Write the image settings as versions of transformers before 5 do."""

    def change(folder: Path) -> None:
        (folder / "processor_config.json").unlink()
        sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
        kind = {"image_processor_type": "Qwen2VLImageProcessor"}
        names = {"processor_class": "Qwen2_5_VLProcessor"}
        content = {**kind, **names, **sizes, **values}
        (folder / "preprocessor_config.json").write_text(json.dumps(content))

    return change


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(without("config.json"), "there is no config.json in it", id="config"),
        pytest.param(without("tokenizer.json"), "tokenizer has no vocabulary", id="tokenizer"),
        pytest.param(with_the_vocabulary_alone, "`vocab` and `merges`", id="merges"),
        pytest.param(
            without("processor_config.json"), "there is no preprocessor_config.json", id="processor"
        ),
        pytest.param(
            without("chat_template.jinja"), "its processor has no chat template", id="template"
        ),
        pytest.param(without(WEIGHTS), "no weights in safetensors files", id="weights"),
        pytest.param(without_a_shard, "model-00002-of-00002.safetensors", id="shard"),
        pytest.param(with_a_torn_file, "file not fully covered", id="torn weights"),
        pytest.param(
            holding("generation_config.json", b'{"eos_'),
            "generation_config.json is not a JSON object",
            id="torn generation settings",
        ),
        pytest.param(holding(WEIGHTS, LFS), f"{WEIGHTS} is a Git LFS pointer", id="lfs"),
        pytest.param(
            holding("tokenizer.json", LFS),
            "tokenizer.json is a Git LFS pointer",
            id="lfs tokenizer",
        ),
        pytest.param(
            renamed(lambda name: None if "lm_head" in name else name),
            "1 weights are missing, such as lm_head.weight",
            id="head",
        ),
        pytest.param(
            renamed(lambda name: f"base_model.{name}"), "57 weights are missing", id="prefix"
        ),
        pytest.param(with_another_layer, "has no place for 12 weights", id="layers"),
        pytest.param(
            with_another_token,
            "its tokenizer has tokens up to number 270, its embeddings end at 269",
            id="embeddings",
        ),
        pytest.param(
            holding("chat_template.jinja", b"{{ messages[0].content[-1].text }}"),
            "no place for images",
            id="template without images",
        ),
        pytest.param(
            holding("chat_template.jinja", b"{{ raise_exception('not so') }}"),
            "cannot be loaded: not so",
            id="template that raises",
        ),
        pytest.param(
            holding("chat_template.jinja", b"{{ messages[0].content + '' }}"),
            "cannot be loaded: ",
            id="template for strings",
        ),
        pytest.param(
            edited("config.json", is_encoder_decoder=True),
            "qwen2_5_vl is an encoder-decoder model",
            id="encoder-decoder",
        ),
        pytest.param(
            edited("config.json", image_token_id=5),
            "Image features and image tokens do not match",
            id="image token",
        ),
        pytest.param(
            edited("config.json", model_type="other_vl", auto_map={"AutoConfig": "code.Config"}),
            "code that comes with a model is never run",
            id="code of the model",
        ),
        pytest.param(
            edited(
                "processor_config.json",
                processor_class="P",
                auto_map={"AutoProcessor": "code.P"},
            ),
            "is never run",
            id="code of the processor",
        ),
        pytest.param(
            edited("config.json", quantization_config={"quant_method": "new"}),
            "quantization new is",
            id="unknown quantization",
        ),
        pytest.param(
            edited("config.json", quantization_config={"quant_method": "awq"}), "AWQ", id="awq"
        ),
        pytest.param(
            edited(
                "config.json",
                _attn_implementation={"vision_config": "kernels-community/flash-attn"},
            ),
            "config.json: _attn_implementation: must be one of eager, sdpa",
            id="attention of the hub",
        ),
        pytest.param(
            edited("config.json", _attn_implementation="flash_attention_2"),
            "config.json: _attn_implementation: the package flash-attn is not installed",
            id="attention without its package",
        ),
        pytest.param(as_preprocessor(merge_size=3), "cannot be loaded", id="merge size"),
        pytest.param(as_preprocessor(patch_size=16), "cannot be loaded", id="patch size"),
        pytest.param(
            as_preprocessor(temporal_patch_size=1), "cannot be loaded", id="temporal patch size"
        ),
    ],
)
def test_an_unusable_folder_is_refused(change: Change, message: str, folder: Path) -> None:
    change(folder)
    line = load_error(folder, Task.IMAGE_TO_TEXT)
    assert message in line
    assert line.startswith("vision_language: ")


@pytest.mark.parametrize(
    "change",
    [
        edited("config.json", perceiver_config={"_attn_implementation": "flash_attention_2"}),
        holding("demo.png", LFS),
    ],
    ids=["attention of a part", "LFS pointer of an unread file"],
)
def test_files_and_settings_that_transformers_does_not_read_are_ignored(
    change: Change, folder: Path, load: Load
) -> None:
    change(folder)
    assert generate_text(load(folder, Task.IMAGE_TO_TEXT), image())


# -- other layouts --------------------------------------------------------------------------------


TILE = 28**2  # pixels of a token
MIN_PIXELS, MAX_PIXELS = 4 * TILE, 20 * TILE


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}, id="top"),
        pytest.param(
            {"size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}}, id="edges"
        ),
        pytest.param({"size": {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}}, id="size"),
        pytest.param(
            {
                "min_pixels": MIN_PIXELS,
                "max_pixels": MAX_PIXELS,
                "size": {"min_pixels": MIN_PIXELS, "max_pixels": 9 * MAX_PIXELS},
            },
            id="both",
        ),
        pytest.param({"max_pixels": MAX_PIXELS, "do_resize": False}, id="no resizing"),
        pytest.param(
            {"max_pixels": MAX_PIXELS, "image_processor_type": "Qwen2VLImageProcessorFast"},
            id="fast",
        ),
    ],
)
def test_the_pixel_limits_of_the_model_are_applied(
    values: dict[str, Any], folder: Path, load: Load
) -> None:
    as_preprocessor(**values)(folder)
    runner = load(folder, Task.IMAGE_TO_TEXT)
    small, large = (generate_text(runner, image(side, side)).prompt_tokens for side in (56, 1000))
    assert large - small == 4 * 4 - 2 * 2  # the largest square of at most 20 tokens


def template_elsewhere(name: str, wrapped: Callable[[str], Any]) -> Change:
    def change(folder: Path) -> None:
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        if not (folder / name).exists():
            (folder / name).write_text("{}")
        edited(name, chat_template=wrapped(template))(folder)

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(template_elsewhere("chat_template.json", str), id="json"),
        pytest.param(template_elsewhere("processor_config.json", str), id="processor"),
        pytest.param(template_elsewhere("tokenizer_config.json", str), id="tokenizer"),
        pytest.param(
            template_elsewhere(
                "tokenizer_config.json", lambda text: [{"name": "default", "template": text}]
            ),
            id="list",
        ),
        pytest.param(edited("tokenizer_config.json", truncation=True, max_length=10), id="cut"),
        pytest.param(
            edited("tokenizer_config.json", padding="max_length", max_length=300), id="padded"
        ),
        pytest.param(edited("tokenizer_config.json", model_max_length=10), id="length"),
        pytest.param(
            edited(
                "tokenizer.json",
                truncation={
                    "direction": "Right",
                    "max_length": 10,
                    "strategy": "LongestFirst",
                    "stride": 0,
                },
            ),
            id="cut in the tokenizer",
        ),
    ],
)
def test_another_layout_of_a_model_gives_the_same_text(
    change: Change, folder: Path, load: Load, shared_runner: Callable[[str], ModelRunner]
) -> None:
    change(folder)
    expected = generate_text(shared_runner("vision_language"), image())
    assert generate_text(load(folder, Task.IMAGE_TO_TEXT), image()) == expected


# -- image sizes ----------------------------------------------------------------------------------


def test_narrow_and_tiny_images_are_read(folder: Path, load: Load) -> None:
    as_preprocessor(min_pixels=MIN_PIXELS, max_pixels=16_384 * TILE)(
        folder
    )  # the limits of Qwen2.5-VL
    runner = load(folder, Task.IMAGE_TO_TEXT, max_image_pixels=256 * TILE)
    alone = generate_text(runner, image(56, 56)).prompt_tokens - 4
    sizes = [(6000, 34), (34, 6000), (10_000, 50), (200, 1), (1, 1)]
    tokens_of_images = [generate_text(runner, image(*size)).prompt_tokens - alone for size in sizes]
    # The image processor would refuse 28x5992 pixels, because one side is 214 times the other.
    assert tokens_of_images == [214, 214, 226, 7, 4]


@dataclass
class OfSize:
    """An image without pixels."""

    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def resize(self, size: tuple[int, int]) -> "OfSize":
        return OfSize(*size)


@pytest.fixture(scope="module")
def image_budget() -> Any:
    """Return the module of the pixel budget, which imports torch."""
    return importlib.import_module("consumer.runners.image_to_text.image_budget")


tokens = st.integers(1, 2000)
sides = st.integers(1, 20_000)


@given(st.tuples(sides, sides), tokens, tokens, st.integers(-500, 500))
def test_every_image_fits_the_budget(
    image_budget: Any, size: tuple[int, int], least: int, more: int, odd: int
) -> None:
    width, height = size
    most = max((least + more) * TILE + odd, least * TILE)
    budget = image_budget.ImageBudget(most=most, least=least * TILE, patch=14)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(UnsupportedParameter, match="more than 200 times"):
            budget.fit([OfSize(width, height)])
        return
    (fitted,) = budget.fit([OfSize(width, height)])
    assert fitted.width % 28 == fitted.height % 28 == 0
    assert 0 < fitted.width * fitted.height <= most


def test_images_beyond_the_context_are_refused(folder: Path, load: Load) -> None:
    content = json.loads((folder / "config.json").read_text())
    text = {**content["text_config"], "max_position_embeddings": 300}
    edited("config.json", text_config=text)(folder)
    runner = load(folder, Task.IMAGE_TO_TEXT)
    assert generate_text(runner, image(280, 280))
    with pytest.raises(UnsupportedParameter, match="images: 400 tokens, of 300 at most") as refused:
        generate_text(runner, *[image(280, 280)] * 4)
    assert refused.value.parameter == "images"
