"""Arguments of the commands that read a model: its revision, and which blocks of it are meant."""

import argparse


def add_revision_argument(parser: argparse.ArgumentParser) -> None:
    """--revision."""
    parser.add_argument(
        "--revision", metavar="NAME", help="Branch, tag or commit of a repository (or write hf://user/repo@revision)."
    )


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """--trust_pickle."""
    parser.add_argument(
        "--trust_pickle",
        action="store_true",
        help="Read the pytorch_model.bin of a repository without safetensors: whoever wrote it may be able to run code "
        "on this machine.",
    )


def add_block_arguments(parser: argparse.ArgumentParser) -> None:
    """--ff_pattern and --ff_blocks."""
    from hf_recycle.methods.arguments import OwnArguments

    for name, metavar in (("ff_pattern", "PATTERN"), ("ff_blocks", "WORD")):
        text = OwnArguments.__dataclass_fields__[name].metadata["help"]
        parser.add_argument(f"--{name}", metavar=metavar, help=text)
