"""Texts of several kinds one after the other: how well is the new one learned, and what becomes of the old ones?

    python examples/shifting_domains.py verses.txt plays.txt manual.txt --output_dir runs/domains

A file is a domain. A small causal model (2 layers, d_model 128, ReLU, pre-LN) is trained on one after the other in one
run, at a constant learning rate, the optimizer running through. Every arm sees the same sequences. A seed draws the
first weights, the sequences, and with which domain the row of them begins, so that no single order decides.

Written down before the comparison:

* Primary measure: loss on the held-out part of a domain right after it was trained on, mean over the domains but the
  first, which no arm can learn differently from a fresh model. Lower is better.
* Beside it: forgetting, the loss at the end of the run less that right after a domain, mean over the domains but the
  last; and the mean loss on all domains at the end.
* Steps: 150 for each domain, of 8 sequences of 64 tokens. Nothing else stops a run.
* Learning rate: of 1e-3 and 2e-3, for each arm the one whose primary measure is lower on seed 101, which the comparison
  (seeds 1 to 4, or those that are named) does not use. (Before, `plain` with seed 999 and 40 steps: 1.5e-3 ended at
  5.69, 3e-3 at 6.02, 8e-3 at 6.11.) Strengths are not tuned, and are those of `ARMS`. No weight decay in any arm.
* Each arm against `plain`, paired by seed, by the exact sign-flip test; with 4 seeds p is never below 0.125. `fresh` is
  the control: unless it differs from `plain` in every seed, the comparison sees nothing.
"""

import argparse
import functools
import json
import random
import statistics
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator, set_seed

from hf_recycle import RecyclingArguments, RecyclingHistory, RecyclingTrainer
from hf_recycle.data.tokenizer import trained_tokenizer
from hf_recycle.studies.inference import paired_difference

L2_INIT = {"l2_init_weight": 1.0}
DORMANT = {
    "recycle_steps": 60,
    "recycle_fraction": 0.5,
    "recycle_selection": "dormant",
    "recycle_threshold": 0.025,
    "recycle_reinit": "zero_out",
}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},  # AdamW
    "l2_init": L2_INIT,
    "l2_init and dormant": L2_INIT | DORMANT,
    "fresh": {},  # a new model for each domain
}
LENGTH, VOCABULARY = 64, 2048
MODEL: dict[str, Any] = {"n_embd": 128, "n_layer": 2, "n_head": 2, "activation_function": "relu"}
MODEL |= {"n_positions": LENGTH, "bos_token_id": 0, "eos_token_id": 0}
MODEL |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # no sequence comes twice
TUNING_SEED, LEARNING_RATES = 101, (1e-3, 2e-3)
MEASURES = {
    "new": "loss on a new domain right after it, mean over all but the first (primary)",
    "forgetting": "forgetting: loss at the end less that right after a domain, mean over all but the last",
    "end": "mean loss on all domains at the end",
}

Losses = dict[str, dict[str, float]]
"""`{domain trained on: {domain: loss on its held-out part then}}`, in the order of training."""


@functools.cache
def read(files: tuple[str, ...], sequences: int, held_out: int) -> tuple[int, dict[str, tuple[list, list]]]:
    """The size of the vocabulary, and of each file sequences to train on and, from its end, held-out ones."""
    texts = {Path(file).stem: Path(file).read_text(encoding="utf-8") for file in files}
    tokenizer = trained_tokenizer(list(texts.values()), VOCABULARY, max_seq_length=10**6, kind="byte_bpe")
    domains = {}
    for name, text in texts.items():
        ids = [token for line in tokenizer(text.splitlines())["input_ids"] for token in (*line, tokenizer.eos_token_id)]
        rows = [{"input_ids": row, "labels": row} for row in zip(*[iter(ids)] * LENGTH, strict=False)]
        if len(rows) < sequences + held_out:
            raise SystemExit(f"{name} has {len(rows)} sequences, and {sequences + held_out} are needed: lower steps")
        domains[name] = rows[:-held_out], rows[-held_out:]
    return len(tokenizer), domains


