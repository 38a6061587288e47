"""``python -m benchmarks.distributed``."""

import sys

from benchmarks.distributed.run import main

sys.exit(main())
