"""`hf-recycle analyze`: what a model's weights say of its feed-forward neurons."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_recycle.cli.options import Options, run_command
from hf_recycle.errors import UserError

HELP = """\
usage: hf-recycle analyze MODEL [MODEL ...] [--argument VALUE ...]

Measure the feed-forward neurons of trained models: magnitudes, how they are distributed in each layer, whether they
have one mode, dead and duplicate neurons. A model is a folder, a run's output folder, or a repository of the Hub
(user/repo, or hf://user/repo[@revision][/folder]). Its weights are read a megabyte at a time, and of them only the
feed-forward ones. If it holds recycling files, what they record is shown too.

  hf-recycle analyze runs/decay runs/no-decay --output figures   two models side by side, with figures
  hf-recycle analyze user/repo --revisions all --output figures  how magnitudes and counts moved over its commits
  hf-recycle analyze runs/demo --prune-curve --eval_file my.txt  loss against the share of neurons pruned
  hf-recycle analyze user/repo --blocks                          which blocks it has; reads its configuration alone

  --output DIR             draw figures (PNG) into this folder
  --json                   print JSON, and nothing else, to stdout
  --ff_pattern PATTERN     linear layers of the feed-forward blocks, for a model of unknown layout: 'fc1 -> fc2',
                           'gate + up -> down' or 'fused:Wi -> Wo'
  --ff_blocks WORD         of a composite model, the part that is meant: vision, language, encoder, decoder, ...
  --blocks                 list the feed-forward blocks, and what looks like one and is left out; measure nothing
  --dead FLOAT             a neuron is dead if its magnitude is below this share of its layer's median (default: 0.01)
  --duplicate FLOAT        cosine from which a neuron duplicates an earlier one (default: 0.99)
  --trust_pickle           read the pytorch_model.bin of a repository without safetensors: whoever wrote it may be able
                           to run code on this machine
  --revision NAME          branch, tag or commit of a repository
  --revisions {all,A,B,..} of one repository: all commits of its main branch and all its tags, or those named

One-shot pruning curves:
  --prune-curve            prune a growing share of every layer's neurons at once, without training; measure the loss
  --eval_file FILE         the text (.txt, a document a line; .json, .jsonl) to measure it on
  --criteria A,B,...       selection criteria to prune by (default: all of them)
  --shares A,B,...         shares to prune (default: 0,0.1,...,1)
  --seed INT               seed of the criterion random (default: 0)
  --max_seq_length INT     tokens of a sequence (default: 128, or as many as the model has positions for)
  --max_eval_samples INT   measure on at most so many sequences (default: 256)
  --batch_size INT         sequences computed at a time (default: 16)
"""


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return run_command(words, HELP, _analyze)


def _options() -> Options:
    parser = Options()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ff_pattern")
    parser.add_argument("--ff_blocks")
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--dead", type=float, default=0.01)
    parser.add_argument("--duplicate", type=float, default=0.99)
    parser.add_argument("--trust_pickle", action="store_true")
    parser.add_argument("--revision")
    parser.add_argument("--revisions")
    parser.add_argument("--prune_curve", action="store_true")
    parser.add_argument("--eval_file")
    parser.add_argument("--criteria")
    parser.add_argument("--shares")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_seq_length", type=int)
    parser.add_argument("--max_eval_samples", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    return parser


def _analyze(words: Sequence[str]) -> None:
    options = _options().read(words)
    _check(options)
    # Imported late: importing torch and transformers takes seconds, and a mistake in the flags needs neither.
    from hf_recycle.records.file_checks import RecyclingFileError

    command = _prune_curves if options.prune_curve else _revisions if options.revisions else _magnitudes
    command = _blocks if options.blocks else command
    try:
        command(options)
    except RecyclingFileError as error:
        raise UserError(str(error)) from error


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
    curve_only = ("eval_file", "criteria", "shares")
    if options.prune_curve and options.eval_file is None:
        raise UserError("prune_curve needs a text to measure the loss on; pass eval_file")
    if not options.prune_curve and (given := [name for name in curve_only if getattr(options, name) is not None]):
        raise UserError(f"{given[0]} belongs to prune_curve; pass --prune-curve too")


def _magnitudes(options: argparse.Namespace) -> None:
    from hf_recycle.analysis.model import analyze
    from hf_recycle.analysis.tables import analysis_text

    thresholds = _thresholds(options)
    analyses = [analyze(source, options.ff_pattern, thresholds, options.ff_blocks) for source in _sources(options)]
    _print(options, {"models": [analysis.to_json() for analysis in analyses]}, lambda: analysis_text(analyses))
    if options.output is not None:
        from hf_recycle.analysis.figures import draw_analyses

        _say_where(draw_analyses(analyses, options.output))


def _blocks(options: argparse.Namespace) -> None:
    from hf_recycle.analysis.block_list import block_list, block_list_text
    from hf_recycle.analysis.checkpoint import Checkpoint

    lists = [block_list(Checkpoint(source, options.ff_pattern, options.ff_blocks)) for source in _sources(options)]
    _print(options, {"models": lists}, lambda: "\n\n".join(map(block_list_text, lists)))


def _revisions(options: argparse.Namespace) -> None:
    from hf_recycle.analysis.revisions import analyze_revisions, revisions_text

    states = analyze_revisions(options.models[0], options.revisions, options.ff_pattern)
    _print(options, {"revisions": [state.to_json() for state in states]}, lambda: revisions_text(states))
    if options.output is not None:
        from hf_recycle.analysis.revision_figures import draw_revisions

        _say_where(draw_revisions(states, options.output))


def _prune_curves(options: argparse.Namespace) -> None:
    from hf_recycle.cli.options import no_progress_bars

    no_progress_bars()
    from hf_recycle.analysis.curves import curves_text, draw_curves
    from hf_recycle.analysis.evaluation import EvaluationSettings
    from hf_recycle.analysis.pruning import PruneSettings, prune_curves

    settings = PruneSettings.parse(options.criteria, options.shares, options.seed, options.ff_pattern)
    evaluation = EvaluationSettings(
        options.eval_file, options.max_seq_length, options.max_eval_samples, options.batch_size
    )
    curves = [prune_curves(source, settings, evaluation) for source in _sources(options)]
    _print(options, {"models": [curve.to_json() for curve in curves]}, lambda: curves_text(curves))
    if options.output is not None:
        _say_where(draw_curves(curves, options.output))


def _sources(options: argparse.Namespace) -> list:
    from hf_recycle.analysis.source import Source

    return [Source(model, options.revision, trust_pickle=options.trust_pickle) for model in options.models]


def _thresholds(options: argparse.Namespace):
    from hf_recycle.analysis.blocks import Thresholds

    return Thresholds(options.dead, options.duplicate)


def _print(options: argparse.Namespace, content: dict, text) -> None:
    if options.json:
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        print(text())


def _say_where(paths: Sequence[Path]) -> None:
    # On stderr: with --json, stdout holds JSON and nothing else.
    print("figures: " + ", ".join(map(str, paths)), file=sys.stderr)
