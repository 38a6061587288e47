"""``python -m benchmarks.regret``."""

from benchmarks.regret.run import main

if __name__ == "__main__":
    raise SystemExit(main())
