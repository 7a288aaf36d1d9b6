import pytest
from support.simulated_runs import write_run


@pytest.fixture
def run(tmp_path):
    """The folder of a small run that is valid."""
    write_run(tmp_path)
    return tmp_path
