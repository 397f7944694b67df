"""`python -m relayrl_cli` is the command `relayrl`."""

import sys

from relayrl_cli.main import main

sys.exit(main())
