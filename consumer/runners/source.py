"""Lookup of a model's files: a folder, the hub's cache, or the demonstration model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from consumer.ports.model import ModelMisconfigured, ModelUnavailable
from consumer.runners import demonstration
from consumer.runners.config import ModelConfig
from consumer.runners.faults import load_failure
from consumer.runners.libraries import reported_warnings
from consumer.runners.setting_errors import model_id_errors
from generation_contracts import Task

log = structlog.get_logger()

DEMONSTRATION = "demonstration"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REASON = 200  # the most characters of an error of the hub's client in a message
HUB_TIMEOUT = 10.0  # seconds to resolve a revision on the hub; the hub's client has no timeout


class Download(Protocol):
    """Downloads a model from the hub into the hub's cache, or only looks it up there."""

    def __call__(self, model_id: str, revision: str | None, *, cached_only: bool) -> str:
        """Return the folder of the model.

        Raises:
            OSError: With `cached_only`, where the cache has no complete copy.
        """


@dataclass(frozen=True)
class Source:
    """A model's folder and its name.

    Attributes:
        folder: The folder with the model's files.
        id: The hub id, or the name of the folder; used in events and messages instead of a path.
        revision: The commit on the hub; None for a folder.
    """

    folder: Path
    id: str
    revision: str | None = None


@contextmanager
def locate_model(task: Task, config: ModelConfig, download: Download) -> Iterator[Source]:
    """Find or download the model's files; inside the context, log the libraries' warnings.

    Args:
        task: Chooses the demonstration model.
        config: `model_id` is a folder if a folder of that name exists, else an id on the hub.
        download: Downloads a model from the hub, or looks it up in the hub's cache.

    Raises:
        ModelMisconfigured: MODEL_ID or MODEL_REVISION is wrong.
        ModelUnavailable: The model cannot be downloaded.
    """
    with reported_warnings():
        if error := next(model_id_errors(config), None):
            raise ModelMisconfigured(error)
        if not config.model_id:
            # The tensors are too small for several threads: an image takes 0.2 s in one thread,
            # and up to 6 s in two threads on two busy cores.
            torch.set_num_threads(1)
            yield Source(demonstration.folder_of(task), DEMONSTRATION)
            return
        yield find_model(config.model_id, config.revision, download, setting="MODEL_ID")


def find_model(model_id: str, revision: str | None, download: Download, *, setting: str) -> Source:
    """Find the folder of a model, or download the model.

    Args:
        model_id: A folder if a folder of that name exists, else an id on the hub.
        revision: Commit, tag or branch on the hub.
        download: Downloads a model from the hub, or looks it up in the hub's cache.
        setting: The setting that names the model, for messages.

    Raises:
        ModelMisconfigured: The hub has no such model or revision.
        ModelUnavailable: The model cannot be downloaded.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return Source(folder.resolve(), folder.resolve().name)
    return _from_hub(model_id, revision, download, setting)


def _from_hub(model_id: str, revision: str | None, download: Download, setting: str) -> Source:
    """Look a model up in the hub's cache, or download it.

    A commit never changes, so a cached commit needs no request to the hub. For any other revision,
    one request is made, with `HUB_TIMEOUT`. If it fails, the cached model is used.
    """
    is_commit = revision is not None and _COMMIT.fullmatch(revision) is not None
    try:
        folder = _cached(model_id, revision, download) if is_commit else None
        if folder is None:
            folder = _cached_without_hub(model_id, revision, download, setting)
        if folder is None:
            folder = Path(download(model_id, revision, cached_only=False))
    except ModelUnavailable:
        raise
    except Exception as error:  # noqa: BLE001 - the hub's client raises a dozen kinds
        refusal = _hub_refusal(error, model_id, revision, setting)
        raise refusal or load_failure(error, name=model_id) from None
    # The cache names its folders after commits: …/snapshots/<commit>.
    return Source(folder, model_id, revision=folder.name)


def _hub_refusal(
    error: Exception, model_id: str, revision: str | None, setting: str
) -> ModelUnavailable | None:
    """Return what a refusal of the hub means for the settings, or None for another error."""
    match error:
        case GatedRepoError():
            return ModelUnavailable(
                f"{setting}: {model_id} is gated: accept its terms at "
                f"{constants.ENDPOINT}/{model_id}, and set HF_TOKEN to a token of that account"
            )
        case RepositoryNotFoundError():
            return ModelMisconfigured(
                f"{setting}: {constants.ENDPOINT} has no model {model_id}, or it is private: check "
                "the name, and HF_TOKEN for a private model"
            )
        case RevisionNotFoundError():
            return ModelMisconfigured(f"MODEL_REVISION: {model_id} has no revision {revision}")
    return None


def _cached(model_id: str, revision: str | None, download: Download) -> Path | None:
    try:
        return Path(download(model_id, revision, cached_only=True))
    except OSError:  # the libraries raise different subclasses
        return None


def _cached_without_hub(
    model_id: str, revision: str | None, download: Download, setting: str
) -> Path | None:
    """Return the cached model if the hub cannot be used; None if it can.

    Raises:
        ModelUnavailable: The hub cannot be reached, and the cache has no complete copy.
        HfHubHTTPError: The hub refuses, and the cache has no complete copy; or there is no such
            revision.
    """
    try:
        HfApi().model_info(model_id, revision=revision, timeout=HUB_TIMEOUT)
    except RevisionNotFoundError:
        raise
    except Exception as error:  # the hub's client raises a dozen kinds
        folder = _cached(model_id, revision, download)
        reason = type(error).__name__
        if folder is not None:
            log.warning("hub_not_used", model=model_id, reason=reason, commit=folder.name)
            return folder
        if isinstance(error, HfHubHTTPError):
            raise
        raise ModelUnavailable(
            f"{setting}: {model_id} cannot be loaded: the hub cannot be reached "
            f"({_short(error)}), and its cache has no complete copy"
        ) from None
    return None


def _short(error: Exception) -> str:
    """Return the hub's address with the class and the first line of an error."""
    line = next(iter(str(error).splitlines()), "")[:_REASON]
    return f"{constants.ENDPOINT}: {type(error).__name__}" + (f": {line}" if line else "")
