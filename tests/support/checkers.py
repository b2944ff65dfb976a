"""Valid and faulty safety checkers for MODEL_SAFETY_CHECKER."""

from typing import Any

import numpy as np
import torch
from PIL.Image import Image

SECRET = "zanzibar"  # a word that must not appear in logs and messages

NOT_CALLABLE = "a checker"


def flags_the_second(images: list[Image]) -> list[bool]:
    return [n == 1 for n in range(len(images))]


def flags_none(images: list[Image]) -> tuple[np.bool_, ...]:
    return tuple(np.zeros(len(images), dtype=bool))


def flags_and_paints(images: list[Image]) -> list[bool]:
    for image in images:
        image.paste((255, 0, 0), (0, 0, *image.size))
    return [True for _ in images]


def raises(images: list[Image]) -> list[bool]:
    raise ValueError(f"{SECRET} in {images}")


def takes_no_images() -> list[bool]:
    return []


def runs_out_of_memory(_: list[Image]) -> list[bool]:
    raise torch.OutOfMemoryError("no more")


def returns_too_few(images: list[Image]) -> list[bool]:
    return [False for _ in images[1:]]


def returns_one_bool(_: list[Image]) -> bool:
    return False


def returns_numbers(images: list[Image]) -> list[Any]:
    return [0.1 for _ in images]


def returns_nones(images: list[Image]) -> list[Any]:
    return [None for _ in images]
