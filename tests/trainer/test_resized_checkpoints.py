"""Checkpoints of another width: line by line what was there, and a training that goes on as by hand."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_runs import losses, masked_sentences, run, tiny_bert, tiny_modernbert
from transformers import AutoConfig, AutoModelForMaskedLM, default_data_collator

from hf_recycle import RecyclingHistory
from hf_recycle.analysis.resize import ResizeSettings, values_for
from hf_recycle.analysis.resize_checkpoint import _resize_state, resize_checkpoint
from hf_recycle.checkpoints.file_list import check_list
from hf_recycle.errors import UserError
from hf_recycle.records.files import RecyclingFileError, read_config, read_history
from hf_recycle.records.history_checks import check_agreement, check_history

EVERYTHING = {
    "recycle_steps": 2,
    "recycle_fraction": 0.1,
    "recycle_smooth_steps": 3,
    "recycle_immunity": 1,
    "recycle_maturity": 3,
    "prune_fraction": 0.2,
    "prune_steps": 3,
    "prune_end": 8,
    "magnitude_steps": 2,
}
SAVING = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}


def make(folder, **settings):
    """A finished run of 10 steps without dropout; its checkpoint in the middle."""
    settings = {"model": tiny_bert(dropout=0.0)} | SAVING | settings
    trainer = run(folder, data=masked_sentences(), collator=default_data_collator, **settings)
    return trainer, Path(folder, "checkpoint-5")


def resize(checkpoint, output, width, **settings):
    return resize_checkpoint(
        checkpoint, output, lambda model, blocks: values_for(model, blocks, width), ResizeSettings(**settings)
    )


def go_on(folder, checkpoint, **settings):
    """The training goes on with a model made from the checkpoint's configuration."""
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(checkpoint))
    return make(folder, model=model, resume=str(checkpoint), **settings)[0]


