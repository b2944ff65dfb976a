"""Runners of the operator: what MODEL_RUNNER names, see `generation_runner`."""
