"""``python -m benchmarks.two_hosts``."""

import sys

from benchmarks.two_hosts.run import main

sys.exit(main())
