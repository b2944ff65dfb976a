"""First words of the prompts that fail in the model of `tests.bench.memory`."""

RAISES = "raises"
OUT_OF_MEMORY_ONCE = "out-of-memory-once"
OUT_OF_MEMORY = "out-of-memory"
