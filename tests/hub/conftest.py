"""The Hub of the tests, and the real client pointed at it, in new processes or in this one."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers.utils.hub
from hub_server import ALICE, HubServer, Store
from publishing_runs import QUICK, make_trainer
from pulled_runs import new_trainer

from hf_recycle import RecyclingHistory
from hf_recycle.hub.push.publisher import Publisher
from hf_recycle.hub.push.repository import Repository

_TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A running Hub; its faults and its log are cleared for every test by `_clean`, its repositories stay."""
    with HubServer(Store(tmp_path_factory.mktemp("hub") / "store")) as server:
        yield server


@pytest.fixture(scope="module")
def figures_not_drawn():
    """Files in the place of figures, other ones for every history: drawing takes most of the time of a tiny run."""

    def images(history, **_):
        return {name: f"{name} after {len(history.logs)}".encode() for name in ("loss.png", "recycle_counts.png")}

    def beside(folder, *_):
        return images(RecyclingHistory.of_own_run(folder))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_recycle.plots.run.figure_images", images)
        patch.setattr("hf_recycle.plots.beside.figures_beside", beside)
        yield


@pytest.fixture(autouse=True)
def _clean(request):
    if "hub" in request.fixturenames:
        server = request.getfixturevalue("hub")
        server.faults.set()
        server.log.clear()


@pytest.fixture(scope="module")
def hub_environment(hub, tmp_path_factory):
    """`hub_environment(token)`: what a process of that user needs to talk to the Hub of the tests, with an empty
    cache of its own. Most of it is bound when huggingface_hub is imported, so it is for new processes; for this one
    there is `online`."""

    def make(token: str | None = ALICE, **more: str) -> dict[str, str]:
        home = tmp_path_factory.mktemp("home")
        dropped = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")
        environment = {key: value for key, value in os.environ.items() if key not in dropped}
        paths = [str(_TESTS.parent), str(_TESTS), environment.get("PYTHONPATH", "")]
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_RECYCLE_CACHE": str(home / "hf_recycle"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        if token is not None:
            environment["HF_TOKEN"] = token
        return environment | more

    return make


@pytest.fixture(scope="module")
def run_python():
    """`run_python(code, environment, *arguments)`: runs a script; its output, or an error that shows what it said."""

    def run(code: str, environment: dict[str, str], *arguments: str, status: int = 0) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """The client of this process talks to the Hub of the tests, as alice, with an empty cache, and waits a hundredth
    of the time between its retries. Returns the cache's folder."""
    constants = huggingface_hub.constants
    cache = tmp_path / "hf_home" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf_home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    # Made at the first use in a process, for the Hub of that moment: another test's, which is gone.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", ALICE)
    hurried = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(seconds / 100)})
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(sys.modules[module], "time", hurried)
    huggingface_hub.utils.close_session()
    yield cache
    huggingface_hub.utils.close_session()


@pytest.fixture(scope="module")
def pulled_checkpoint(tmp_path_factory) -> Path:
    """One of a tiny run, to be put into repositories or to be damaged."""
    folder = tmp_path_factory.mktemp("run")
    new_trainer(folder, max_steps=4, save_steps=4).train()
    return folder / "checkpoint-4"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The output folder of a finished run with two checkpoints, never published."""
    folder = tmp_path_factory.mktemp("published") / "run"
    trainer = make_trainer(folder, push_to_hub=False, max_steps=4, hub_token=ALICE)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def checkpoint(run) -> Path:
    return run / "checkpoint-4"


@pytest.fixture
def name(request) -> str:
    """A repository for this test alone."""
    return "alice/" + "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-").replace("--", "-")[:90]


@pytest.fixture
def publisher(online, name, run) -> Publisher:
    """Publishes that run to that repository."""
    return Publisher(Repository(name, output_dir=run, policy=QUICK))
