"""Where a model's files are: a folder, the hub's cache, or the demonstration model."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from consumer.ports import ModelUnavailable
from consumer.runners import demonstration
from consumer.runners.config import ModelConfig
from consumer.runners.faults import load_failure
from consumer.runners.libraries import reported_warnings
from generation_contracts import Task

DEMONSTRATION = "demonstration"

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

Download = Callable[[str, str | None], str]  # (id, revision) -> a folder


@dataclass(frozen=True)
class Source:
    """A model's folder and how it is called.

    Attributes:
        id: The hub id, or the name of the folder: what events and messages say, never a path.
        revision: The commit on the hub; None for a folder.
    """

    folder: Path
    id: str
    revision: str | None = None


@contextmanager
def located(task: Task, config: ModelConfig, download: Download) -> Iterator[Source]:
    """Have the model's files at hand while it is loaded, and log what the libraries warn of.

    Args:
        task: Chooses the demonstration model.
        config: `model_id` is a folder if there is one of that name, else an id on the hub.
        download: Fetches a model from the hub, or finds it in the hub's cache.

    Raises:
        ModelUnavailable: Neither a folder nor an id on the hub that can be reached.
    """
    with reported_warnings():
        folder_or_id = Path(config.model_id).expanduser()
        if folder_or_id.is_file():
            raise ModelUnavailable(
                f"MODEL_ID: {folder_or_id.name} is a file: a model is a folder with its "
                "configuration and weights, or an id on the hub"
            )
        if config.revision is not None and folder_or_id.is_dir():
            raise ModelUnavailable("MODEL_REVISION: only a model of the hub has revisions")
        if not config.model_id:
            # Its tensors are too small to be shared out: a picture takes 0.2 s in one thread and up
            # to 6 s in two, when the two cores have other work.
            torch.set_num_threads(1)
            yield Source(demonstration.folder_of(task), DEMONSTRATION)
            return
        if folder_or_id.is_dir():
            yield Source(folder_or_id.resolve(), folder_or_id.resolve().name)
        elif _HUB_ID.fullmatch(config.model_id):
            yield _from_hub(config.model_id, config.revision, download)
        else:
            raise ModelUnavailable(f"MODEL_ID: there is no folder {folder_or_id.name}")


def _from_hub(model_id: str, revision: str | None, download: Download) -> Source:
    try:
        folder = Path(download(model_id, revision))
    except ModelUnavailable:
        raise
    except Exception as error:  # noqa: BLE001 - the hub's client raises a dozen kinds
        raise load_failure(error, name=model_id) from None
    # The cache names its folders after commits: …/snapshots/<commit>.
    return Source(folder, model_id, revision=folder.name)
