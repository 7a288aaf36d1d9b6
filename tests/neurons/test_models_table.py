"""Architectures of transformers: what is found, what is said, and that the page tells it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import transformers

DOCS = Path(__file__).parents[2] / "docs"
_SPEC = importlib.util.spec_from_file_location("models_table", DOCS / "models_table.py")
models_table = importlib.util.module_from_spec(_SPEC)
sys.modules["models_table"] = models_table
_SPEC.loader.exec_module(models_table)

# A word of the result for some of each kind, from reading their sources.
SAMPLE = {
    "bert": ("full", ("bert.encoder.layer.*",)),
    "clip": ("full", ("text_model.encoder.layers.*.mlp", "vision_model.encoder.layers.*.mlp")),
    "olmoe": ("full", ("model.layers.*.mlp.experts.*",)),
    "granitemoehybrid": ("full", ("model.layers.*.block_sparse_moe.experts.*", "model.layers.*.shared_mlp")),
    "jetmoe": ("full", ("model.layers.*.mlp.*",)),
    "lxmert": ("full", ("lxmert.encoder.x_layers.*", "lxmert.encoder.x_layers.*.visn_inter.dense")),
    "phi3": ("full", ("model.layers.*.mlp",)),
    "perceiver": ("full", ("perceiver.encoder.cross_attention.mlp", "perceiver.encoder.self_attends.*.mlp")),
    "squeezebert": ("refused", ()),
    "mamba": ("refused", ()),
    "resnet": ("refused", ()),
}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_some_of_each_kind(model_type):
    [row] = models_table.sweep([model_type])
    result, blocks = SAMPLE[model_type]
    assert (row.result, set(blocks) - set(row.blocks)) == (result, set())
    assert bool(row.reason) == (result != "full")


PAGE = (DOCS / "models.md").read_text(encoding="utf-8")
RESULTS = {row[0]: row[2] for row in (line[2:].split(" | ") for line in PAGE.splitlines()) if len(row) == 5}
needs_this_version = pytest.mark.skipif(
    f"transformers {transformers.__version__}:" not in PAGE, reason="the page is of another version of transformers"
)


@needs_this_version
def test_the_page_has_every_architecture():
    assert [name for name in RESULTS if name != "model type"] == list(models_table.architectures())


@needs_this_version
@pytest.mark.slow
def test_the_page_tells_what_is_found():
    """In every architecture of which something is left out, and in one of twelve of the others: all take two minutes,
    and the command that makes the page looks at them. None is without blocks, a list of what is left out, or a reason.
    """
    full = [name for name, result in RESULTS.items() if result == models_table.FULL]
    others = [name for name, result in RESULTS.items() if result in (models_table.PARTIAL, models_table.REFUSED)]
    assert len(others) > 20
    for row in models_table.sweep([*others, *full[::12]]):
        assert (row.result == "full") == bool(row.blocks and not row.reason), row
        assert (row.result == "partial") == bool(row.blocks and row.reason), row
        # What can't be built depends on which other packages are installed.
        if row.result != models_table.NOT_BUILT:
            assert models_table.line(row) in PAGE, "run python docs/models_table.py docs/models.md"
