"""What a training step spends its time on, operation by operation.

`python -m benchmarks.step_profile docs/profile-step.md` renews the table of that page; without a page it prints
the table. Every training runs in a process of its own, one after the other, on one thread, because CPU time on several
counts their waiting for each other. How fast the steps are, `python -m benchmarks` tells.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contestant import OURS, STOCK, Contestant, make_trainer
from benchmarks.pages import renew_between
from benchmarks.shapes import MEDIUM, Shape

_PARTS = {
    "matrix products": ["mm", "addmm", "bmm", "baddbmm", "_linear_pointwise"],
    "dropout's random numbers": ["bernoulli_"],
    "copies and fills": ["copy_", "fill_", "zero_", "cat"],
    "loss": ["_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward", "exp_"],
    "GELU": ["gelu", "gelu_backward"],
    "softmax of attention": ["_softmax", "_softmax_backward_data", "_safe_softmax"],
    "layer normalisation": ["native_layer_norm", "native_layer_norm_backward"],
    "AdamW": ["_fused_adamw_"],
}
_REST = "everything else"
_WARM_UP = 2


@dataclass(frozen=True)
class StepProfile:
    """One training's steps, means over those measured.

    Attributes:
        shares: of the time of all operations, by part; they add up to 1.
        cpu: seconds of CPU time, of the process and the kernel on its behalf.
        system: share of these in the kernel.
        faults: page faults.
    """

    shares: Mapping[str, float]
    cpu: float
    system: float
    faults: float


def profile_step(contestant: Contestant, steps: int = 5) -> StepProfile:
    """Profiles `steps` steps of a training, in a process of its own."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned) as pool:
        return pool.submit(_profile, contestant, steps).result()


def _profile(contestant: Contestant, steps: int) -> StepProfile:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - what libraries print belongs in no table
    # Late: the parent process needs none of this.
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(1)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    usage = []

    class Watch(TrainerCallback):
        """Counts in some steps, and then profiles as many: profiling takes time itself."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (_WARM_UP, _WARM_UP + steps):
                usage.append(resource.getrusage(resource.RUSAGE_SELF))
            if state.global_step == _WARM_UP + steps:
                profiler.start()
            if state.global_step == _WARM_UP + 2 * steps:
                profiler.stop()

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(contestant, _WARM_UP + 2 * steps, folder)
        trainer.add_callback(Watch())
        trainer.train()
    before, after = usage
    system = after.ru_stime - before.ru_stime
    cpu = system + after.ru_utime - before.ru_utime
    seconds = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return StepProfile(shares(seconds), cpu / steps, system / cpu, (after.ru_minflt - before.ru_minflt) / steps)


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """By part of a step, the share of the time that its operations took themselves, `{"aten::mm": ..., ...}`."""
    part_of = {name: part for part, names in _PARTS.items() for name in names}
    taken = dict.fromkeys([*_PARTS, _REST], 0.0)
    for name, spent in seconds.items():
        taken[part_of.get(name.rpartition("::")[2], _REST)] += spent
    whole = sum(taken.values())
    return {part: spent / whole for part, spent in taken.items()}


def profile_table(profiles: Mapping[str, StepProfile]) -> str:
    """Markdown: a column for each training, the first of them the one that CPU times are compared with."""
    first, *_ = profiles.values()
    rows = [["", *profiles], ["---", *["---:"] * len(profiles)]]
    rows += [[part, *(f"{100 * each.shares[part]:.1f}%" for each in profiles.values())] for part in first.shares]
    rows.append(
        ["CPU time of a step", *(f"{each.cpu:.2f} s ({first.cpu / each.cpu:.2f}×)" for each in profiles.values())]
    )
    rows.append(["of it in the kernel", *(f"{100 * each.system:.0f}%" for each in profiles.values())])
    rows.append(["page faults of a step", *(f"{each.faults:,.0f}" for each in profiles.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def contestants(shape: Shape) -> dict[str, Contestant]:
    """The stock Trainer, and ours with its usual arguments and no method, without and with oneDNN."""
    from hf_recycle.speed.onednn import is_available

    found = {"stock": Contestant("stock", STOCK, shape), "ours": Contestant("ours", OURS, shape)}
    if is_available():
        found["ours, `onednn_linear`"] = Contestant("oneDNN", OURS, shape, {"onednn_linear": True})
    return found


def main(pages: Sequence[str]) -> None:
    """Profiles the steps of BERT Medium, and renews the table of some pages or prints it."""
    from benchmarks.facts import machine_facts

    facts = machine_facts()
    table = profile_table({name: profile_step(contestant) for name, contestant in contestants(MEDIUM).items()})
    content = f"{table}\n\n{MEDIUM}, float32, one thread; {facts['processor']}; {facts['versions']}"
    for page in pages:
        text = renew_between(Path(page).read_text(encoding="utf-8"), "profile", content)
        Path(page).write_text(text, encoding="utf-8")
    if not pages:
        print(content)


if __name__ == "__main__":
    main(sys.argv[1:])
