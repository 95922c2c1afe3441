"""``python -m launcher`` is ``launcher``."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working directory: a file of the user's must not hide a module that the launcher imports

from launcher.cli import main  # noqa: E402  # the working directory may hold a folder launcher

main()
