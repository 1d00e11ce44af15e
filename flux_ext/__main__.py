"""``python -m flux_ext`` is the command ``flux-ext``."""

import sys

from .cli import main

sys.exit(main())
