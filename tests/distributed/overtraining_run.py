"""Overtrained runs on one engine; process 0 writes what came out, or FOLDER/RUN.error if one is refused.

overtraining_run.py PROCESSES ENGINE FOLDER RUN[:CHECKPOINT] ...
"""

import sys
from pathlib import Path

from engine_run import begin, run
from support.processes import run_in_processes

EVERY = {"overtrain_steps": 2, "overtrain_batches": 3, "weight_decay": 0.1}
RUNS = {
    "all": EVERY,
    "random": {
        **EVERY,
        "overtrain_subset": "random",
        "overtrain_fraction": 0.4,
        "recycle_steps": 3,
        "recycle_fraction": 0.1,
        "recycle_smooth_steps": 4,
        "prune_fraction": 0.3,
        "prune_steps": 2,
    },
    "smallest": {**EVERY, "overtrain_subset": "smallest", "overtrain_fraction": 0.5, "max_grad_norm": 0},
}


def main() -> None:
    engine, folder = begin()
    for word in sys.argv[4:]:
        name, _, checkpoint = word.partition(":")
        resume = Path(checkpoint) if checkpoint else None
        try:
            run(engine, "off", folder / name, resume=resume, **RUNS[name])
        except ValueError as error:
            (folder / f"{name}.error").write_text(str(error))


if __name__ == "__main__":
    sys.exit(run_in_processes(sys.argv[2], int(sys.argv[1]), main))
