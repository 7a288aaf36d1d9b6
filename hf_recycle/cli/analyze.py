"""`hf-recycle analyze`: what a model's weights say of its feed-forward neurons."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_recycle.cli.common import add_json_argument, no_progress_bars, print_result
from hf_recycle.cli.model_arguments import (
    add_block_arguments,
    add_revision_argument,
    add_text_arguments,
    add_trust_argument,
    text_of,
)
from hf_recycle.errors import UserError
from hf_recycle.utils.command_line import Parser

HELP = "Measure the feed-forward neurons of trained models: magnitudes, dead neurons, pruning curves."

_DESCRIPTION = """\
Measure the feed-forward neurons of trained models: magnitudes, how they are distributed in each layer, whether they
have one mode, dead and duplicate neurons. Weights are read a megabyte at a time, and of them only the feed-forward
ones. If a model holds recycling files, what they record is shown too.

  hf-recycle analyze runs/decay runs/no-decay --output figures   two models side by side, with figures
  hf-recycle analyze user/repo --revisions all --output figures  how magnitudes and counts moved over its commits
  hf-recycle analyze runs/demo --prune_curve --eval_file my.txt  loss against the share of neurons pruned
  hf-recycle analyze runs/demo --ceiling --eval_file my.txt      is there anything to recycle, or to shrink?
  hf-recycle analyze user/repo --blocks                          which blocks it has; reads its configuration alone"""


def add_arguments(parser: Parser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="A folder, a run's output folder, or a repository of the Hub (user/repo, or "
        "hf://user/repo[@revision][/folder]).",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="Draw figures (PNG and SVG) into this folder.")
    add_json_argument(parser)
    add_block_arguments(parser)
    add_revision_argument(parser)
    add_trust_argument(parser)
    parser.add_argument("--revisions", help="Of one repository: all (commits of its main branch, and tags), or A,B,...")
    parser.add_argument(
        "--blocks",
        action="store_true",
        help="List the feed-forward blocks, and what looks like one and is left out; measure nothing.",
    )
    parser.add_argument(
        "--dead",
        type=float,
        default=0.01,
        help="A neuron is dead if its magnitude is below this share of its layer's median (default: %(default)s).",
    )
    parser.add_argument(
        "--duplicate",
        type=float,
        default=0.99,
        help="Cosine from which a neuron duplicates an earlier one (default: %(default)s).",
    )
    curves = parser.add_argument_group("on a text")
    curves.add_argument(
        "--ceiling",
        action="store_true",
        help="Count dead, dormant and duplicate neurons by layer, measure the loss without a share of them, chosen and "
        "made up for as well as can be, and say whether recycling or shrinking is worth it.",
    )
    curves.add_argument(
        "--card", action="store_true", help="With ceiling: write it into the model card of MODEL, a folder of a run."
    )
    curves.add_argument(
        "--prune_curve",
        action="store_true",
        help="Prune a growing share of every layer's neurons at once, without training, and measure the loss.",
    )
    add_text_arguments(curves)
    curves.add_argument(
        "--criteria",
        metavar="A,B,...",
        help="With prune_curve: selection criteria to prune by (default: all that look at weights alone).",
    )
    curves.add_argument(
        "--shares", metavar="A,B,...", help="Shares to prune (default: 0,0.1,...,1; of ceiling 0.1,0.25,0.5,0.75)."
    )
    curves.add_argument("--seed", type=int, default=0, help="Seed of the criterion random (default: %(default)s).")
    curves.add_argument(
        "--fold",
        metavar="NAME",
        help="With prune_curve: what pruned neurons did is lost (none, the default), or made up for (mean, "
        "least_squares).",
    )


def run(options: argparse.Namespace) -> int:
    _check(options)
    command = _prune_curves if options.prune_curve else _revisions if options.revisions else _magnitudes
    command = _ceilings if options.ceiling else _blocks if options.blocks else command
    command(options)
    return 0


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.dead < 1:
        raise UserError(f"dead={options.dead} must lie in [0, 1)")
    if not 0 < options.duplicate <= 1:
        raise UserError(f"duplicate={options.duplicate} must lie in (0, 1]")
    if options.output is not None and options.output.exists() and not options.output.is_dir():
        raise UserError(f"output={str(options.output)!r} is a file; name a folder")
    if options.revisions and (len(options.models) > 1 or options.prune_curve or options.revision):
        raise UserError(f"revisions={options.revisions!r} takes one repository, without prune_curve and revision")
    if options.blocks and (options.prune_curve or options.revisions or options.output):
        raise UserError("blocks lists the feed-forward blocks of a model and measures nothing; pass it alone")
    if options.ff_blocks and (options.prune_curve or options.revisions):
        raise UserError(f"ff_blocks={options.ff_blocks!r} does not go with prune_curve or revisions")
    if options.trust_pickle and (options.prune_curve or options.revisions):
        raise UserError("trust_pickle does not go with prune_curve or revisions")
    _check_text(options)


def _check_text(options: argparse.Namespace) -> None:
    """What is measured on a text has one, and nothing else that does not go with it."""
    takes = {"ceiling": ("eval_file", "shares"), "prune_curve": ("eval_file", "shares", "criteria", "fold")}
    command = next((name for name in takes if getattr(options, name)), None)
    if command and options.eval_file is None:
        raise UserError(f"{command} needs a text to measure the loss on; pass eval_file")
    for other in ("prune_curve", "blocks", "revisions", "trust_pickle"):
        if options.ceiling and getattr(options, other):
            raise UserError(f"ceiling does not go with {other}; leave one of them out")
    for name in ("criteria", "fold", "eval_file", "shares"):
        if getattr(options, name) is not None and name not in takes.get(command or "", ()):
            owners = [owner for owner, names in takes.items() if name in names]
            raise UserError(f"{name} belongs to {' and '.join(owners[::-1])}; pass --{owners[-1]} too")
    if options.card and not options.ceiling:
        raise UserError("card belongs to ceiling; pass --ceiling too")


def _magnitudes(options: argparse.Namespace) -> None:
    from hf_recycle.analysis.blocks import Thresholds
    from hf_recycle.analysis.model import analyze
    from hf_recycle.analysis.tables import analysis_text

    thresholds = Thresholds(options.dead, options.duplicate)
    analyses = [analyze(source, options.ff_pattern, thresholds, options.ff_blocks) for source in _sources(options)]
    print_result(options, {"models": [analysis.to_json() for analysis in analyses]}, lambda: analysis_text(analyses))
    if options.output is not None:
        from hf_recycle.analysis.figures import draw_analyses

        _say_where(draw_analyses(analyses, options.output))


def _blocks(options: argparse.Namespace) -> None:
    from hf_recycle.analysis.block_list import block_list, block_list_text
    from hf_recycle.analysis.checkpoint import Checkpoint

    lists = [block_list(Checkpoint(source, options.ff_pattern, options.ff_blocks)) for source in _sources(options)]
    print_result(options, {"models": lists}, lambda: "\n\n".join(map(block_list_text, lists)))


def _revisions(options: argparse.Namespace) -> None:
    from hf_recycle.analysis.revisions import analyze_revisions, revisions_text

    states = analyze_revisions(options.models[0], options.revisions, options.ff_pattern)
    print_result(options, {"revisions": [state.to_json() for state in states]}, lambda: revisions_text(states))
    if options.output is not None:
        from hf_recycle.analysis.revision_figures import draw_revisions

        _say_where(draw_revisions(states, options.output))


def _prune_curves(options: argparse.Namespace) -> None:
    no_progress_bars()
    from hf_recycle.analysis.curves import curves_text, draw_curves
    from hf_recycle.analysis.pruning import PruneSettings, prune_curves

    settings = PruneSettings.parse(
        options.criteria, options.shares, options.seed, options.ff_pattern, options.fold or "none"
    )
    text = text_of(options)
    curves = [prune_curves(source, settings, text) for source in _sources(options)]
    print_result(options, {"models": [curve.to_json() for curve in curves]}, lambda: curves_text(curves))
    if options.output is not None:
        _say_where(draw_curves(curves, options.output))


def _ceilings(options: argparse.Namespace) -> None:
    no_progress_bars()
    from hf_recycle.analysis.ceiling import SHARES, ceiling
    from hf_recycle.analysis.ceiling_report import ceiling_text, check_has_card, draw_ceilings, write_to_card
    from hf_recycle.analysis.pruning import parse_shares

    shares = SHARES if options.shares is None else parse_shares(options.shares)
    text = text_of(options)
    sources = _sources(options)
    folders = [check_has_card(source) for source in sources] if options.card else []
    found = [
        ceiling(source, text, shares, options.duplicate, options.ff_pattern, options.ff_blocks) for source in sources
    ]
    print_result(options, {"models": [each.to_json() for each in found]}, lambda: ceiling_text(found))
    if options.output is not None:
        _say_where(draw_ceilings(found, options.output))
    for each, folder in zip(found, folders, strict=False):
        write_to_card(each, folder)


def _sources(options: argparse.Namespace) -> list:
    from hf_recycle.analysis.source import Source

    return [Source(model, options.revision, trust_pickle=options.trust_pickle) for model in options.models]


def _say_where(paths: Sequence[Path]) -> None:
    # On stderr: with --json, stdout holds JSON and nothing else.
    print("figures: " + ", ".join(map(str, paths)), file=sys.stderr)
