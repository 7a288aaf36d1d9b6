"""Training with recycling on a model of each layout: the chosen lines change, and nothing else."""

import copy

import pytest
import torch

from hf_recycle import RecyclingArguments, RecyclingTrainer

LAYOUTS = (
    "bert",
    "albert",
    "modernbert",
    "t5-gated",
    "gpt2",
    "squeezebert",
    "phi3",
    "opt",
    "mixtral",
    "gpt_oss",
    "switch",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_only_the_chosen_lines_change(name, family_named, tmp_path):
    family = family_named(name)
    model = family.build()
    before = copy.deepcopy(model)
    tokens = torch.randint(5, 67, (16, 8), generator=torch.Generator().manual_seed(0))
    arguments = RecyclingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.0,
        recycle_steps=3,
        recycle_fraction=0.25,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        deterministic_masking=False,
    )
    trainer = RecyclingTrainer(
        model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens]
    )
    trainer.train()
    counts = trainer.neuron_table().counts
    assert tuple(counts) == family.block_names
    for block, times in counts.items():
        assert int((times > 0).sum()) == 10
        for i in times.nonzero().flatten().tolist():
            parts = zip(family.neuron_parts(model, block, i), family.neuron_parts(before, block, i), strict=True)
            for (role, now), (_, was) in parts:
                assert role.endswith(".bias") or not torch.isclose(now, was).any(), (block, i, role)
                now.copy_(was)
    for (name, now), was in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, was), name
