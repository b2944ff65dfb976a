"""A daemon with a fault: `python -m tests.faults.worker CAUSE`.

The process is `consumer run` with the model of the file `causes/CAUSE.py`. A cause may patch other
parts of its process at import, so no test imports a cause.
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
