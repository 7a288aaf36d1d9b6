"""Runs on one engine that resume from any checkpoint, in one launch.

    torchrun --nproc_per_node N variant_run.py ENGINE FOLDER NAME=METHOD[:CHECKPOINT] ...

Each run saves every four steps and writes to FOLDER/NAME. If it is refused, FOLDER/NAME.error gets the message of each
process.
"""

import os
import sys
from pathlib import Path

import torch
from engine_run import pretend_an_accelerator, run
from matrix import ENGINES, VARIANTS


def main() -> None:
    engine, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    os.environ |= (ENGINES | VARIANTS)[engine].environment
    if (ENGINES | VARIANTS)[engine].pretend:
        pretend_an_accelerator()
    for word in sys.argv[3:]:
        name, _, what = word.partition("=")
        method, _, checkpoint = what.partition(":")
        try:
            run(engine, method, folder / name, resume=Path(checkpoint) if checkpoint else None, save_steps=4)
        except ValueError as error:
            folder.mkdir(exist_ok=True, parents=True)
            with open(folder / f"{name}.error", "a") as file:
                file.write(f"{error}\n")


if __name__ == "__main__":
    main()
