"""`python -m meshift`, where the `meshift` command is not on the path. It knows no command."""

import sys

from meshift.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
