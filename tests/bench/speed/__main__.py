"""`uv run --group bench python -m tests.bench.speed`."""

from tests.bench.speed.commands import main

if __name__ == "__main__":
    main()