def train(arm: str, learning_rate: float, seed: int, options: argparse.Namespace) -> tuple[Losses, int]:
    """One run of an arm over all domains; for `fresh`, a run for each. Also how many neurons were recycled."""
    size, domains = read(tuple(options.files), options.steps * options.batch, options.held_out)
    names = list(domains)
    names = names[seed % len(names) :] + names[: seed % len(names)]
    draw = random.Random(seed)
    rows = {name: draw.sample(domains[name][0], options.steps * options.batch) for name in names}
    held_out = {name: Dataset.from_list(domains[name][1]) for name in names}
    losses: Losses = {}
    recycled = 0
    for part in [[name] for name in names] if arm == "fresh" else [names]:
        set_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=size, **MODEL))
        args = RecyclingArguments(
            output_dir=str(options.output_dir / "last_run"),
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            learning_rate=learning_rate,
            max_steps=options.steps * len(part),
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=64,
            eval_strategy="steps",
            eval_steps=options.steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            **ARMS[arm],
        )
        data = Dataset.from_list([row for name in part for row in rows[name]])
        trainer = RecyclingTrainer(
            model, args, data_collator=default_data_collator, train_dataset=data, eval_dataset=held_out
        )
        trainer.train()
        for number, trained in enumerate(part, 1):
            logs = [log for log in trainer.state.log_history if log["step"] == number * options.steps]
            found = {key: value for log in logs for key, value in log.items()}
            losses[trained] = {name: found[f"eval_{name}_loss"] for name in names}
        if "recycle_steps" in ARMS[arm]:
            trainer.save_model()
            counts = RecyclingHistory.from_pretrained(trainer.args.output_dir).counts
            recycled += sum(int(block.sum()) for block in counts.values())
    return losses, recycled


def measures(losses: Losses) -> dict[str, float]:
    """What arms are compared by, see above. With `fresh` the last model, which saw one domain, is what is left."""
    names = list(losses)
    end = losses[names[-1]]
    mean = statistics.fmean
    return {
        "new": mean(losses[name][name] for name in names[1:]),
        "forgetting": mean(end[name] - losses[name][name] for name in names[:-1]),
        "end": mean(end.values()),
    }


class Runs:
    """Measures of runs, each trained once and kept in a file: an interrupted comparison goes on where it was."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self._file = options.output_dir / "runs.json"
        self._known = json.loads(self._file.read_text()) if self._file.exists() else {}

    def __call__(self, arm: str, learning_rate: float, seed: int) -> dict[str, float]:
        options = self._options
        sizes = [*options.files, options.steps, options.batch, options.held_out]
        key = json.dumps([arm, ARMS[arm], MODEL, learning_rate, seed, *sizes])
        if key not in self._known:
            losses, recycled = train(arm, learning_rate, seed, options)
            self._known[key] = {"losses": losses, "recycled": recycled}
            self._file.write_text(json.dumps(self._known, indent=1))
        found = self._known[key]
        return measures(found["losses"]) | {"recycled": found["recycled"]}


def report(runs: Runs, seeds: list[int]) -> str:
    """Tuning, then a table for each measure: every seed, the median, and the difference from `plain`."""
    heads = " | ".join(f"{rate:g}" for rate in LEARNING_RATES)
    lines = [f"Primary measure on seed {TUNING_SEED}, by learning rate:", "", f"| arm | {heads} |", "|---|---|---|"]
    rates, found = {}, {}
    for arm in ARMS:
        tuned = {rate: runs(arm, rate, TUNING_SEED)["new"] for rate in LEARNING_RATES}
        rates[arm] = min(tuned, key=tuned.__getitem__)
        lines.append(f"| {arm} | {' | '.join(f'{loss:.3f}' for loss in tuned.values())} |")
    for arm in ARMS:
        found[arm] = [runs(arm, rates[arm], seed) for seed in seeds]
    for measure, meaning in MEASURES.items():
        heads = " | ".join(f"seed {seed}" for seed in seeds)
        lines += [
            "",
            f"In nats per token: {meaning}.",
            "",
            f"| arm | learning rate | {heads} | median | against plain |",
        ]
        lines.append("|---" * (len(seeds) + 4) + "|")
        values = {arm: [run[measure] for run in found[arm]] for arm in ARMS}
        for arm, losses in values.items():
            numbers = " | ".join(f"{loss:.3f}" for loss in [*losses, statistics.median(losses)])
            pair = paired_difference(losses, values["plain"])
            against = (
                "" if pair.p is None else f"{pair.mean:+.3f} ({pair.low:+.3f} to {pair.high:+.3f}), p = {pair.p:.3g}"
            )
            lines.append(f"| {arm} | {rates[arm]:g} | {numbers} | {'' if arm == 'plain' else against} |")
    recycled = {arm: [run["recycled"] for run in found[arm]] for arm in ARMS if "recycle_steps" in ARMS[arm]}
    lines += ["", *(f"Neurons recycled by {arm}, by seed: {', '.join(map(str, n))}." for arm, n in recycled.items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="A text of one kind; at least two.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=150, help="Of each domain.")
    parser.add_argument("--batch", type=int, default=8, help="Sequences of a step.")
    parser.add_argument("--held_out", type=int, default=64, help="Sequences of each domain that are held out.")
    options = parser.parse_args()
    if len(options.files) < 2:
        parser.error("one file is one domain; name at least two")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    text = report(Runs(options), options.seeds)
    (options.output_dir / "report.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
