"""``python -m carve``."""

import sys

from carve.cli import main

sys.exit(main())
