"""`python -m relayrl_shared.store.migrate URL`: brings a trajectory store up to this code, for operators.

Services migrate when they start; this does it before them, for an upgrade that must not race.
"""

from __future__ import annotations

import argparse
import sys

from relayrl_shared.errors import RelayRLError
from relayrl_shared.store.open import open_store


def main(arguments: list[str] | None = None) -> int:
    """Migrates the store of the URL; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m relayrl_shared.store.migrate", description=__doc__)
    parser.add_argument("url", help="sqlite:///DIR or postgresql://USER@HOST/DATABASE")
    parser.add_argument(
        "--allow-unsafe", action="store_true", help="take a server that does not sync to disk"
    )
    options = parser.parse_args(arguments)
    try:
        open_store(options.url, writer_of="ingest", allow_unsafe=options.allow_unsafe).close()
    except RelayRLError as error:
        sys.stderr.write(f"not migrated: {error}\n")
        return 1
    sys.stdout.write("migrated\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
