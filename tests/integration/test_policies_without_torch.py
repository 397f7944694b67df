"""Acting needs no torch: proven in a fresh process."""

from __future__ import annotations

import subprocess
import sys


def test_making_and_loading_a_policy_needs_no_torch() -> None:
    """Tests of services without torch can make policies."""
    program = (
        "import sys; from relayrl_shared.testing.policies import make_artefact; "
        "from relayrl_shared.policy.engine import load_policy; "
        "assert not [m for m in sys.modules if m == 'torch' or m.startswith('torch.')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
