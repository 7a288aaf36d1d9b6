"""What one of two machines without a shared disk does; process by process, as `torchrun --nnodes 2` would start them.

    python machines_run.py FOLDER

Each process works in `FOLDER/machine-RANK`, with the same relative names. What it finds goes to `FOLDER/RANK.json`.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from support.processes import run_in_processes


def machine(folder: Path) -> None:
    import torch
    from support.tiny_runs import sentences, tiny_bert
    from support.words import word_tokenizer
    from transformers import DataCollatorForLanguageModeling

    from hf_recycle import RecyclingArguments, RecyclingHistory, RecyclingTrainer
    from hf_recycle.checkpoints import claims
    from hf_recycle.errors import UserError

    claims._PATIENCE = 0.5
    rank = os.environ["RANK"]
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": rank}
    home = folder / f"machine-{rank}"
    home.mkdir()
    os.chdir(home)

    def train(output_dir: str, resume=None, **overrides):
        args = RecyclingArguments(
            output_dir=output_dir,
            **{"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
            | {"save_steps": 3, "use_cpu": True, "disable_tqdm": True, "save_on_each_node": True, "ddp_backend": "gloo"}
            | {"recycle_steps": 2, "recycle_fraction": 0.1, "recycle_smooth_steps": 3}
            | overrides,
        )
        trainer = RecyclingTrainer(
            model=tiny_bert(),
            args=args,
            train_dataset=sentences(),
            data_collator=DataCollatorForLanguageModeling(word_tokenizer()),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def refusal(output_dir: str, **overrides) -> str:
        try:
            train(output_dir, **overrides)
        except UserError as error:
            return str(error)
        return "none"

    whole = train("whole")
    found = {"files": sorted(path.name for path in Path("whole/checkpoint-3").iterdir())}
    shutil.copytree("whole/checkpoint-3", "resumed/checkpoint-3")
    resumed = train("resumed", resume=True)
    pairs = zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    found["same weights"] = all(torch.equal(one, other) for one, other in pairs)
    history = RecyclingHistory.from_pretrained("resumed/checkpoint-6")
    found["recycled"] = sum(int(counts.sum()) for counts in history.counts.values())
    found["without"] = refusal("run", save_on_each_node=False)
    found["shared"] = refusal(str(folder / "shared"))
    found["left"] = sorted(str(path) for path in Path().rglob("tmp-*"))
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(run_in_processes("ddp", 2, lambda: machine(Path(sys.argv[1]))))
