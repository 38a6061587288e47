"""``python -m benchmarks.local_memory``."""

from benchmarks.local_memory.run import main

if __name__ == "__main__":
    raise SystemExit(main())
