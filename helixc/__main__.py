"""`python -m helixc`."""

import sys

from helixc.cli import main

sys.exit(main())
