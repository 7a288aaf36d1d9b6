"""L2 to the initial weights, and shrink and perturb: against loops written out, in one run and a resumed one."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_runs import masked_sentences, tiny_bert, tiny_modernbert
from test_resume import assert_same_run
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_recycle import L2InitCallback, RecyclingTrainer, ShrinkPerturbCallback, find_feed_forwards
from hf_recycle.methods.l2_init import FILE, parameters_of

L2 = {"l2_init_weight": 3.0}
PERTURB = {"shrink_perturb_steps": 3, "shrink_perturb_keep": 0.7}


class Loop(TrainerCallback):
    """After each optimizer step, the formula by hand, with the learning rate of that step."""

    def __init__(self, weight, names=lambda name: True):
        self.weight, self.names = weight, names

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.initial = copy.deepcopy(dict(model.named_parameters()))

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if self.names(name):
                old = parameter.detach().clone()
                parameter.copy_(old - self.rates[parameter] * self.weight * (old - self.initial[name]))


def stock(folder, callbacks, model=None, **more):
    args = {"max_steps": 8, "learning_rate": 0.01, "use_cpu": True, "disable_tqdm": True, "report_to": "none"} | more
    trainer = Trainer(
        tiny_bert(0.0) if model is None else model,
        TrainingArguments(str(folder), **{"save_strategy": "no", **args}),
        train_dataset=masked_sentences(),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return trainer


def assert_close(model, reference, **tolerance):
    for (name, found), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, **({"rtol": 1e-5, "atol": 1e-7} | tolerance), msg=name)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_l2_init_is_the_formula(optim, tmp_path):
    """A linear schedule, whose rate of the next step is another, and weight decay in the optimizer's own step."""
    settings = {"optim": optim, "weight_decay": 0.1, "adam_epsilon": 1e-3}
    found = stock(tmp_path, [L2InitCallback(weight=3.0)], **settings).model
    assert_close(found, stock(tmp_path, [Loop(3.0)], **settings).model)
    without = stock(tmp_path, [], **settings).model
    start = dict(tiny_bert(0.0).named_parameters())
    moved = [sum(float((p - start[n]).detach().norm()) for n, p in m.named_parameters()) for m in (found, without)]
    assert moved[0] < 0.95 * moved[1]


@pytest.mark.parametrize("parts", [["ff"], ["attention", "embeddings"]])
def test_parts(parts, tmp_path):
    words = {"ff": ("intermediate.dense", "output.dense"), "attention": ("attention",), "embeddings": ("_embeddings",)}

    def named(name):
        inside = "attention" in name
        return any(word in name and (part == "attention") == inside for part in parts for word in words[part])

    model = tiny_bert(0.0)
    chosen = parameters_of(model, find_feed_forwards(model), parts)
    # Of the modules of BERT's attention, the norm behind it is one.
    assert {id(p) for p in chosen.values()} == {id(p) for name, p in model.named_parameters() if named(name)}
    settings = {"optim": "sgd"}
    found = stock(tmp_path, [L2InitCallback(weight=3.0, parts=parts)], **settings).model
    assert_close(found, stock(tmp_path, [Loop(3.0, named)], **settings).model)


@pytest.mark.parametrize("settings", [L2, PERTURB, {**L2, **PERTURB, "recycle_steps": 2, "recycle_smooth_steps": 3}])
def test_resume_is_exact(settings, train):
    """Also in another folder, which the initial weights are brought to with the checkpoint."""
    whole = train("whole", max_steps=9, save_strategy="steps", save_steps=5, **settings)
    folder = Path(whole.args.output_dir)
    other = folder.with_name("resumed")
    shutil.copytree(folder / "checkpoint-5", other / "checkpoint-5")
    if "l2_init_weight" in settings:
        shutil.copyfile(folder / FILE, other / FILE)
    resumed = train("resumed", resume=True, max_steps=9, save_strategy="steps", save_steps=5, **settings)
    assert_same_run(whole, resumed, folder / "checkpoint-9", other / "checkpoint-9")
    checksum = whole.neuron_table().initial_weights
    assert (checksum > 0) == ("l2_init_weight" in settings)
    assert resumed.neuron_table().initial_weights == checksum


