"""`hf-recycle resize`: a checkpoint of another feed-forward width, which training goes on from."""

import argparse
import sys
from pathlib import Path

from hf_recycle.cli.common import add_json_argument, no_progress_bars, print_result
from hf_recycle.cli.model_arguments import add_removal_arguments, add_text_arguments, removal_text
from hf_recycle.cli.shrink import check_output
from hf_recycle.errors import UserError
from hf_recycle.methods.registry import REINITIALIZATIONS
from hf_recycle.utils.command_line import Parser, completed_by

HELP = "Give a checkpoint another feed-forward width; training goes on from it."

_DESCRIPTION = """\
Give a checkpoint another feed-forward width. Weights, the optimizer's state, counts, ages and history come along, and
training that goes on from the new checkpoint sees the batches and the learning rates that it would have seen. A
narrower one loses the neurons of lowest score; a wider one gets new ones.

  hf-recycle resize runs/demo/checkpoint-750 --width 256 --output runs/narrow/checkpoint-750
  hf-recycle resize runs/demo/checkpoint-750 --width 1024 --birth split --output runs/wide/checkpoint-750
  hf-recycle train demo --output_dir runs/wide --resume_from_checkpoint true  the training goes on"""


def add_arguments(parser: Parser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="A checkpoint-N folder.")
    parser.add_argument("--width", type=int, help="Neurons of each feed-forward block from here on.")
    parser.add_argument("--output", type=Path, metavar="DIR", help="Where the new checkpoint goes; a new folder.")
    add_json_argument(parser)
    add_removal_arguments(parser)
    birth = parser.add_argument(
        "--birth",
        default="zero_out",
        metavar="NAME",
        help=f"What new neurons begin with (default: zero_out). {REINITIALIZATIONS.describe()}. gradmax looks at "
        "eval_file.".replace("%", "%%"),
    )
    completed_by(birth, lambda prefix: REINITIALIZATIONS.names())
    parser.add_argument(
        "--noise_scale", type=float, default=0.05, help="Of copy_noise and split (default: %(default)s)."
    )
    parser.add_argument("--ff_blocks", metavar="WORD", help="The part of a composite model (default: that of the run).")
    add_text_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if options.width is None:
        raise UserError("width is missing; pass the number of neurons that each block is to have")
    check_output(options.output, "the new checkpoint")

    from hf_recycle.analysis.data_scores import check_choice
    from hf_recycle.analysis.resize import ResizeSettings, values_for
    from hf_recycle.analysis.resize_checkpoint import resize_checkpoint

    check_choice("birth", options.birth, REINITIALIZATIONS)
    evaluation = removal_text(options)
    no_progress_bars()
    settings = ResizeSettings(options.criterion, options.fold, options.birth, options.noise_scale, options.seed)
    done = resize_checkpoint(
        Path(options.checkpoint),
        options.output,
        lambda model, blocks: values_for(model, blocks, options.width),
        settings,
        evaluation,
        options.ff_blocks,
    )
    if done.forgot_best:
        print("note: the best checkpoint so far has another width, and is no longer known as such", file=sys.stderr)
    result = {"output": str(options.output), **vars(done)}
    print_result(options, result, lambda: _text(options.output, done))
    return 0


def _text(output: Path, done) -> str:
    before, after = done.parameters
    lines = [f"{output}: step {done.step:,}, {len(done.widths)} feed-forward blocks"]
    for was, now in dict.fromkeys(done.widths.values()):
        lines.append(f"  neurons            {was:,} -> {now:,}")
    lines.append(f"  parameters         {before:,} -> {after:,} ({100 * (after - before) / before:+.1f}%)")
    lines.append(f"  outputs            differ by at most {done.difference:.1e} of the largest")
    if done.losses is not None:
        was, now = done.losses
        lines.append(f"  loss               {was:.4f} -> {now:.4f} nats per token of eval_file ({now - was:+z.4f})")
    lines.append(f"go on with: hf-recycle train ... --resume_from_checkpoint {output}")
    return "\n".join(lines)
