"""`python -m relayrl_model_registry` is `relayrl-model-registry`."""

from __future__ import annotations

import sys

from relayrl_model_registry.main import main

sys.exit(main())
