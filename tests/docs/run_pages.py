"""Runs the code of pages: `python run_pages.py PAGE ...`, in a process of its own, because pages register things.

Each page has a namespace with what a script of the reader's would have made before: a model, its data and its
tokenizer. The working directory has `runs/demo`, and the folders of the repository that pages name.
"""

import shlex
import sys
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

from hf_recycle.cli.main import main

sys.path.insert(0, str(Path(__file__).parent))
from pages import blocks, commands


def of_the_reader() -> dict:
    tokenizer = AutoTokenizer.from_pretrained("runs/demo")
    texts = ["the list is returned", "a string is a sequence"] * 16
    return {
        "model": AutoModelForMaskedLM.from_pretrained("runs/demo"),
        "tokenizer": tokenizer,
        "train_dataset": Dataset.from_list([dict(tokenizer(text)) for text in texts]),
        "data_collator": DataCollatorForLanguageModeling(tokenizer),
    }


def run_page(page: str) -> None:
    names = of_the_reader()
    for number, block in enumerate(blocks(Path(page))):
        if block.skipped:
            continue
        where = f"{page}, block {number}"
        print(f"== {where}", flush=True)
        if block.language == "python":
            exec(compile(block.code, where, "exec"), names)
        for words in commands(block) if block.language == "bash" else ():
            assert words[0] == "hf-recycle", (
                f"{where}: only hf-recycle is run here; mark the block: {shlex.join(words)}"
            )
            assert main(words[1:]) == 0, shlex.join(words)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for page in sys.argv[1:]:
        run_page(page)
