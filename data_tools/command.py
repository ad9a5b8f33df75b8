"""What the commands of this folder have in common."""

from __future__ import annotations

import argparse
from collections.abc import Mapping


class Parser(argparse.ArgumentParser):
    """One line per error; help with line breaks as written."""

    def __init__(self, prog: str, *, description: str, epilog: str) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"{prog}.py", description=description, epilog=epilog, formatter_class=form)
        self.name = prog

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.name}: error: {message} (see --help)\n")


def counted(kinds: Mapping[str, int]) -> str:
    """{"video": 2, "image": 1} -> 1 image, 2 videos."""
    return ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in sorted(kinds.items()))
