"""
A Space that shows a checkpoint; see README.md beside this file. To try it on your own machine:

    GAVAMOE_MODEL=outputs/quickstart GAVAMOE_DATASET=synthetic python examples/space/app.py
"""

import os
import sys

from gavamoe_hf.cli.main import main

# Variables of the Space (Settings, Variables and secrets), or edit here
MODEL = os.environ.get("GAVAMOE_MODEL", "your-name/your-checkpoint")
DATASET = os.environ.get("GAVAMOE_DATASET")

# A Space is reached from outside its machine; on your own, nobody else gets in
HOST = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"

if __name__ == "__main__":
    dataset = ["--dataset", DATASET] if DATASET else []
    sys.exit(main(["demo", "--model", MODEL, *dataset, "--host", HOST, *sys.argv[1:]]))
