"""What the scripts of the tests need, imported once for all of them: see `scripts`."""

import datasets  # noqa: F401
import transformers.models.bert.modeling_bert
import transformers.trainer  # noqa: F401

import hf_recycle.plots.run
import hf_recycle.trainer.trainer  # noqa: F401
from support.quick import make_runs_quick

make_runs_quick()
