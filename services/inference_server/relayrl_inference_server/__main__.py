"""`python -m relayrl_inference_server` is `relayrl-inference-server`."""

from __future__ import annotations

import sys

from relayrl_inference_server.main import main

sys.exit(main())
