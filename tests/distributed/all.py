"""The whole product of plans on 2 to 8 ranks: ``python -m tests.distributed.all`` (``--help``: parts of it)."""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # before torch asks

from tests.distributed.matrix import main

sys.exit(main())
