"""``python -m benchmarks.local_pipeline``."""

from benchmarks.local_pipeline.run import main

if __name__ == "__main__":
    raise SystemExit(main())
