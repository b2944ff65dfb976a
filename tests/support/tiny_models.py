"""Fixtures: folders with tiny models of random weights, and runners with a loaded model.

The fixtures import torch, diffusers and transformers when a test first needs a model.
"""

import functools
import gc
import importlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from consumer.runners import ModelConfig, ModelRunner, create_runner
from generation_contracts import Task

VISION_LANGUAGE = "vision_language"

Folder = Callable[..., Path]
Load = Callable[..., ModelRunner]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    """Return the read-only folder of a family of `tiny_families`, or of `vision_language`."""
    folders: dict[str, Path] = {}

    def folder(family: str, **options: Any) -> Path:
        name = "-".join([family, *(f"{key}-{value}" for key, value in options.items())])
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("models") / name
            _build(family, folders[name], **options)
        return folders[name]

    yield folder
    gc.unfreeze()  # see `_torch`


@pytest.fixture
def own_folder(model_folder: Folder, tmp_path: Path) -> Folder:
    """Copy a model folder for a test that changes its files."""

    def folder(family: str) -> Path:
        return Path(shutil.copytree(model_folder(family), tmp_path / family))

    return folder


@pytest.fixture
def load() -> Iterator[Load]:
    """Load a model from a folder, and close the runner at the end of the test."""
    loaded: list[ModelRunner] = []

    def runner(folder: Path | str, task: Task = Task.TEXT_TO_IMAGE, **options: Any) -> ModelRunner:
        made = create_runner(task, ModelConfig(model_id=str(folder), **options))
        loaded.append(made)
        made.load()
        return made

    yield runner
    for made in loaded:
        made.close()


@pytest.fixture(scope="session")
def shared_runner(model_folder: Folder) -> Iterator[Callable[[str], ModelRunner]]:
    """Return the loaded runner of a family that all tests share. Tests must not change it."""
    loaded: dict[str, ModelRunner] = {}

    def runner(family: str, **options: Any) -> ModelRunner:
        folder = model_folder(family, **options)
        if str(folder) not in loaded:
            task = Task.IMAGE_TO_TEXT if family == VISION_LANGUAGE else Task.TEXT_TO_IMAGE
            loaded[str(folder)] = create_runner(task, ModelConfig(model_id=str(folder)))
            loaded[str(folder)].load()
        return loaded[str(folder)]

    yield runner
    for made in loaded.values():
        made.close()


def _build(family: str, folder: Path, **options: Any) -> None:
    torch = _torch()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        if family == VISION_LANGUAGE:
            importlib.import_module("tests.support.tiny_vision_language").save(folder)
        else:
            families = importlib.import_module("tests.support.tiny_families")
            getattr(families, family)(**options).save_pretrained(folder)


@functools.cache
def _torch() -> Any:
    torch = importlib.import_module("torch")
    # Small tensors are slower in two threads, and much slower on a busy computer.
    torch.set_num_threads(1)
    # A runner collects garbage after each run that ends early. `gc.freeze` excludes the objects of
    # the libraries from these collections.
    importlib.import_module("tests.support.tiny_families")
    importlib.import_module("consumer.runners.text_to_image.diffusion")
    gc.collect()
    gc.freeze()
    return torch
