"""``python -m fxsparse`` is the command ``fxsparse``."""

import sys

from fxsparse.cli import main

sys.exit(main())
