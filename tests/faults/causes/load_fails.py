"""The model cannot be loaded: a library raises an error with a file name."""

from pathlib import Path

from consumer.ports.model import ModelDescription
from consumer.runners.faults import load_failure
from consumer.settings import Settings
from tests.support.quick_runner import QuickRunner

FOLDER = Path("/srv/models/portraits")
ERROR = OSError(f"Error while reading {FOLDER}/vae/weights.safetensors and /var/cache/hub/x:\ncut")


class LoadFails(QuickRunner):
    def load(self) -> ModelDescription:
        raise load_failure(ERROR, name="portraits", folder=FOLDER)


def make_runner(_: Settings) -> LoadFails:
    return LoadFails()
