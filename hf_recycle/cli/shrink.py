"""`hf-recycle shrink`: a smaller model without the pruned or the least important feed-forward neurons."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from hf_recycle.cli.common import add_json_argument, no_progress_bars, print_result
from hf_recycle.cli.model_arguments import (
    add_block_arguments,
    add_removal_arguments,
    add_revision_argument,
    add_text_arguments,
    add_trust_argument,
    removal_text,
)
from hf_recycle.errors import UserError
from hf_recycle.utils.command_line import Parser

HELP = "Take the pruned or the least important neurons out of a model."

_DESCRIPTION = """\
Take feed-forward neurons out of a model and save the smaller model that remains, with its tokenizer or processor, as a
plain transformers model. All layers of which the configuration knows one width get that of the one that keeps most
neurons, rounded up; the others are filled up with zeros. The result is checked against the original with the same
neurons masked, and both are timed, and measured on a text if there is one.

  hf-recycle shrink runs/pruned --pruned_only --output small        what pruning has set to zero, for good
  hf-recycle shrink user/repo --fraction 0.3 --output small         the 30% smallest neurons of every layer
  hf-recycle shrink user/repo --fraction 0.3 --criterion obs --fold least_squares --eval_file my.txt --output small
      those that the others can make up for best"""


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
    add_removal_arguments(parser)
    parser.add_argument(
        "--multiple_of", type=int, default=8, help="Round the width up to a multiple of it (default: %(default)s)."
    )
    add_text_arguments(parser)
    add_revision_argument(parser)
    add_trust_argument(parser)
    add_block_arguments(parser)


def run(options: argparse.Namespace) -> int:
    _check(options)

    from hf_recycle.analysis.evaluation import load_language_model
    from hf_recycle.analysis.shrink import ShrinkSettings, shrink
    from hf_recycle.analysis.shrink_files import load_model, save_whole
    from hf_recycle.analysis.source import Source

    evaluation = removal_text(options)
    no_progress_bars()
    source = Source(options.model, options.revision, trust_pickle=options.trust_pickle)
    model, processor = load_model(source, options.ff_pattern, options.ff_blocks)
    text = None if evaluation is None else load_language_model(source, evaluation, model)
    settings = ShrinkSettings(
        options.fraction,
        options.criterion,
        options.fold,
        options.multiple_of,
        options.seed,
        options.ff_pattern,
        options.ff_blocks,
    )
    shrunk = shrink(model, settings, text)
    save_whole(options.output, shrunk.model, processor)
    if processor is None:
        print(f"note: {options.model} has no tokenizer or processor that could be saved too", file=sys.stderr)
    found = _measured(model, shrunk, text)
    result = {"output": str(options.output), **found, "forward": vars(found["forward"])}
    print_result(options, result, lambda: _text(options.output, found))
    return 0


def _check(options: argparse.Namespace) -> None:
    check_output(options.output, "the smaller model")
    if options.pruned_only == (options.fraction is not None):
        raise UserError("pass either pruned_only or fraction: which neurons go?")
    if options.fraction is not None and not 0 < options.fraction < 1:
        raise UserError(
            f"fraction={options.fraction} must lie between 0 and 1, both excluded: every layer keeps a neuron"
        )
    if options.multiple_of < 1:
        raise UserError(f"multiple_of={options.multiple_of} must be at least 1")


def check_output(output: Path | None, what: str) -> None:
    """Refuses a folder that can't be a new one.

    Raises:
        UserError: as said.
    """
    if output is None:
        raise UserError(f"output is missing; pass the folder where {what} goes")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"output={str(output)!r} exists already; name a new folder")


def _measured(model, shrunk, text) -> dict:
    """What became of the model."""
    from hf_recycle.analysis.random_inputs import random_inputs
    from hf_recycle.analysis.timing import forward, speedup

    inputs = random_inputs(model, batch=8, length=128)
    loss = {} if text is None else {"loss": [text.loss(), replace(text, model=shrunk.model).loss()]}
    return {
        "architecture": type(model).__name__,
        "blocks": [
            {"name": name, "neurons": was, "width": now, "kept": len(shrunk.kept[name])}
            for name, (was, now) in shrunk.widths.items()
        ],
        "parameters": [model.num_parameters(), shrunk.model.num_parameters()],
        "difference": shrunk.difference,
        **loss,
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
    if "loss" in found:
        was, now = found["loss"]
        lines.append(f"  loss               {was:.4f} -> {now:.4f} nats per token of eval_file ({now - was:+z.4f})")
    shape = " x ".join(map(str, found["inputs"]))
    return "\n".join(
        [
            *lines,
            f"  parameters         {before:,} -> {after:,} ({100 * (after - before) / before:+.1f}%)",
            f"  outputs            differ from the masked model's by at most {found['difference']:.1e} of the largest",
            f"  forward ({shape})  {found['forward']}; medians of 11 pairs",
        ]
    )
