"""Import of the model libraries, their versions, and redirection of their output to the log.

diffusers logs the words that it truncates from a prompt. Therefore diffusers and transformers log
only errors while a model runs. The libraries' handlers, which write to standard error between the
daemon's lines, are removed. During loading there is no prompt, and a warning is often the only sign
that a library has ignored a part of the model's files; these warnings are logged.
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

_LIBRARIES = (
    *("diffusers", "transformers", "peft", "accelerate", "torch", "safetensors"),
    "huggingface_hub",
)
# Libraries whose warnings during the import are about optional packages and their own code.
_IMPORTED = (*_LIBRARIES, "torchao", "bitsandbytes")
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+")  # the folders of an absolute path
_HARMLESS = (
    # diffusers gives this warning for each text encoder for which an adapter has no weights. The
    # module `adapters` checks whether all layers of the file were loaded.
    "No LoRA keys associated to",
    # diffusers calls the hub's client with this argument at each download.
    "The `local_dir_use_symlinks` argument is deprecated",
)
_LINE = 500  # the most characters of a logged warning

# The logger of torch's structured trace, which writes to files if TORCH_TRACE names a folder.
_TORCH_TRACE = "torch.__trace"


def import_frozen(name: str) -> ModuleType:
    """Import a module and its libraries, and exclude their objects from garbage collection.

    The libraries create hundreds of thousands of permanent objects. Collections during the import
    would take a fifth of its time, and each full collection later would stop every thread for 0.3 s
    instead of 4 ms. In return, 10 MB of garbage from the imports is never freed.
    """
    new, collecting = name not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        with _quiet_import():
            _propagate_torch_logs()
            module = importlib.import_module(name)
        if new:
            gc.freeze()
            # Collected at exit, because extension modules would otherwise report leaks.
            atexit.register(gc.unfreeze)
    finally:
        if collecting:
            gc.enable()
    return module


def versions_of(*names: str) -> dict[str, str]:
    """Return the versions of imported libraries by name.

    The version of torch names its build, for example `2.15.0+cpu`; its distribution may not.
    """
    return {name: str(sys.modules[name].__version__) for name in sorted(names)}


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Log the libraries' warnings inside the context as `library_import_warning`, level DEBUG."""
    reported: set[str] = set()  # each handler filters the record

    def is_of_others(record: logging.LogRecord) -> bool:
        library = record.name.partition(".")[0]
        if library not in _IMPORTED or record.levelno >= logging.ERROR:
            return True
        detail = record.getMessage()[:_LINE]
        if detail not in reported:
            reported.add(detail)
            log.debug("library_import_warning", library=library, detail=detail)
        return False

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(is_of_others)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_of_others)


def _propagate_torch_logs() -> None:
    """Import torch, and send its log records to the process's log.

    Must run before diffusers and transformers are imported, because torch logs warnings about
    their imports.
    """
    import torch  # noqa: F401 - the import creates the handlers

    for name, logger in list(logging.root.manager.loggerDict.items()):
        ours = name.partition(".")[0] == "torch" and name != _TORCH_TRACE
        if ours and isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True


def quiet() -> None:
    """Limit the logs of diffusers and transformers to errors; turn their progress bars off."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    for library in {"diffusers", "transformers"} & sys.modules.keys():
        logs = importlib.import_module(f"{library}.utils.logging")
        logs.set_verbosity_error()
        logs.disable_default_handler()
        logs.enable_propagation()
        logs.disable_progress_bar()
    # The hub's client has no function for this. Its handler writes lines that are not JSON.
    hub = logging.getLogger("huggingface_hub")
    hub.handlers.clear()
    hub.propagate = True
    disable_progress_bars()


@contextmanager
def reported_warnings() -> Iterator[None]:
    """Log the libraries' warnings inside the context; afterwards they log errors only.

    Each distinct warning is logged once, as the event `library_warning` with the library's name.
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
    """Logs each warning of the libraries once, on one line and without folders in paths."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.show_otherwise: Any = None
        self._seen: set[tuple[str, str]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self._log(record.name.partition(".")[0], record.getMessage())

    def show(self, message: Any, category: Any, filename: str, *rest: Any) -> None:
        """Replace `warnings.showwarning`; warnings of other modules are passed to the original."""
        library = next((part for part in Path(filename).parts if part in _LIBRARIES), None)
        if library is None:
            self.show_otherwise(message, category, filename, *rest)
        else:
            self._log(library, str(message))

    def _log(self, library: str, text: str) -> None:
        line = " ".join(_FOLDERS.sub("", text).split())[:_LINE]
        if (library, line) not in self._seen and not line.startswith(_HARMLESS):
            self._seen.add((library, line))
            log.warning("library_warning", library=library, detail=line)
