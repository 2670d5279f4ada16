"""``make openapi``: write the description of the interface to docs/openapi.json.

A breaking change is not written, unless it is meant (``--breaking``) and goes into a new version of
the interface (docs/INTEGRATORS.md).
"""

from __future__ import annotations

import sys

from .breaking import breaking
from .document import PAGE, generated, kept, plain, text


def main() -> int:
    found = breaking(plain(kept()), plain(generated())) if PAGE.exists() else []
    for line in found:
        print(f"breaking: {line}", file=sys.stderr)  # noqa: T201 - a command's own output
    if found and "--breaking" not in sys.argv:
        return 1
    PAGE.write_text(text(generated()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
