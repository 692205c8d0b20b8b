"""``python -m hyperadam``."""

from hyperadam.cli import main

main()
