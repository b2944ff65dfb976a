"""The sections of the GPU check, the most valuable one first."""

from tests.gpu.running import Section

SECTIONS = tuple(
    Section(name, title, limit, f"{__name__}.{name}")
    for name, title, limit in (
        ("demonstration", "Versions, and the demonstration models", 60),
        ("daemon", "The whole daemon", 90),
        ("large_models", "Models of full size, against the bare library", 150),
        ("memory", "Out of memory, and a lost device", 80),
        ("options", "Options of the model", 150),
        ("batches", "Batches and previews", 60),
    )
)
