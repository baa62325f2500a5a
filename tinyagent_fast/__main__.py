"""`python -m tinyagent_fast`."""

import sys

from tinyagent_fast.cli import main

sys.exit(main())
