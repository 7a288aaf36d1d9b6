"""`python -m hf_recycle.studies.prepare SETTINGS.yaml`: fills the caches that the runs of a study share."""

import sys

from hf_recycle.runs.parse import parse_run
from hf_recycle.runs.run import prepare_data

if __name__ == "__main__":
    arguments = parse_run(sys.argv[1:])
    prepare_data(arguments.model, arguments.data)
