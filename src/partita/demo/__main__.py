"""``python -m partita.demo``."""

from partita.demo.run import main

if __name__ == "__main__":
    raise SystemExit(main())
