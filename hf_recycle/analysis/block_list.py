"""Which feed-forward blocks a model has, and what looks like one and is left out: from its configuration alone."""

from typing import Any

from hf_recycle.analysis.checkpoint import Checkpoint
from hf_recycle.analysis.tables import table
from hf_recycle.neurons.left_out import alike


def block_list(checkpoint: Checkpoint) -> dict[str, Any]:
    """Blocks and modules left out, as JSON types."""
    found = checkpoint.survey
    return {
        "model": checkpoint.source.label,
        "architecture": type(checkpoint.model).__name__,
        "blocks": [{"name": block.name, "neurons": block.num_neurons, "gated": block.gated} for block in found.blocks],
        "left_out": [{"name": other.name, "made_of": other.made_of} for other in found.left_out],
    }


def block_list_text(found: dict[str, Any]) -> str:
    """The same as text: blocks that differ in the number of a layer or an expert alone are one row."""
    neurons = sum(block["neurons"] for block in found["blocks"])
    blocks = alike((block["name"], block["neurons"], block["gated"]) for block in found["blocks"])
    rows = [("block", "number", "neurons of each", "")]
    rows += [(name, str(n), f"{width:,}", "gated" if gated else "") for (name, width, gated), n in blocks.items()]
    lines = [
        f"{found['model']}: {found['architecture']}, {neurons:,} neurons in {len(found['blocks'])} feed-forward blocks",
        table(rows),
    ]
    if found["left_out"]:
        others = alike((other["name"], other["made_of"]) for other in found["left_out"])
        lines += [f"left out, because their layout is unknown: {len(found['left_out'])} modules"]
        lines += [table([(name, str(n), made_of) for (name, made_of), n in others.items()])]
    return "\n".join(lines)
