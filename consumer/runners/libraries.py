"""The libraries: imported at once, their own output turned down and sent to the process's log.

diffusers logs the words of a prompt that it cuts, so it and transformers log errors only; and each
of these libraries writes to standard error by a handler of its own, between the daemon's lines.
"""

# mypy: allow-untyped-calls

import atexit
import gc
import importlib
import logging
import sys
from types import ModuleType

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
