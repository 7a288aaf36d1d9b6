"""What every test shares: no network, no progress bars, one thread, deprecations as errors, models of every family."""

import os
import signal
from zlib import crc32

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from hypothesis import settings
from support import families as family_table
from support.quick import make_runs_quick
from torch import nn

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
settings.register_profile("tests", deadline=None, database=None, derandomize=True)
settings.load_profile("tests")


def pytest_configure(config):
    # A shell starts background jobs with Ctrl-C ignored, and what they start inherits that; tests send it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A call of ours to something that transformers is about to remove must not pass unseen.
    config.addinivalue_line("filterwarnings", "error::FutureWarning")
    config.addinivalue_line("filterwarnings", "error::DeprecationWarning:transformers.*")
    config.addinivalue_line("filterwarnings", "error::DeprecationWarning:hf_recycle.*")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """In `make test-fast` a test of many cases has its first and a third of the others, always the same ones."""
    seen = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow"):
            continue
        if test in seen and crc32(item.name.encode()) % 3:
            item.add_marker(pytest.mark.slow)
        seen.add(test)
    # With `--dist loadfile` one worker does all tests of a module, whose launches they share. The longest modules
    # begin: those that start real processes, then whole trainings; so all workers end together.
    folders = ("distributed", "neurons", "studies", "bench", "cli", "trainer", "docs", "hub")
    items.sort(key=lambda item: (*folders, item.path.parent.name).index(item.path.parent.name))


def pytest_collection_finish():
    make_runs_quick()


@pytest.fixture(autouse=True)
def _seeded():
    """The same random models in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _histories_are_trusted(monkeypatch):
    """A process that reads each history first takes longer than most runs. `test_foreign_files` has it."""
    monkeypatch.setattr("hf_recycle.records.untrusted.recycling_files.parquet_problem", lambda *_: None)


@pytest.fixture
def figures_not_drawn(monkeypatch):
    """Runs without figures: drawing them takes most of the time of a tiny run, and has tests of its own."""
    monkeypatch.setattr("hf_recycle.plots.run._figures", lambda *_: {})


@pytest.fixture(params=family_table.FAMILIES, ids=lambda family: family.name)
def family(request) -> family_table.Family:
    """Every family in turn."""
    return request.param


@pytest.fixture
def family_named():
    """`family_named("gpt2")`."""
    return family_table.BY_NAME.__getitem__


@pytest.fixture
def perturb():
    """`perturb(model)`: noise on every parameter, so that no bias is zero."""
    return family_table.perturb


class PlainBlock(nn.Module):
    """x + W_out tanh(W_in x + b_in) + b_out, with names no family uses."""

    def __init__(self, d_model: int, d_ff: int, gated: bool = False):
        super().__init__()
        self.first = nn.Linear(d_model, d_ff)
        self.gate = nn.Linear(d_model, d_ff) if gated else None
        self.second = nn.Linear(d_ff, d_model)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return x + self.second(hidden if self.gate is None else hidden * self.gate(x))


class PlainNet(nn.Module):
    """A stack of such blocks and a square readout, with no configuration and no initialiser of its own."""

    def __init__(self, d_model: int = 6, d_ff: int = 20, layers: int = 2, gated: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(d_model, d_ff, gated) for _ in range(layers))
        self.readout = nn.Linear(d_model, d_model)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.readout(x)


@pytest.fixture
def plain_net():
    """`plain_net(d_model, d_ff, layers, gated)`: a model of unknown architecture, the same weights every time."""

    def build(d_model: int = 6, d_ff: int = 20, layers: int = 2, gated: bool = False, seed: int = 0) -> PlainNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return PlainNet(d_model, d_ff, layers, gated)

    return build
