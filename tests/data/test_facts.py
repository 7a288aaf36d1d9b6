"""The built-in task of facts: what a sample is, what comes when, what is refused, and a run of it."""

from itertools import pairwise

import pytest
import torch

from hf_recycle.data.arguments import DataArguments
from hf_recycle.data.facts import Facts, facts_tokenizer
from hf_recycle.errors import UserError
from hf_recycle.runs.parse import parse_run
from hf_recycle.runs.run import Run


def told(facts, tokenizer, index):
    """A sample in words: the two keys and the value."""
    sample = facts[index]
    words = tokenizer.convert_ids_to_tokens(sample["input_ids"])
    assert (words[0], words[3]) == ("[CLS]", "[MASK]")
    assert sample["labels"][:3] == [-100, -100, -100]
    return words[1], words[2], tokenizer.convert_ids_to_tokens(sample["labels"][3])


def test_every_task_has_the_same_keys_and_new_values_and_every_epoch_all_facts_once():
    facts, tokenizer = Facts(keys=6, values=5, number=30, tasks=3, epochs=2), facts_tokenizer(6, 5)
    assert len(facts) == 180
    rows = [told(facts, tokenizer, index) for index in range(180)]
    epochs = [rows[start : start + 30] for start in range(0, 180, 30)]
    for first, second in zip(epochs[::2], epochs[1::2], strict=True):
        assert first != second, "another order"
        assert sorted(first) == sorted(second), "the same facts"
    keys = [{row[:2] for row in epoch} for epoch in epochs]
    assert {first for first, _ in keys[0]}.isdisjoint({second for _, second in keys[0]})
    assert all(len(pairs) == 30 and pairs == keys[0] for pairs in keys)
    values = [{row[:2]: row[2] for row in epoch} for epoch in epochs[::2]]
    for before, after in pairwise(values):
        kept = sum(before[pair] == after[pair] for pair in before)
        assert kept < 15, "a fifth of them by chance"
    assert [told(facts.last_task(), tokenizer, index) for index in range(30)] == epochs[-1]
    assert facts.__getitems__([3, 179]) == [facts[3], facts[179]]
    assert Facts(6, 5, 30, 3, 2)[100] == facts[100], "a pure function of its numbers"


def test_values_are_uniform():
    facts = Facts(64, 8, 4096)
    values = [facts[index]["labels"][-1] - 5 - 128 for index in range(4096)]  # behind 5 special words and the keys
    counts = torch.bincount(torch.tensor(values), minlength=8)
    assert (counts - 512).abs().max() < 5 * 21.2  # five standard deviations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"facts_keys": 8}, "facts_keys=8 is a setting of dataset_name='facts'; pass that too"),
        ({"dataset_name": "facts", "facts_values": 0}, "facts_values=0 must be at least 1"),
        ({"dataset_name": "facts", "facts_number": 4097}, "facts_number=4097 is more than the 4096 pairs"),
        ({"dataset_name": "facts", "streaming": True}, "streaming=True can't be used with dataset_name='facts'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DataArguments(**settings)


SMALL = "facts --use_cpu true --disable_tqdm true --facts_keys 4 --facts_values 4 --per_device_train_batch_size 8"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task clm", "task='clm' can't be used with dataset_name='facts'"),
        ("--tokenizer_name x", "tokenizer_name='x' can't be used with dataset_name='facts'"),
        ("--facts_tasks 2 --train_sampling_strategy random", "facts_tasks=2 needs train_sampling_strategy=sequential"),
    ],
)
def test_arguments_that_do_not_go_with_facts(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Run.prepare(parse_run([*SMALL.split(), *words.split(), "--output_dir", str(tmp_path / "run")]))


@pytest.mark.slow
def test_a_run_sees_one_task_after_the_other(tmp_path, monkeypatch):
    """Through the ordinary Trainer: two tasks of three epochs of 16 facts, eight a step, in order."""
    words = "--facts_tasks 2 --facts_epochs 3 --train_sampling_strategy sequential --max_steps 12 --save_strategy no"
    run = Run.prepare(parse_run([*SMALL.split(), *words.split(), "--output_dir", str(tmp_path / "run")]))
    seen, step = [], run.trainer.training_step

    def noting(model, inputs, *rest, **kwargs):
        seen.extend(zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True))
        return step(model, inputs, *rest, **kwargs)

    monkeypatch.setattr(run.trainer, "training_step", noting)
    run.trainer.train()
    facts = Facts(4, 4, 16, tasks=2, epochs=3)
    assert seen == [(row["input_ids"], row["labels"]) for row in (facts[i] for i in range(96))]
    assert run.trainer.evaluate()["eval_loss"] > 0
