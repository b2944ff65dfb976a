"""Shorter timeouts for the object store of a process."""

from dataclasses import replace
from typing import Any

from consumer.app import composition
from consumer.artifacts import StoreConfig, store_config
from consumer.jobs import image_stages
from consumer.settings import Settings


def shorten(**times: Any) -> None:
    """Change the timeouts of the `StoreConfig` of this process, and shorten its retry pauses."""

    def shortened(settings: Settings) -> StoreConfig:
        return replace(store_config(settings), first_pause=0.05, longest_pause=0.2, **times)

    setattr(composition, "store_config", shortened)  # noqa: B010 - a name that it only imports
    image_stages.STORE_PAUSE_FIRST = 0.1
    image_stages.STORE_PAUSE_MOST = 0.5
