"""`python -m editr2.cli`, as `python -m editr2`."""

from __future__ import annotations

import sys

from editr2.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
