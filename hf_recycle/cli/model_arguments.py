"""Arguments of the commands that read a model: its revision, which blocks of it are meant, which neurons go, and the
text that it is measured on."""

import argparse
from typing import Any

from hf_recycle.utils.command_line import completed_by


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


def add_removal_arguments(parser: argparse.ArgumentParser) -> None:
    """--criterion, --fold and --seed."""
    from hf_recycle.methods.registry import CRITERIA, FOLDS

    criterion = parser.add_argument(
        "--criterion",
        default="low_magnitude",
        metavar="NAME",
        help="The neurons of lowest score go (default: %(default)s). "
        + f"{CRITERIA.describe()}. All but the first three look at eval_file.".replace("%", "%%"),
    )
    completed_by(criterion, lambda prefix: CRITERIA.names())
    parser.add_argument(
        "--fold",
        choices=list(FOLDS),
        default="none",
        help="What the neurons that go did is lost (none), or given to the out-projection's bias as its mean (mean), "
        "or to the neurons that stay (least_squares); the last two look at eval_file (default: %(default)s).",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of what is drawn (default: %(default)s).")


def add_text_arguments(parser: Any) -> None:
    """--eval_file and how it is read, for a parser or a group of one."""
    parser.add_argument(
        "--eval_file",
        metavar="FILE",
        help="Text (.txt, a document a line; .json, .jsonl): the loss is measured on its first part, criteria and "
        "folds look at the next.",
    )
    parser.add_argument(
        "--max_seq_length",
        type=int,
        help="Tokens of a sequence (default: 128, or as many as the model has positions for).",
    )
    parser.add_argument(
        "--max_eval_samples",
        type=int,
        default=256,
        help="Sequences of each part, at most half of the text (default: %(default)s).",
    )
    parser.add_argument(
        "--batch_size", type=int, default=16, help="Sequences computed at a time (default: %(default)s)."
    )


def removal_text(options: argparse.Namespace):
    """The `EvaluationSettings` of --eval_file; None without one.

    Raises:
        UserError: an unknown criterion, or there is no text for what looks at data.
    """
    from hf_recycle.analysis.data_scores import check_removal

    check_removal(options.criterion, options.fold, has_data=options.eval_file is not None)
    return None if options.eval_file is None else text_of(options)


def text_of(options: argparse.Namespace):
    """The `EvaluationSettings` of --eval_file."""
    from hf_recycle.analysis.evaluation import EvaluationSettings

    return EvaluationSettings(options.eval_file, options.max_seq_length, options.max_eval_samples, options.batch_size)
