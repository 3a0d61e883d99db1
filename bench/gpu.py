"""One command that measures a GPU: see --help, and bench/gpu_sections.py."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Where the packages are not installed, those beside this folder do.
    sys.path.append(os.fspath(Path(__file__).resolve().parent.parent))
    from gpu_sections import main

    sys.exit(main())
