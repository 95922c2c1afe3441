"""``python -m launcher`` is ``launcher``."""

from launcher.cli import main

main()