def test_initial_weights_that_are_lost_or_of_another_run_are_refused(train, tmp_path, arguments):
    whole = train("whole", max_steps=4, save_strategy="steps", save_steps=2, **L2)
    folder = Path(whole.args.output_dir)
    file, checkpoint = folder / FILE, folder / "checkpoint-2"

    def resume(**settings):
        args = arguments(max_steps=4, save_strategy="no", **L2 | settings)
        RecyclingTrainer(tiny_bert(), args, train_dataset=masked_sentences()).train(str(checkpoint))

    kept = file.read_bytes()
    file.unlink()
    with pytest.raises(ValueError, match=rf"l2_init_weight=3.0 needs .*{FILE} is not beside it: copy it from that run"):
        resume()
    file.write_bytes(kept[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match=f"{FILE} is not the file of its run"):
        resume()
    train("off", max_steps=4, save_strategy="steps", save_steps=2)
    checkpoint = folder.with_name("off") / "checkpoint-2"
    with pytest.raises(ValueError, match="its run had none"):
        resume()


def test_a_stock_trainer_goes_on_from_the_file(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "optim": "sgd"}
    whole = stock(tmp_path, [L2InitCallback(weight=3.0)], **settings)
    again = stock(
        tmp_path, [L2InitCallback(weight=3.0)], resume_from_checkpoint=str(tmp_path / "checkpoint-4"), **settings
    )
    assert_close(again.model, whole.model, rtol=0, atol=0)


class Look(TrainerCallback):
    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("build", [tiny_bert, tiny_modernbert])
def test_shrink_perturb_mixes_in_a_fresh_model(build, tmp_path):
    """Its standard deviations are those of a model built anew, parameter by parameter; other weights each time."""
    before, after = Look(), Look()
    callbacks = [before, ShrinkPerturbCallback(steps=3, keep=0.7), after]
    model = stock(tmp_path, callbacks, build(), max_steps=9, optim="sgd").model
    assert [step for step in before.weights if _differ(before.weights[step], after.weights[step])] == [3, 6]
    new, fresh = build(), {}
    for step in (3, 6):
        fresh[step] = {
            name: (after.weights[step][name] - 0.7 * before.weights[step][name]) / 0.3
            for name, _ in model.named_parameters()
        }
    for name, parameter in new.named_parameters():
        values = fresh[3][name]
        std = float(parameter.detach().std()) if parameter.numel() > 1 else 0.0
        if std < 1e-6:  # a bias, or the weight of a norm
            torch.testing.assert_close(values, parameter.detach(), rtol=0, atol=1e-5, msg=name)
        else:
            assert float(values.std()) == pytest.approx(std, rel=5 / (2 * parameter.numel()) ** 0.5), name
            assert not torch.allclose(values, fresh[6][name], atol=std / 10), name


def _differ(one, other):
    return any(not torch.equal(value, other[name]) for name, value in one.items())


def test_shrink_perturb_leaves_pruned_and_fading_neurons(arguments):
    before, after = Look(), Look()
    settings = {"recycle_steps": 2, "recycle_fraction": 0.25, "recycle_smooth_steps": 9, "recycle_end": 2}
    args = arguments(max_steps=5, **PERTURB, **settings, prune_fraction=0.25, prune_start=1, prune_end=1, prune_steps=1)
    trainer = RecyclingTrainer(tiny_bert(0.0), args, train_dataset=masked_sentences(), callbacks=[before])
    trainer.add_callback(after)
    trainer.train()
    for layer, state in enumerate(trainer.neuron_table().states):
        name = f"bert.encoder.layer.{layer}.intermediate.dense.weight"
        assert (int(state.pruned.sum()), int(state.fading_in().sum())) == (8, 8)
        same = (before.weights[3][name] == after.weights[3][name]).all(1)
        assert torch.equal(same, state.fading_in())
        assert not after.weights[3][name][state.pruned].any()


@pytest.mark.parametrize(
    ("callback", "settings", "message"),
    [
        (L2InitCallback, {"weight": -1}, "weight=-1 is not allowed"),
        (
            L2InitCallback,
            {"weight": 1, "parts": ["head"]},
            "must be all, or a list of some of ff, attention, embeddings",
        ),
        (L2InitCallback, {"weight": 1, "parts": []}, r"parts=\[\] is not allowed"),
        (ShrinkPerturbCallback, {"steps": 2, "keep": 1.0}, r"keep=1.0 is not allowed: it must be a number in \[0, 1\)"),
    ],
)
def test_values_that_are_not_allowed(callback, settings, message):
    with pytest.raises(ValueError, match=message):
        callback(**settings)


def test_what_can_not_work_is_refused_before_training(tmp_path):
    with pytest.raises(
        ValueError, match=r"can't be used with torch.bfloat16 weights, in which its small steps are lost"
    ):
        stock(tmp_path, [L2InitCallback(weight=1.0)], tiny_bert().bfloat16())
    frozen = tiny_bert()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("attention" not in name)
    with pytest.raises(ValueError, match=r"l2_init_parts=\['attention'\] names nothing that BertForMaskedLM trains"):
        stock(tmp_path, [L2InitCallback(weight=1.0, parts=["attention"])], frozen)
