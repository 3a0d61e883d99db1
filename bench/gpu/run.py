"""Measure a GPU with one command: see --help, and bench/gpu/gpu_sections.py."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # bench/ for make_folder; the project for packages that are not installed.
    sys.path += [os.fspath(folder) for folder in Path(__file__).resolve().parents[1:3]]
    from gpu_sections import main

    sys.exit(main())
