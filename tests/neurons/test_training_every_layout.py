"""A model of each layout: what its neurons are, how they begin, six steps with recycling, a resumed run, a smaller
model."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from support.layouts import LAYOUTS
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_recycle import RecyclingArguments, RecyclingTrainer, find_feed_forwards
from hf_recycle.analysis.random_inputs import outputs, random_inputs
from hf_recycle.analysis.shrink import ShrinkSettings, shrink
from hf_recycle.neurons.table import NeuronTable

pytestmark = pytest.mark.slow


@pytest.fixture(params=LAYOUTS)
def build(request):
    return LAYOUTS[request.param]


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    monkeypatch.setattr("hf_recycle.plots.run.figure_images", lambda *_, **__: {})


def set_roles(blocks, indices, change) -> None:
    """Writes `change(role, values)` over the neurons `indices` of each block."""
    for block, index in zip(blocks, indices, strict=True):
        block.write(index, {role: change(role, values) for role, values in block.read(index).items()})


def some_of(blocks) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randperm(block.num_neurons, generator=generator)[: block.num_neurons // 2] for block in blocks]


def test_a_neuron_without_out_column_does_nothing(build, perturb):
    """Whatever the rest of it is: so the rows of the in-projection and the columns of the out-projection that are taken
    for one neuron are one."""
    model = perturb(build()).eval()
    blocks = find_feed_forwards(model)
    index, inputs = some_of(blocks), random_inputs(model, batch=2, length=8)
    whole = outputs(model, inputs)
    set_roles(blocks, index, lambda role, values: torch.zeros_like(values) if role == "out" else values)
    masked = outputs(model, inputs)
    set_roles(blocks, index, lambda role, values: values if role == "out" else values + torch.randn_like(values))
    assert torch.equal(outputs(model, inputs), masked)
    assert not torch.allclose(masked, whole)


def test_fresh_neurons_are_those_of_a_fresh_model(build):
    model, others = build(), [build() for _ in range(8)]
    views = NeuronTable.of(model).views
    for n in (0, len(views) - 1):
        drawn = views[n].sample_initial(400, torch.Generator().manual_seed(n))
        for role, values in drawn.items():
            pieces = [find_feed_forwards(other)[n][role] for other in others]
            fresh = torch.stack([piece.storage.read_full(piece, torch.arange(piece.length)) for piece in pieces])
            error = 1 / math.sqrt(2 * fresh.numel()) + 1 / math.sqrt(2 * values.numel())
            assert abs(values.std() - fresh.std()) <= 5 * error * fresh.std(), role
            assert abs(values.mean() - fresh.mean()) <= 10 * error * fresh.std(), role


class MeanSquare(RecyclingTrainer):
    """A loss that every model has."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        made = model(**inputs)
        first = next(value for value in made.to_tuple() if isinstance(value, Tensor) and value.is_floating_point())
        return (first.square().mean(), made) if return_outputs else first.square().mean()


def train(model: nn.Module, folder: Path, resume=None, save_strategy="no", callbacks=(), **settings) -> MeanSquare:
    inputs = random_inputs(model.eval(), batch=12, length=8)
    trainer = MeanSquare(
        model=model,
        callbacks=list(callbacks),
        args=RecyclingArguments(
            output_dir=str(folder),
            max_steps=6,
            per_device_train_batch_size=2,
            recycle_steps=2,
            recycle_fraction=0.25,
            deterministic_masking=False,
            remove_unused_columns=False,
            save_strategy=save_strategy,
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=[{name: values[i] for name, values in inputs.items()} for i in range(12)],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def test_only_the_chosen_lines_change(build, tmp_path):
    model = build()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    counts = train(model, tmp_path, learning_rate=0.0).neuron_table().counts
    blocks = find_feed_forwards(model)
    chosen = [counts[block.name].nonzero().flatten() for block in blocks]
    # Two phases of a quarter of the neurons.
    assert all(len(index) >= block.num_neurons // 4 for block, index in zip(blocks, chosen, strict=True))
    now = [block.read(index) for block, index in zip(blocks, chosen, strict=True)]
    with torch.no_grad():
        new = {name: parameter.clone() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    for block, index, values in zip(blocks, chosen, now, strict=True):
        for role, old in block.read(index).items():
            if not role.endswith(".bias"):
                assert (values[role] != old).any(dim=1).all(), (block.name, role)
        block.write(index, values)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, new[name]), name


def test_of_a_composite_model_the_part_that_is_asked_for(tmp_path):
    model = LAYOUTS["two towers"]()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    counts = train(model, tmp_path, learning_rate=0.0, ff_blocks="vision").neuron_table().counts
    assert [name.partition(".")[0] for name in counts] == ["vision_model"] * 2
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert len(changed) == 4
    assert all(name.startswith("vision_model.encoder.layers") and ".mlp." in name for name in changed)


class Unknown(nn.Module):
    """Called as a feed-forward block is, and none of a known layout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3, padding=1)


def test_what_is_left_out_is_said_before_the_first_step(tmp_path, caplog):
    model = LAYOUTS["vision"]()
    for layer in model.layers:
        layer.ffn = Unknown()
    transformers.utils.logging.enable_propagation()
    said = []

    class Listen(TrainerCallback):
        def on_step_begin(self, *_, **__):
            said.append([record.getMessage() for record in caplog.records if "left out" in record.getMessage()])

    try:
        train(model, tmp_path, callbacks=[Listen()])
    finally:
        transformers.utils.logging.disable_propagation()
    assert len(said[0]) == len(said[-1]) == 1
    assert "2 modules of ViTModel look like feed-forward blocks and are left out" in said[0][0]
    assert "2 × layers.*.ffn (Conv1d). No method touches them; 2 blocks were found." in said[0][0]


def test_a_checkpoint_in_the_middle_of_a_fade_in_resumes_to_the_bit(build, tmp_path):
    settings = {"learning_rate": 1e-2, "recycle_smooth_steps": 3, "save_strategy": "steps", "save_steps": 3}
    whole, resumed = build(), build()
    train(whole, tmp_path / "whole", **settings)
    trainer = train(resumed, tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3", **settings)
    assert trainer.neuron_table().phases == 2
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_the_smaller_model_from_a_file_computes_what_the_masked_one_does(build, perturb, tmp_path):
    model = perturb(build()).eval()
    shrunk = shrink(model, ShrinkSettings(fraction=0.5, multiple_of=2))
    shrunk.model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    loaded.config._experts_implementation = model.config._experts_implementation
    inputs = random_inputs(model, batch=2, length=8)
    blocks = find_feed_forwards(model)
    gone = [torch.tensor(sorted({*range(b.num_neurons)} - {*shrunk.kept[b.name].tolist()})) for b in blocks]
    set_roles(blocks, gone, lambda _, values: torch.zeros_like(values))
    torch.testing.assert_close(outputs(loaded, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-4)
    assert loaded.num_parameters() < model.num_parameters()