def named_state(trainer, folder) -> dict[str, dict]:
    """The optimizer's state in a checkpoint by the names of parameters, as the trainer's own optimizer orders them."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    order = [names[id(p)] for group in trainer.optimizer.optimizer.param_groups for p in group["params"]]
    state = torch.load(Path(folder, "optimizer.pt"), weights_only=True)["state"]
    return {order[number]: entries for number, entries in state.items()}


# Within a block: the parameters that neurons lie in, and along which dimension; of a fused one in both halves.
PLACES = {
    "bert": {"intermediate.dense.weight": 0, "intermediate.dense.bias": 0, "output.dense.weight": 1},
    "modernbert": {"Wi.weight": "halves", "Wo.weight": 1},
}


def lines(key: str, value, place) -> list[torch.Tensor]:
    """The parts of an entry of the state that have a line for each neuron, as views `(d_ff, ...)`."""
    if key in ("exp_avg_sq_row", "exp_avg_sq_col"):  # Adafactor's: a number for each row, or each column
        return [value] if place == ("exp_avg_sq_row", "exp_avg_sq_col").index(key) else []
    return list(value.chunk(2)) if place == "halves" else [value.T if place == 1 else value]


@pytest.mark.parametrize("width", [20, 44])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bert", {}),
        pytest.param("modernbert", {}, marks=pytest.mark.slow),
        pytest.param("bert", {"optim": "muon"}, marks=pytest.mark.slow),
        pytest.param("bert", {"optim": "adafactor"}, marks=pytest.mark.slow),
    ],
)
def test_the_optimizers_state_comes_along_line_by_line(kind, settings, width, tmp_path):
    model = {"bert": lambda: tiny_bert(dropout=0.0), "modernbert": tiny_modernbert}[kind]()
    trainer, checkpoint = make(tmp_path / "run", model=model, **settings)
    output = tmp_path / "new" / "checkpoint-5"
    resize(checkpoint, output, width)
    before, after = named_state(trainer, checkpoint), named_state(trainer, output)
    assert before.keys() == after.keys()
    places = {
        f"{row.block}.{name}": (place, torch.tensor([old for old in row.former if old >= 0]))
        for row in RecyclingHistory.from_pretrained(output).resizes.itertuples()
        for name, place in PLACES[kind].items()
    }
    assert places.keys() <= before.keys()
    for name, key in [(name, key) for name, entries in before.items() for key in entries]:
        old, new = before[name][key], after[name][key]
        place, kept = places.get(name, (None, None))
        parts = [] if place is None or not isinstance(old, torch.Tensor) or old.dim() == 0 else lines(key, old, place)
        if not parts:
            assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new, (name, key)
            continue
        for was, now in zip(parts, lines(key, new, place), strict=True):
            assert len(now) == width
            assert torch.equal(now[: len(kept)], was[kept]), (name, key)
            born = now[len(kept) :]
            fill = 0.0 if key in ("exp_avg", "momentum_buffer") else was.mean()
            torch.testing.assert_close(born, torch.full_like(born, fill))


def fading(tensors, block) -> dict[int, int]:
    """The neurons of a block that fade in, and their ages."""
    pairs = [tensors.get(f"{block}/fade_in/{key}", torch.empty(0)).tolist() for key in ("index", "age")]
    return dict(zip(*pairs, strict=True))


@pytest.mark.parametrize("width", [20, 44])
def test_what_is_known_of_neurons_comes_along(width, tmp_path):
    _, checkpoint = make(tmp_path / "run", **EVERYTHING)
    output = tmp_path / "new" / "checkpoint-5"
    resize(checkpoint, output, width, criterion="random")
    assert check_list(output) == []
    before, after = (RecyclingHistory.from_pretrained(folder) for folder in (checkpoint, output))
    assert after.resizes["step"].tolist() == [5, 5]
    assert after.events.equals(before.events)
    state, new = (load_file(folder / "recycling_state.safetensors") for folder in (checkpoint, output))
    for row in after.resizes.itertuples():
        assert row.neurons == 32
        assert len(row.former) == width
        for number, old in enumerate(row.former):
            born = {"counts": 0, "last_phase": 2, "last_step": 5}
            for key, value in born.items():
                expected = state[f"{row.block}/{key}"][old] if old >= 0 else value
                assert new[f"{row.block}/{key}"][number] == expected
            assert after.pruned[row.block][number] == (old >= 0 and before.pruned[row.block][old])
        now = {row.former[index]: age for index, age in fading(new, row.block).items()}
        assert now == {old: age for old, age in fading(state, row.block).items() if old in row.former}
    assert after.stats["neurons"]["total"] == 2 * width
    assert f"At step 5 64 feed-forward neurons became {2 * width}" in (output / "README.md").read_text()
    if width > 32:
        assert after.ages[row.block][32:].tolist() == [0] * 12


def test_newborns_know_which_steps_the_optimizer_had_skipped():
    """So that their age counts the steps that it took."""
    kinds = ("counts", "last_phase", "last_step")
    tensors = {f"b/{kind}": torch.tensor(values) for kind, values in zip(kinds, ([0, 1], [0, 2], [0, 6]), strict=True)}
    _resize_state(tensors, "b", torch.tensor([1, 0, -1]), phase=2, step=9, skipped_steps=3)
    assert tensors["b/last_step"].tolist() == [6, 0, 9]
    assert tensors["b/skipped_steps"].tolist() == [0, 0, 3]


@pytest.mark.slow
@pytest.mark.parametrize("width", [20, 44])
def test_training_goes_on_with_every_method_and_can_be_resumed_and_resized_again(width, tmp_path):
    _, checkpoint = make(tmp_path / "run", **EVERYTHING)
    output = tmp_path / "new" / "checkpoint-5"
    resize(checkpoint, output, width)
    trainer = go_on(tmp_path / "new", output, **EVERYTHING)
    history = RecyclingHistory.from_pretrained(tmp_path / "new" / "checkpoint-10")
    assert len(history.resizes) == 2
    later = history.events[history.events["step"] > 5]
    assert set(later["step"]) == {6, 8}
    if width > 32:
        # Newborn neurons are immune in the next phase, and left alone until they are three steps old.
        for row in later[later["step"] == 6].itertuples():
            assert max(row.recycled) < 32
    again = tmp_path / "again" / "checkpoint-10"
    resize(tmp_path / "new" / "checkpoint-10", again, 32, criterion="high_magnitude")
    assert len(RecyclingHistory.from_pretrained(again).resizes) == 4
    assert trainer.state.global_step == 10


def batches_of(folder, model, **settings):
    kept = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: kept.append({key: value.clone() for key, value in given.items()}), with_kwargs=True
    )
    trainer, checkpoint = make(folder, model=model, masked_head=False, **settings)
    hook.remove()
    return trainer, checkpoint, [batch for batch in kept if "labels" in batch]


@pytest.mark.parametrize("width", [20, 44])
def test_training_goes_on_as_a_continuation_made_by_hand(width, tmp_path):
    """The batches and the rates of the run that was resized, AdamW with the lines of its moments, in a plain loop."""
    schedule = {"warmup_steps": 3, "weight_decay": 0.1, "max_grad_norm": 1.0}
    first, checkpoint, batches = batches_of(tmp_path / "run", tiny_bert(dropout=0.0), **schedule)
    assert len(batches) == 10
    output = tmp_path / "new" / "checkpoint-5"
    resize(checkpoint, output, width, criterion="high_magnitude")
    found = go_on(tmp_path / "new", output, masked_head=False, **schedule)

    model = AutoModelForMaskedLM.from_pretrained(output).train()
    state = named_state(first, output)
    decayed = [n for n in state if not ("bias" in n or "LayerNorm" in n)]
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[n] for n in state if n in decayed], "weight_decay": 0.1},
        {"params": [parameters[n] for n in state if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for name, entries in state.items():
        optimizer.state[parameters[name]] = {key: value.clone() for key, value in entries.items()}
    expected = []
    for step, batch in enumerate(batches[5:], 5):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (10 - step) / 7
        loss = model(**{k: v for k, v in batch.items() if k in ("input_ids", "labels")}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(found)[-5:] == pytest.approx(expected, abs=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_nothing_but_the_width_may_differ(tmp_path):
    _, checkpoint = make(tmp_path / "run", recycle_steps=2, recycle_fraction=0.1)
    output = tmp_path / "new" / "checkpoint-5"
    resize(checkpoint, output, 44)
    with pytest.raises(UserError, match=r"weights in .* are not those of the model"):
        make(tmp_path / "old width", resume=str(output), recycle_steps=2, recycle_fraction=0.1)
    for change, message in (
        ({"seed": 7, "recycle_seed": 42}, r"seed=42 \(now 7\)"),
        ({"recycle_fraction": 0.2}, r"recycle_fraction=0.1 \(now 0.2\)"),
    ):
        with pytest.raises(UserError, match=message):
            go_on(tmp_path / "other", output, **({"recycle_steps": 2, "recycle_fraction": 0.1} | change))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint in a fade-in, to be copied and damaged."""
    return make(tmp_path_factory.mktemp("small"), **EVERYTHING)[1]


