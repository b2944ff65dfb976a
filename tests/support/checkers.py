"""Safety checkers as an operator could write them, good and bad, for MODEL_SAFETY_CHECKER."""

from typing import Any

import numpy as np
import torch
from PIL.Image import Image

SECRET = "zanzibar"  # a word that must not get out

NOT_CALLABLE = "a checker"


def flags_the_second(pictures: list[Image]) -> list[bool]:
    return [n == 1 for n in range(len(pictures))]


def flags_none(pictures: list[Image]) -> tuple[np.bool_, ...]:
    return tuple(np.zeros(len(pictures), dtype=bool))


def flags_and_paints(pictures: list[Image]) -> list[bool]:
    for picture in pictures:
        picture.paste((255, 0, 0), (0, 0, *picture.size))
    return [True for _ in pictures]


def raises(pictures: list[Image]) -> list[bool]:
    raise ValueError(f"{SECRET} in {pictures}")


def takes_no_pictures() -> list[bool]:
    return []


def runs_out_of_memory(_: list[Image]) -> list[bool]:
    raise torch.OutOfMemoryError("no more")


def answers_too_little(pictures: list[Image]) -> list[bool]:
    return [False for _ in pictures[1:]]


def answers_once(_: list[Image]) -> bool:
    return False


def answers_numbers(pictures: list[Image]) -> list[Any]:
    return [0.1 for _ in pictures]


def answers_nothing(pictures: list[Image]) -> list[Any]:
    return [None for _ in pictures]
