"""What overtraining refuses, before the first step."""

from types import SimpleNamespace

import pytest
from support.tiny_runs import sentences, tiny_bert
from torch.utils.data import IterableDataset

from hf_recycle.checkpoints.file_list import LIST_FILE
from hf_recycle.engines.checks import check_can_overtrain

HALF = {"overtrain_subset": "smallest", "overtrain_fraction": 0.5}
OVERTRAINING = {"overtrain_steps": 4, "overtrain_batches": 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overtrain_steps": 4}, "overtrain_steps=4 needs overtrain_batches too"),
        ({"overtrain_batches": 4}, "overtrain_batches=4 needs overtrain_steps too"),
        ({**OVERTRAINING, "overtrain_subset": "small"}, "overtrain_subset='small' is not allowed: .*all, smallest"),
        ({**OVERTRAINING, "overtrain_batches": 2.5}, "overtrain_batches=2.5 is not allowed"),
        ({**OVERTRAINING, "overtrain_batches": -1}, "overtrain_batches=-1 is not allowed"),
        ({**OVERTRAINING, "overtrain_steps": 1.5}, "overtrain_steps=1.5 is not allowed"),
        ({**OVERTRAINING, **HALF, "overtrain_fraction": 0}, r"overtrain_fraction=0 is not allowed: .*\(0, 1\]"),
        ({**OVERTRAINING, "overtrain_fraction": 0.5}, "overtrain_fraction=0.5 can't be used with .*subset='all'"),
        ({**OVERTRAINING, **HALF, "overtrain_fraction": 0.03}, "overtrain_fraction=0.03 of the 32 neurons of bert"),
    ],
)
def test_bad_values_are_refused(settings, message, train):
    with pytest.raises(ValueError, match=message):
        train(**settings)


class Stream(IterableDataset):
    def __iter__(self):
        yield from sentences()


def test_a_stream_is_refused(train):
    with pytest.raises(ValueError, match=r"overtrain_steps needs a training set with a length.*Stream is a stream"):
        train(data=Stream(), **OVERTRAINING)


def test_a_frozen_feed_forward_is_refused(train):
    model = tiny_bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("dense" not in name)
    with pytest.raises(ValueError, match="no feed-forward weight that the optimizer trains"):
        train(model=model, **OVERTRAINING)


def test_engines_that_can_not_are_refused():
    one = {f"get_{name}_size": lambda: 1 for name in ("tp", "cp", "sp")}
    check_can_overtrain(SimpleNamespace(is_deepspeed_enabled=False, **one))
    with pytest.raises(ValueError, match="overtrain_steps can't be used with DeepSpeed"):
        check_can_overtrain(SimpleNamespace(is_deepspeed_enabled=True, **one))
    with pytest.raises(ValueError, match="overtrain_steps can't be used with tp_size=2"):
        check_can_overtrain(SimpleNamespace(is_deepspeed_enabled=False, **one | {"get_tp_size": lambda: 2}))


def test_a_resumed_run_must_keep_its_overtraining(train):
    train(save_strategy="steps", save_steps=6, **OVERTRAINING)
    with pytest.raises(ValueError, match=r"overtrain_batches=3 \(now 5\)"):
        train(resume=True, **OVERTRAINING | {"overtrain_batches": 5})


def test_a_position_that_contradicts_the_history_is_refused(train, tmp_path):
    from hf_recycle.records.files import read_state, write_state

    train(save_strategy="steps", save_steps=6, **OVERTRAINING)
    folder = tmp_path / "run" / "checkpoint-6"
    tensors = read_state(folder)
    tensors["trainer/overtrain_samples"] += 4
    write_state(folder, tensors)
    (folder / LIST_FILE).unlink()  # which would say that it was changed
    with pytest.raises(ValueError, match="overtrain_samples in the state contradicts"):
        train("next", resume=str(folder), **OVERTRAINING)
