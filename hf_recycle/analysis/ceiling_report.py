"""What the neurons of models do on a text, as tables, as a figure and in the card of a run's folder."""

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from hf_recycle.analysis.ceiling import CRITERION, FOLD, KINDS, Ceiling
from hf_recycle.analysis.labels import short_labels
from hf_recycle.analysis.source import Source
from hf_recycle.analysis.tables import table
from hf_recycle.analysis.verdict import Cost
from hf_recycle.errors import UserError
from hf_recycle.methods.activity import DORMANT
from hf_recycle.mlm.tasks import TASKS
from hf_recycle.plots.ceiling import ceiling_figure
from hf_recycle.plots.style import save
from hf_recycle.records.ceiling_file import write_ceiling
from hf_recycle.records.files import RECYCLING_FILES
from hf_recycle.records.naming import short_names

LEGEND = f"""\
dead: never fires on the text. dormant: mean activation at most {DORMANT:g} of its layer's mean; the dead are among
them. dup.: in-row and out-column nearly parallel to those of an earlier neuron. added: nats of loss, without any
training afterwards, ± one standard deviation. Neurons go by {CRITERION}, and the others make up for them by {FOLD}."""


def ceiling_text(ceilings: Sequence[Ceiling]) -> str:
    """For each model a table of its blocks, one of the curve, and the verdict."""
    return "\n\n".join([*map(_model, ceilings), LEGEND])


def draw_ceilings(ceilings: Sequence[Ceiling], folder: Path) -> list[Path]:
    """Draws `ceiling` into `folder`: a row of panels for each model. Returns the paths."""
    labels = short_labels([found.label for found in ceilings])
    figure = ceiling_figure({label: found.to_json() for label, found in zip(labels, ceilings, strict=True)})
    return save(figure, folder / "ceiling")


def check_has_card(source: Source) -> Path:
    """The folder of a checkpoint whose card is ours.

    Raises:
        UserError: it is none.
    """
    if source.folder is None or not all((source.folder / name).is_file() for name in RECYCLING_FILES):
        raise UserError(
            f"card needs a folder that a RecyclingTrainer has saved, and {source.name!r} is none; leave card out"
        )
    return source.folder


def write_to_card(found: Ceiling, folder: Path) -> None:
    """Keeps what was found in a run's folder, and writes its card anew."""
    from hf_recycle.card.card import write_card

    write_ceiling(folder, found.to_json())
    write_card(folder)


def _model(found: Ceiling) -> str:
    names = short_names([block.name for block in found.blocks])
    blocks: list[tuple[str, ...]] = [("block", "neurons", "dead", "dormant", "dup.", "half of it taken away: added")]
    for block in found.blocks:
        counts = (f"{len(getattr(block, kind)):,}" for kind in KINDS)
        blocks.append((names[block.name], f"{block.neurons:,}", *counts, _cost(block.half)))
    curve: list[tuple[str, ...]] = [("taken away of every block", "loss", "added", "parameters", "FLOPs")]
    for point in found.curve:
        saved = (f"-{100 * point.parameters / found.parameters:.1f}%", f"-{100 * point.flops:.1f}%")
        curve.append((f"{100 * point.share:g}%", f"{point.loss:.4f}", _cost(point.cost), *saved))
    heading = (
        f"{found.label}: {found.architecture}, {found.neurons:,} neurons in {len(found.blocks)} feed-forward "
        f"block{'s' * (len(found.blocks) != 1)}; loss {found.loss:.4f} nats per {TASKS[found.task].predicted} "
        f"({found.tokens:,} of them in {found.batches} batches) on {found.text}"
    )
    pruned = [f"  {found.pruned:,} more neurons are pruned: their out-column is zero."] if found.pruned else []
    verdict = [textwrap.fill(sentence, 118) for sentence in found.verdict.sentences]
    return "\n".join([heading, table(blocks), *pruned, "", table(curve), "", *verdict, *_command(found)])


def _command(found: Ceiling) -> list[str]:
    """The command that shrinks as far as is within the noise."""
    free = found.shrinkable
    if not free.cost.is_noise:
        return []
    revision = found.revision or ""
    model = f"hf://{found.label.replace(revision[:8], revision, 1)}" if revision else found.label
    words = ["hf-recycle", "shrink", model, "--fraction", f"{free.share:g}", "--criterion", CRITERION]
    return ["  " + shlex.join([*words, "--fold", FOLD, "--eval_file", found.text, "--output", "small"])]


def _cost(cost: Cost) -> str:
    return f"{cost.mean:+z.4f} ± {cost.sd:.4f}"
