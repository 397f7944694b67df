"""`python -m relayrl_training_server`, the same as `relayrl-training-server`."""

from __future__ import annotations

import sys

from relayrl_training_server.main import main

sys.exit(main())
