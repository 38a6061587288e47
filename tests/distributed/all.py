"""The whole product of plans and faults, on 2, 3, 4, 6 and 8 ranks: ``python -m tests.distributed.all``."""

import sys

import pytest

sys.exit(pytest.main(["-m", "distributed_full", "-q", "tests/distributed", *sys.argv[1:]]))
