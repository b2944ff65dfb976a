"""Run the `consumer` command as `python -m consumer`."""

from consumer.app.cli import main

main()
