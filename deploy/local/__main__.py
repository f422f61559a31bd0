"""`python -m penstock.local`: the same as `penstock`; without a subcommand the same as `penstock serve`."""

from __future__ import annotations

import sys

from penstock.local.cli import COMMANDS, main

if __name__ == "__main__":
    words = sys.argv[1:]
    explicit = bool(words) and (words[0] in COMMANDS or words[0] in ("-h", "--help", "--version"))
    sys.exit(main(words if explicit else ["serve", *words]))
