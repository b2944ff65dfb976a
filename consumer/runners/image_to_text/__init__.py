"""Texts about pictures: what AutoModelForImageTextToText of transformers loads."""
