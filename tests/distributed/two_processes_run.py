"""Whose loss it is, and which batches come, on two processes; every process writes what it found.

    python two_processes_run.py FOLDER

One launch for all, because starting the processes takes longer than the runs. `test_two_processes.py` judges.
"""

import os
import sys
from pathlib import Path

from support.processes import run_in_processes

LOSS_STEPS, DATA_STEPS, MIDDLE = 3, 12, 7
EXAMPLES = 20  # five steps an epoch

QUIET = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2}


def loss_arguments(folder: Path, batch: int, accumulation: int):
    """Something of ours is on, and nothing but the loss can make a difference."""
    from hf_recycle import RecyclingArguments

    return RecyclingArguments(
        output_dir=str(folder),
        max_steps=LOSS_STEPS,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        save_strategy="no",
        magnitude_steps=2,
        deterministic_masking=False,
        **QUIET,
    )


def cases() -> dict:
    """By name: the model, what the trainer's class has of its own, the examples."""
    from support.tiny_runs import masked_sentences, tiny_bert
    from transformers import BertForMaskedLM

    class WithTerm(BertForMaskedLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            output.loss = output.loss + output.logits.square().mean()
            return output

    class OwnLoss:
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (3 * outputs.loss, outputs) if return_outputs else 3 * outputs.loss

    class Penalised:
        def compute_loss(self, *args, **kwargs):
            result = super().compute_loss(*args, **kwargs)
            return (result[0] + 100, result[1]) if isinstance(result, tuple) else result + 100

    def with_term():
        model = tiny_bert()
        model.__class__ = WithTerm
        return model

    masked = masked_sentences(24)
    return {
        "a forward that adds a term": (with_term, object, masked),
        "a compute_loss": (tiny_bert, OwnLoss, masked),
        "a compute_loss that calls ours": (tiny_bert, Penalised, masked),
    }


def train_on_a_loss(base: type, build, mixin: type, data: list[dict], args) -> dict:
    from transformers import default_data_collator

    cls = base if mixin is object else type("Mine", (mixin, base), {})
    trainer = cls(
        model=build(), args=args, train_dataset=data, eval_dataset=data[:7], data_collator=default_data_collator
    )
    trainer.train()
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "weights": trainer.model.state_dict(),
    }


def losses(folder: Path) -> dict:
    from support.tiny_runs import masked_sentences, tiny_bert
    from transformers import Trainer

    from hf_recycle import RecyclingTrainer

    args = loss_arguments(folder / "losses", batch=2, accumulation=2)
    found = {
        name: [train_on_a_loss(base, *case, args) for base in (Trainer, RecyclingTrainer)]
        for name, case in cases().items()
    }
    plain = train_on_a_loss(RecyclingTrainer, lambda: tiny_bert(0.0), object, masked_sentences(24), args)
    return found | {"plain": plain}


def datasets_by_kind() -> dict:
    """By name: the training set, and the settings that go with it."""
    import datasets
    from support.tiny_runs import sentences

    rows = sentences(EXAMPLES)
    uneven = [{"input_ids": row["input_ids"][: 6 + 2 * (i % 4)]} for i, row in enumerate(rows)]

    def stream():
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3)

    own = {"accelerator_config": {"dispatch_batches": False}}
    dispatched = {"accelerator_config": {"dispatch_batches": True}}
    return {
        "a list": (lambda: rows, {}),
        "grouped by length": (lambda: uneven, {"train_sampling_strategy": "group_by_length"}),
        "a dispatched stream": (stream, {}),
        "a stream that every process reads": (stream, own),
        "a list, dispatched": (lambda: rows, dispatched),
    }


def trainer_on(folder: Path, data, settings: dict, evaluated=None):
    """The trainer, and the list to which each step adds its examples, masks taken back, without padding."""
    import torch
    from support.tiny_runs import tiny_bert
    from support.words import word_tokenizer
    from transformers import DataCollatorForLanguageModeling

    from hf_recycle import RecyclingArguments, RecyclingTrainer

    args = RecyclingArguments(
        output_dir=str(folder),
        max_steps=DATA_STEPS,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        save_steps=MIDDLE,
        recycle_steps=3,
        recycle_fraction=0.1,
        **QUIET,
        **settings,
    )
    trainer = RecyclingTrainer(
        model=tiny_bert(),
        args=args,
        train_dataset=data,
        eval_dataset=evaluated,
        data_collator=DataCollatorForLanguageModeling(word_tokenizer()),
    )
    seen, step = [], trainer.training_step

    def noting(model, inputs, *rest, **kwargs):
        whole = torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"])
        seen.append([tuple(token for token in row if token) for row in whole.tolist()])
        return step(model, inputs, *rest, **kwargs)

    trainer.training_step = noting
    return trainer, seen


def data(folder: Path) -> dict:
    found = {}
    for number, (name, (build, settings)) in enumerate(datasets_by_kind().items()):
        whole, seen = trainer_on(folder / f"whole-{number}", build(), settings)
        whole.train()
        runs = [(whole, seen)]
        resumed, seen = trainer_on(folder / f"resumed-{number}", build(), settings)
        try:
            resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{MIDDLE}")
            runs.append((resumed, seen))
        except ValueError as error:
            found[name] = str(error)
            continue
        found[name] = [
            {
                "seen": seen,
                "losses": [row["loss"] for row in run.state.log_history if "loss" in row],
                "weights": run.model.state_dict(),
            }
            for run, seen in runs
        ]
    return found


def evaluations(folder: Path) -> dict:
    """Of seven examples by two processes, in batches of two: as a list, and as streams."""
    import datasets
    from support.tiny_runs import sentences

    rows = sentences(7)
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    found = {}
    for name, evaluated, options in (
        ("list", rows, {}),
        ("dispatched", stream, {}),
        ("not dispatched", stream, {"accelerator_config": {"dispatch_batches": False}}),
    ):
        try:
            found[name] = trainer_on(folder / name, rows, options, evaluated)[0].evaluate()["eval_loss"]
        except ValueError as error:
            found[name] = str(error)
    return found


def main() -> None:
    import torch

    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    found = {"losses": losses(folder), "data": data(folder), "evaluations": evaluations(folder)}
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    sys.exit(run_in_processes("ddp", 2, main))
