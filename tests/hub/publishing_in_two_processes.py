"""A run on two processes that publishes; each notes what it saw in `FOLDER/rank-N.json`.

The last push of process 0 waits until process 1 has left `train()`: if that waited for the push, both would wait in
vain.
"""

import json
import os
import sys
import time
from pathlib import Path

import httpx2

sys.path.insert(0, str(Path(__file__).parent))
from publishing_runs import make_trainer

from hf_recycle.train import leave

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
OPTIONS = {"hub_strategy": "checkpoint", "hub_always_push": True, "save_steps": 3}

requests = 0
send = httpx2.Client.send


def counted(*args, **kwargs):
    global requests
    requests += 1
    return send(*args, **kwargs)


def wait_for_the_other(repository) -> None:
    publish = repository.publish

    def publish_later(push, deadline):
        latest = time.monotonic() + 60
        while push.message.startswith("step 6") and not (FOLDER / "left").exists():
            if time.monotonic() > latest:
                raise PermissionError("process 1 did not leave train()")
            time.sleep(0.05)
        return publish(push, deadline)

    repository.publish = publish_later


httpx2.Client.send = counted
try:
    make_trainer(FOLDER / "refused", hub_model_id="alice/a--b", **OPTIONS)
    refused = ""
except ValueError as error:
    refused = str(error)
trainer = make_trainer(FOLDER / "run", hub_model_id="alice/two", **OPTIONS)
if RANK == 0:
    wait_for_the_other(trainer.publisher.repository)
trainer.train()
if RANK == 1:
    (FOLDER / "left").touch()
trainer.save_model()
note = {"refused": refused, "requests": requests, "name": trainer.hub_model_id}
(FOLDER / f"rank-{RANK}.json").write_text(json.dumps(note))
# As `hf-recycle train` does: torch now and then aborts a process that is done, while the interpreter is taken apart.
leave(0)
