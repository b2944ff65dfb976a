"""The libraries' own output, turned off: diffusers logs the words of a prompt that it cuts."""

# mypy: allow-untyped-calls

import transformers.utils.logging
from huggingface_hub.utils.tqdm import disable_progress_bars


def quiet() -> None:
    """Let transformers log errors only, and draw no progress bars."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
