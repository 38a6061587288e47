"""The repository's root on the path: what ranks import, tests import by the same name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
