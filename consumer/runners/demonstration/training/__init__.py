"""The training of the demonstration models."""
