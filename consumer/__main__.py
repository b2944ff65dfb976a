"""`python -m consumer` is the same as `consumer`."""

from consumer.app.cli import main

main()
