"""Texts about images: what AutoModelForImageTextToText of transformers loads."""
