"""Imports the libraries of all sections, without the lines that they log during the import."""

import importlib
import logging

import structlog

from consumer.runners import libraries

logging.getLogger().addHandler(logging.NullHandler())  # or logging prints to standard error
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
for name in (
    "consumer.runners.text_to_image.diffusion",
    "consumer.runners.image_to_text.vision_language",
    "tests.support.tiny_families",
):
    libraries.import_frozen(name)

for name in ("diffusers.utils.logging", "transformers.utils.logging"):
    importlib.import_module(name).disable_progress_bar()
