"""`python -m gavamoe_hf COMMAND ...`, for launchers that start a module."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
