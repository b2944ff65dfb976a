"""A message-driven generation daemon."""