def no_optimizer(folder):
    (folder / "optimizer.pt").unlink()


def of_deepspeed(folder):
    (folder / "latest").write_text("global_step5")


def unknown_state(folder):
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    for entries in saved["state"].values():
        entries["shadow"] = torch.zeros_like(entries["exp_avg"])
    torch.save(saved, folder / "optimizer.pt")


def other_groups(folder):
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    saved["param_groups"][0]["params"].append(saved["param_groups"][1]["params"].pop())
    torch.save(saved, folder / "optimizer.pt")


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (no_optimizer, {}, r"holds no optimizer.pt, so no training goes on from it"),
        (of_deepspeed, {}, "was written by DeepSpeed"),
        (unknown_state, {}, "optimizer state 'shadow' is unknown"),
        (other_groups, {}, "groups of parameters other than those of the Trainer"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), {}, "holds an adapter of PEFT"),
        (lambda folder: (folder / "trainer_state.json").unlink(), {}, "it has no trainer_state.json"),
        (lambda folder: None, {"fold": "least_squares"}, "can't be used at step 5, where neurons fade in"),
        (lambda folder: None, {"output": "checkpoint-7"}, "is the name of another step"),
    ],
)
def test_what_can_not_be_resized_is_refused_and_nothing_is_written(damage, settings, message, small, tmp_path):
    folder = tmp_path / "run" / "checkpoint-5"
    shutil.copytree(small, folder)
    damage(folder)
    (folder / "checkpoint_files.json").unlink()
    output = tmp_path / "new" / settings.pop("output", "checkpoint-5")
    with pytest.raises(UserError, match=message):
        resize(folder, output, 44, **settings)
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_a_failure_half_way_leaves_nothing(small, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_recycle.analysis.resize_checkpoint.write_list", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resize(small, tmp_path / "new" / "checkpoint-5", 44)
    assert not list((tmp_path / "new").iterdir())


def test_initial_weights_of_another_width_are_refused(tmp_path):
    _, checkpoint = make(tmp_path, l2_init_weight=0.1)
    with pytest.raises(UserError, match="is of a run with l2_init_weight"):
        resize(checkpoint, tmp_path / "new" / "checkpoint-5", 44)


def test_the_best_checkpoint_so_far_is_forgotten(small, tmp_path):
    folder = tmp_path / "run" / "checkpoint-5"
    shutil.copytree(small, folder)
    (folder / "checkpoint_files.json").unlink()
    state = json.loads((folder / "trainer_state.json").read_text())
    state |= {"best_model_checkpoint": str(folder), "best_metric": 1.0, "best_global_step": 5}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    done = resize(folder, tmp_path / "new" / "checkpoint-5", 44)
    assert done.forgot_best
    state = json.loads((tmp_path / "new" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] is state["best_metric"] is None


def test_a_forged_resize_is_refused(small, tmp_path):
    output = tmp_path / "new" / "checkpoint-5"
    resize(small, output, 44)
    tensors = load_file(output / "recycling_state.safetensors")
    assert tensors["bert.encoder.layer.0/last_step"][-1] == 5
    config, history = read_config(output), read_history(output)
    rows = history.to_pylist()
    resized = next(row for row in rows if row["kind"] == "resize")
    resized["recycled"] = [*resized["recycled"][:-1], 31]
    forged = pa.Table.from_pylist(rows, schema=history.schema)
    with pytest.raises(RecyclingFileError, match="names neurons that it did not have, or one twice"):
        check_history(output, forged, config["blocks"])
    tensors["bert.encoder.layer.0/last_step"][-1] = 4
    with pytest.raises(RecyclingFileError, match=r"last_step of block .* in the state contradicts"):
        check_agreement(output, config, tensors, history)
