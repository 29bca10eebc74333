"""``python -m vittle``."""

import sys

from vittle.cli import main

sys.exit(main())
