"""What the scripts of the tests need, imported once for all of them: see `scripts`."""

import contextlib

import datasets  # noqa: F401
import transformers.models.bert.modeling_bert
import transformers.trainer  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import hf_recycle.plots.run
import hf_recycle.trainer.trainer  # noqa: F401
from support.quick import make_runs_quick

with contextlib.suppress(ImportError):
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.muon_optimizer

    # Of use to inference alone. Compiling it takes a minute; where that was killed, the next launch waits for its lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

get_checkpoint_conversion_mapping("bert")  # makes the table of all models, which the first save would
make_runs_quick()
