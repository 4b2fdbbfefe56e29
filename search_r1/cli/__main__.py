"""`python -m search_r1.cli COMMAND ...` is `search-r1 COMMAND ...`."""

import sys

from search_r1.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
