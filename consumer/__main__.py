"""`python -m consumer` is the same as `consumer`."""

from consumer.cli import main

main()
