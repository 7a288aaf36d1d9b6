"""Pretrain a model from recipes and arguments.

`python -m hf_recycle.train`, `accelerate launch -m hf_recycle.train` and `hf-recycle train` are the same.
"""

import sys
from collections.abc import Sequence

from hf_recycle.cli.main import main as command_line
from hf_recycle.runs.leaving import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run `RECIPE ... --argument value ...`; returns the exit status, see `hf_recycle.cli.main.main`."""
    return command_line(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    leave(main())
