"""`hf-recycle shrink`: a smaller model without the pruned or the least important feed-forward neurons."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_recycle.cli.options import Options, no_progress_bars, run_command
from hf_recycle.errors import UserError

HELP = """\
usage: hf-recycle shrink MODEL --output DIR (--pruned-only | --fraction FLOAT) [--argument VALUE ...]

Take feed-forward neurons out of a model and save the smaller model that remains, with its tokenizer or processor, as a
plain transformers model. All layers of which the configuration knows one width get that of the one that keeps most
neurons, rounded up; the others are filled up with zeros. The result is checked against the original with the same
neurons masked, and both are timed.

  hf-recycle shrink runs/pruned --pruned-only --output small        what pruning has set to zero, for good
  hf-recycle shrink user/repo --fraction 0.3 --output small         the 30% least important neurons of every layer

  --output DIR        where the smaller model goes; a new folder
  --pruned-only       remove the neurons whose out-column is zero: the outputs stay the same
  --fraction FLOAT    remove this share of every layer's neurons
  --criterion NAME    with fraction: selection criterion, the neurons of lowest score go (default: low_magnitude)
  --multiple_of INT   round the width up to a multiple of it (default: 8)
  --seed INT          seed of the criterion random (default: 0)
  --revision NAME     branch, tag or commit of a repository (or write MODEL as hf://user/repo@revision)
  --ff_blocks WORD    of a composite model, the part that is meant: vision, language, encoder, decoder, ...
  --ff_pattern TEXT   linear layers of the feed-forward blocks, for a model of unknown layout: 'fc1 -> fc2'
"""


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return run_command(words, HELP, _shrink)


def _shrink(words: Sequence[str]) -> None:
    parser = Options()
    parser.add_argument("model")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--pruned_only", action="store_true")
    parser.add_argument("--fraction", type=float)
    parser.add_argument("--criterion", default="low_magnitude")
    parser.add_argument("--multiple_of", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--revision")
    parser.add_argument("--ff_pattern")
    parser.add_argument("--ff_blocks")
    options = parser.read(words)
    _check(options)

    from hf_recycle.analysis.pruning import check_criterion
    from hf_recycle.analysis.shrink import ShrinkSettings, shrink
    from hf_recycle.analysis.shrink_files import load_model, save_whole
    from hf_recycle.analysis.source import Source

    check_criterion(f"criterion={options.criterion!r}", options.criterion)
    no_progress_bars()
    source = Source(options.model, options.revision)
    model, processor = load_model(source, options.ff_pattern, options.ff_blocks)
    settings = ShrinkSettings(
        options.fraction, options.criterion, options.multiple_of, options.seed, options.ff_pattern, options.ff_blocks
    )
    shrunk = shrink(model, settings)
    save_whole(options.output, shrunk.model, processor)
    if processor is None:
        print(f"note: {options.model} has no tokenizer or processor that could be saved too", file=sys.stderr)
    _report(options, model, shrunk)


def _check(options: argparse.Namespace) -> None:
    if options.output is None:
        raise UserError("output is missing; pass the folder where the smaller model goes")
    if options.output.exists() and not (options.output.is_dir() and not any(options.output.iterdir())):
        raise UserError(f"output={str(options.output)!r} exists already; name a new folder")
    if options.pruned_only == (options.fraction is not None):
        raise UserError("pass either pruned_only or fraction: which neurons go?")
    if options.fraction is not None and not 0 < options.fraction < 1:
        raise UserError(
            f"fraction={options.fraction} must lie between 0 and 1, both excluded: every layer keeps a neuron"
        )
    if options.multiple_of < 1:
        raise UserError(f"multiple_of={options.multiple_of} must be at least 1")


def _report(options: argparse.Namespace, model, shrunk) -> None:
    from hf_recycle.analysis.random_inputs import random_inputs
    from hf_recycle.analysis.timing import forward, speedup

    before, after = model.num_parameters(), shrunk.model.num_parameters()
    inputs = random_inputs(model, batch=8, length=128)
    shape = " x ".join(map(str, next(iter(inputs.values())).shape))
    measured = speedup(forward(model, inputs), forward(shrunk.model, inputs))
    print(f"{options.output}: {type(model).__name__}, {len(shrunk.widths)} feed-forward blocks")
    for was, now in dict.fromkeys(shrunk.widths.values()):
        sizes = [len(shrunk.kept[name]) for name, width in shrunk.widths.items() if width == (was, now)]
        kept = f"{min(sizes):,} to {max(sizes):,}" if min(sizes) < max(sizes) else f"{sizes[0]:,}"
        print(f"  neurons            {was:,} -> {now:,} in each of {len(sizes)} blocks, {kept} of them kept")
    print(f"  parameters         {before:,} -> {after:,} ({100 * (after - before) / before:+.1f}%)")
    print(f"  outputs            differ from the masked model's by at most {shrunk.difference:.1e} of the largest")
    print(f"  forward ({shape})  {measured}; medians of 11 pairs")
