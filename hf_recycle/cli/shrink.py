"""`hf-recycle shrink`: a smaller model without the pruned or the least important feed-forward neurons."""

import argparse
import sys
from pathlib import Path

from hf_recycle.cli.common import add_json_argument, no_progress_bars, print_result
from hf_recycle.cli.model_arguments import add_block_arguments, add_revision_argument, add_trust_argument
from hf_recycle.errors import UserError
from hf_recycle.utils.command_line import Parser, completed_by

HELP = "Take the pruned or the least important neurons out of a model."

_DESCRIPTION = """\
Take feed-forward neurons out of a model and save the smaller model that remains, with its tokenizer or processor, as a
plain transformers model. All layers of which the configuration knows one width get that of the one that keeps most
neurons, rounded up; the others are filled up with zeros. The result is checked against the original with the same
neurons masked, and both are timed.

  hf-recycle shrink runs/pruned --pruned_only --output small        what pruning has set to zero, for good
  hf-recycle shrink user/repo --fraction 0.3 --output small         the 30% least important neurons of every layer"""


def add_arguments(parser: Parser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument("model", metavar="MODEL", help="A folder, or a repository of the Hub.")
    parser.add_argument("--output", type=Path, metavar="DIR", help="Where the smaller model goes; a new folder.")
    add_json_argument(parser)
    parser.add_argument(
        "--pruned_only",
        action="store_true",
        help="Remove the neurons whose out-column is zero: the outputs stay the same.",
    )
    parser.add_argument("--fraction", type=float, help="Remove this share of every layer's neurons.")
    criterion = parser.add_argument(
        "--criterion",
        default="low_magnitude",
        metavar="NAME",
        help="With fraction: the neurons of lowest score go (default: %(default)s). One that looks at weights alone: "
        "low_magnitude, high_magnitude or random.",
    )
    completed_by(criterion, lambda prefix: ["low_magnitude", "high_magnitude", "random"])
    parser.add_argument(
        "--multiple_of", type=int, default=8, help="Round the width up to a multiple of it (default: %(default)s)."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the criterion random (default: %(default)s).")
    add_revision_argument(parser)
    add_trust_argument(parser)
    add_block_arguments(parser)


def run(options: argparse.Namespace) -> int:
    _check(options)

    from hf_recycle.analysis.pruning import check_criterion
    from hf_recycle.analysis.shrink import ShrinkSettings, shrink
    from hf_recycle.analysis.shrink_files import load_model, save_whole
    from hf_recycle.analysis.source import Source

    check_criterion(f"criterion={options.criterion!r}", options.criterion)
    no_progress_bars()
    source = Source(options.model, options.revision, trust_pickle=options.trust_pickle)
    model, processor = load_model(source, options.ff_pattern, options.ff_blocks)
    settings = ShrinkSettings(
        options.fraction, options.criterion, options.multiple_of, options.seed, options.ff_pattern, options.ff_blocks
    )
    shrunk = shrink(model, settings)
    save_whole(options.output, shrunk.model, processor)
    if processor is None:
        print(f"note: {options.model} has no tokenizer or processor that could be saved too", file=sys.stderr)
    found = _measured(model, shrunk)
    result = {"output": str(options.output), **found, "forward": vars(found["forward"])}
    print_result(options, result, lambda: _text(options.output, found))
    return 0


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


def _measured(model, shrunk) -> dict:
    """What became of the model."""
    from hf_recycle.analysis.random_inputs import random_inputs
    from hf_recycle.analysis.timing import forward, speedup

    inputs = random_inputs(model, batch=8, length=128)
    return {
        "architecture": type(model).__name__,
        "blocks": [
            {"name": name, "neurons": was, "width": now, "kept": len(shrunk.kept[name])}
            for name, (was, now) in shrunk.widths.items()
        ],
        "parameters": [model.num_parameters(), shrunk.model.num_parameters()],
        "difference": shrunk.difference,
        "inputs": list(next(iter(inputs.values())).shape),
        "forward": speedup(forward(model, inputs), forward(shrunk.model, inputs)),
    }


def _text(output: Path, found: dict) -> str:
    blocks, (before, after) = found["blocks"], found["parameters"]
    lines = [f"{output}: {found['architecture']}, {len(blocks)} feed-forward blocks"]
    for was, now in dict.fromkeys((block["neurons"], block["width"]) for block in blocks):
        sizes = [block["kept"] for block in blocks if (block["neurons"], block["width"]) == (was, now)]
        kept = f"{min(sizes):,} to {max(sizes):,}" if min(sizes) < max(sizes) else f"{sizes[0]:,}"
        lines.append(f"  neurons            {was:,} -> {now:,} in each of {len(sizes)} blocks, {kept} of them kept")
    shape = " x ".join(map(str, found["inputs"]))
    return "\n".join(
        [
            *lines,
            f"  parameters         {before:,} -> {after:,} ({100 * (after - before) / before:+.1f}%)",
            f"  outputs            differ from the masked model's by at most {found['difference']:.1e} of the largest",
            f"  forward ({shape})  {found['forward']}; medians of 11 pairs",
        ]
    )
