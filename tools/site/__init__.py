"""The extensions of Sphinx that the site is made with: `make site`."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
