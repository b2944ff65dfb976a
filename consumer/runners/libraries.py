"""The libraries: imported at once, their own output turned down and sent to the process's log.

diffusers logs the words of a prompt that it cuts, so it and transformers log errors only while a
model runs; and each of these libraries writes to standard error with a separate handler, between
the daemon's lines. While a model is loaded there is no prompt, and a warning is often the only sign
that a library has dropped a part of the model's files.
"""

# mypy: allow-untyped-calls

import atexit
import gc
import importlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import structlog

log = structlog.get_logger()

_LIBRARIES = ("diffusers", "transformers", "peft", "accelerate", "torch", "safetensors")
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+")  # of an absolute path
# Not a drop: diffusers warns of each text encoder for which an adapter has no weights. Whether all
# layers of the file arrived is checked where adapters are loaded.
_HARMLESS = "No LoRA keys associated to"
_LINE = 500  # characters of a warning that are worth showing

# Its structured trace, which it writes to files, and only when TORCH_TRACE names a folder.
_TORCH_TRACE = "torch.__trace"


def import_with_all(name: str) -> ModuleType:
    """Import a module with the libraries that it needs; the garbage collector passes over them.

    Hundreds of thousands of objects come with them and stay. To go through them again and again
    while they come would take a fifth of the time, and each full collection later would stop every
    thread for 0.3 s instead of 4 ms. The garbage of the imports themselves, 10 MB, is kept.
    """
    new, collecting = name not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        _torch_to_root()
        module = importlib.import_module(name)
        if new:
            gc.freeze()
            # Collected when the process ends, or extension modules would tell of leaks.
            atexit.register(gc.unfreeze)
    finally:
        if collecting:
            gc.enable()
    return module


def _torch_to_root() -> None:
    """Import torch, and let the process's log have what it says.

    Before diffusers and transformers are imported: torch warns of what their imports do.
    """
    import torch  # noqa: F401 - its import makes the handlers

    for name, logger in list(logging.root.manager.loggerDict.items()):
        ours = name.partition(".")[0] == "torch" and name != _TORCH_TRACE
        if ours and isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True


def quiet() -> None:
    """Let diffusers and transformers log errors only, in the process's log; no progress bars."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    for library in {"diffusers", "transformers"} & sys.modules.keys():
        logs = importlib.import_module(f"{library}.utils.logging")
        logs.set_verbosity_error()
        logs.disable_default_handler()
        logs.enable_propagation()
        logs.disable_progress_bar()
    disable_progress_bars()


@contextmanager
def reported_warnings() -> Iterator[None]:
    """Log what the libraries warn of while a model is loaded; afterwards they are quiet.

    Each warning is one event `library_warning` with the library's name, however often it is given.
    """
    quiet()
    report = _Report()
    loggers = [logging.getLogger(library) for library in _LIBRARIES]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(report)
    try:
        with warnings.catch_warnings():
            report.show_otherwise = warnings.showwarning
            warnings.showwarning = report.show  # type: ignore[assignment]
            yield
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(report)
            logger.setLevel(level)
            logger.propagate = propagate


class _Report(logging.Handler):
    """Logs each warning of the libraries once, on one line and without the folders of its paths."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.show_otherwise: Any = None
        self._seen: set[tuple[str, str]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self._log(record.name.partition(".")[0], record.getMessage())

    def show(self, message: Any, category: Any, filename: str, *place: Any) -> None:
        """Stands in for `warnings.showwarning`; what is not of the libraries goes its own way."""
        library = next((part for part in Path(filename).parts if part in _LIBRARIES), None)
        if library is None:
            self.show_otherwise(message, category, filename, *place)
        else:
            self._log(library, str(message))

    def _log(self, library: str, text: str) -> None:
        line = " ".join(_FOLDERS.sub("", text).split())[:_LINE]
        if (library, line) not in self._seen and not line.startswith(_HARMLESS):
            self._seen.add((library, line))
            log.warning("library_warning", library=library, detail=line)
