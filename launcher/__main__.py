"""``python -m launcher`` is ``launcher``."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working directory, whose modules must not come before those that the program means

from launcher.cli import main  # noqa: E402  # what the working directory may hold, too

main()
