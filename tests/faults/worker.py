"""A daemon with a fault: `python -m tests.faults.worker CAUSE`.

It is `consumer run` in everything but the model, which the file `causes/CAUSE.py` makes. A cause
may also break another part of its process, when it is imported: so no test imports one.
"""

import importlib
import sys

from consumer.app.daemon import run
from consumer.settings import Settings
from consumer.telemetry import configure_logging


def main() -> None:
    settings = Settings.load()
    configure_logging(settings.log_format, settings.log_level)
    cause = importlib.import_module(f"tests.faults.causes.{sys.argv[1]}")
    sys.exit(run(settings, make_runner=cause.make_runner))


if __name__ == "__main__":
    main()
