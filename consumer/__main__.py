"""Run the `consumer` command, as `consumer` or `python -m consumer`."""

import signal


def main() -> None:
    """Run the command; Ctrl-C during its imports ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # `consumer.app.cli` restores the handler
    from consumer.app import cli  # noqa: PLC0415 - after the handler is set

    cli.main()


if __name__ == "__main__":
    main()
