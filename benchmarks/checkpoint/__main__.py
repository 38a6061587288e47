"""``python -m benchmarks.checkpoint``."""

from benchmarks.checkpoint.run import main

if __name__ == "__main__":
    raise SystemExit(main())
