"""The libraries' own output: turned down, and what is left goes the way of the process's log.

diffusers logs the words of a prompt that it cuts, so it and transformers log errors only; and each
of these libraries writes to standard error by a handler of its own, between the daemon's lines.
"""

# mypy: allow-untyped-calls

import importlib
import logging
import sys

# Its structured trace, which it writes to files, and only when TORCH_TRACE names a folder.
_TORCH_TRACE = "torch.__trace"


def torch_to_root() -> None:
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
