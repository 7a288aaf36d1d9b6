"""The Hub of the tests, asked by the real client: what a real Hub would do, and faults where a test wants them."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import ALICE, ALICE_FINE_GRAINED, ALICE_NO_WRITE, ALICE_READ, BOB, CAROL, INVALID, Fault
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the client's own

CARD = "---\nlicense: apache-2.0\ntags: [neuron-recycling]\nlibrary_name: transformers\n---\n# A model\n"


@pytest.fixture
def api(online, hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=ALICE)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A README, a small file, one large enough for the LFS, and one that goes up in parts."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "sub" / "config.json").write_text("{}")
    (folder / "sub" / "weights.safetensors").write_bytes(os.urandom(1000))
    (folder / "large.pt").write_bytes(os.urandom(2**21 + 17))
    return folder


@pytest.fixture
def repo(api, request) -> str:
    name = re.sub(r"\W", "-", request.node.name).strip("-")
    return api.create_repo(f"alice/{name}").repo_id


def status(error) -> int:
    return error.value.response.status_code


def test_a_folder_goes_up_and_comes_down(api, repo, folder, hub, tmp_path):
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="all of it")

    down = Path(huggingface_hub.snapshot_download(repo, local_dir=tmp_path / "down"))

    for path in folder.rglob("*"):
        if path.is_file():
            assert (down / path.relative_to(folder)).read_bytes() == path.read_bytes()
    info = api.model_info(repo, files_metadata=True)
    assert info.card_data.license == "apache-2.0"
    assert {item.rfilename: bool(item.lfs) for item in info.siblings} == {
        **{".gitattributes": False, "README.md": False, "sub/config.json": False},
        **{"sub/weights.safetensors": True, "large.pt": True},
    }
    assert len(hub.requests(r"^PUT /_lfs/\w+/[123]$")) == 3, "the large file goes up in parts of a megabyte"
    assert len(hub.requests(r"^PUT /_lfs/\w+$")) == 1
    assert len(hub.requests(r"objects/verify")) == 2


def test_what_is_there_is_not_uploaded_again(api, repo, folder, hub):
    first = api.upload_folder(repo_id=repo, folder_path=folder)
    hub.log.clear()

    second = api.upload_folder(repo_id=repo, folder_path=folder)

    assert second.oid == first.oid
    assert not hub.requests("PUT|/commit/")


def test_commits_branches_tags(api, repo, folder):
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="step 1")
    api.create_tag(repo, tag="step-1", tag_message="the first")
    api.create_branch(repo, branch="trial")
    changes = [
        CommitOperationCopy("large.pt", "copy.pt"),
        CommitOperationCopy("README.md", "sub/notes.md"),
        CommitOperationDelete("sub/config.json"),
    ]
    api.create_commit(repo, changes, commit_message="step 2", revision="trial")
    api.create_commit(repo, [CommitOperationDelete("sub/")], commit_message="step 3", revision="trial")

    titles = [commit.title for commit in api.list_repo_commits(repo, revision="trial")]
    assert titles == ["step 3", "step 2", "step 1", "initial commit"]
    assert api.list_repo_files(repo, revision="trial") == [".gitattributes", "README.md", "copy.pt", "large.pt"]
    assert "sub/config.json" in api.list_repo_files(repo, revision="step-1")
    references = api.list_repo_refs(repo)
    assert [item.name for item in references.branches] == ["main", "trial"]
    assert references.tags[0].target_commit == api.repo_info(repo).sha
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(repo, tag="step-1")
    assert status(error) == 409
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch(repo, branch="trial")
    assert status(error) == 409
    api.create_branch(repo, branch="trial", exist_ok=True)
    with pytest.raises(BadRequestError):
        api.create_tag(repo, tag="a..b")
    api.delete_tag(repo, tag="step-1")
    api.delete_branch(repo, branch="trial")
    with pytest.raises(RevisionNotFoundError):
        api.list_repo_commits(repo, revision="trial")


def test_a_commit_on_an_old_parent_conflicts(api, repo):
    before = api.repo_info(repo).sha
    api.upload_file(repo_id=repo, path_or_fileobj=b"1", path_in_repo="a.txt", parent_commit=before)

    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(repo_id=repo, path_or_fileobj=b"2", path_in_repo="a.txt", parent_commit=before)

    assert status(error) == 412
    assert len(api.list_repo_commits(repo)) == 2


def test_trees_and_commits_have_pages(api, repo, hub):
    changes = [CommitOperationAdd(f"checkpoint-{i}/state.json", b"%d" % i) for i in range(60)]
    api.create_commit(repo, changes, commit_message="many")
    hub.log.clear()

    listed = [item.path for item in api.list_repo_tree(repo, recursive=True)]

    assert len(listed) == 1 + 60 * 2
    assert len(hub.requests("/tree/")) == 3
    assert [item.path for item in api.list_repo_tree(repo, "checkpoint-7")] == ["checkpoint-7/state.json"]
    assert len(list(api.list_repo_tree(repo))) == 61
    assert [item.path for item in api.get_paths_info(repo, ["checkpoint-7", "nothing"])] == ["checkpoint-7"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "nothing"))


def test_cards_are_validated(api, repo):
    for header in ("tags: one", "license: mine", "base_model: [a/b/c]", "datasets: [1]", "model-index: [{name: x}]"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            api.upload_file(repo_id=repo, path_or_fileobj=f"---\n{header}\n---\n".encode(), path_in_repo="README.md")
    with pytest.warns(UserWarning, match="empty or missing"):
        api.upload_file(repo_id=repo, path_or_fileobj=b"# no header\n", path_in_repo="README.md")


def test_who_is_who(api):
    roles = {}
    for token in (ALICE, ALICE_READ, ALICE_FINE_GRAINED, BOB):
        answer = api.whoami(token=token)
        roles[token] = answer["name"], answer["auth"]["accessToken"]["role"]
    assert roles == {
        **{ALICE: ("alice", "write"), ALICE_READ: ("alice", "read")},
        **{ALICE_FINE_GRAINED: ("alice", "fineGrained"), BOB: ("bob", "write")},
    }
    assert [org["name"] for org in api.whoami(token=CAROL)["orgs"]] == ["acme"]
    with pytest.raises(HfHubHTTPError) as error:
        api.whoami(token=INVALID)
    assert status(error) == 401


@pytest.mark.parametrize(
    ("token", "name", "allowed"),
    [
        (ALICE, "acme/by-alice", True),
        (ALICE_FINE_GRAINED, "alice/by-fine-grained", True),
        (ALICE_NO_WRITE, "alice/by-no-write", False),
        (ALICE_READ, "alice/by-read", False),
        (BOB, "alice/by-bob", False),
        (CAROL, "acme/by-carol", False),
    ],
)
def test_who_may_create_and_write(api, repo, token, name, allowed):
    if allowed:
        api.create_repo(name, token=token)
        api.upload_file(repo_id=name, path_or_fileobj=b"1", path_in_repo="a.txt", token=token)
        return
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(name, token=token)
    assert status(error) == 403
    target = repo if not name.startswith("acme") else api.create_repo("acme/shared", exist_ok=True).repo_id
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(repo_id=target, path_or_fileobj=b"1", path_in_repo="a.txt", token=token)
    assert status(error) == 403
    with pytest.raises(HfHubHTTPError) as error:
        api.auth_check(target, token=token, write=True)
    assert status(error) == 403


def test_private_and_gated_repositories(api, hub):
    api.create_repo("alice/secret", private=True)
    api.upload_file(repo_id="alice/secret", path_or_fileobj=b"1", path_in_repo="a.txt")
    assert api.model_info("alice/secret", token=ALICE_READ).private
    for token in (BOB, False):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("alice/secret", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download("alice/secret", "a.txt", token=token)

    api.update_repo_settings("alice/secret", visibility="public", gated="auto")
    assert api.model_info("alice/secret", token=BOB).gated == "auto"
    with pytest.raises(GatedRepoError):
        api.hf_hub_download("alice/secret", "a.txt", token=BOB)
    assert Path(api.hf_hub_download("alice/secret", "a.txt")).read_text() == "1"
    assert {entry.token for entry in hub.requests("^(HEAD|GET) /alice/secret/resolve")} == {ALICE, BOB, None}


def test_moved_and_deleted_repositories(api, repo):
    api.move_repo(repo, "alice/with-a-new-name")
    assert api.model_info(repo).id == "alice/with-a-new-name"
    api.delete_repo("alice/with-a-new-name")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/with-a-new-name")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(api.create_repo("alice/again").repo_id, revision="nothing")


def test_one_in_three_fails(api, repo, hub):
    hub.faults.set([Fault("^POST .*/commit/", status=503, every=3)])
    outcomes = []
    for i in range(6):
        try:
            api.upload_file(repo_id=repo, path_or_fileobj=b"%d" % i, path_in_repo=f"{i}.txt")
            outcomes.append(True)
        except HfHubHTTPError as error:
            outcomes.append(error.response.status_code)
    assert outcomes == [True, True, 503, True, True, 503]
    assert len(hub.store.titles(repo)) == 4


@pytest.mark.parametrize("action", ["status", "drop", "reset_request", "reset_response", "lose_response", "delay"])
def test_the_client_survives_what_it_retries(api, repo, hub, folder, action):
    faults = [Fault("PUT /_lfs", action, nth=(1, 3), delay=0.05), Fault("preupload", action, status=429, nth=(1,))]
    hub.faults.set(faults)

    api.upload_folder(repo_id=repo, folder_path=folder)

    assert all(fault.fired == len(fault.nth) for fault in faults)
    assert hub.store.read(repo, "large.pt") == (folder / "large.pt").read_bytes()
    assert {entry.fault for entry in hub.requests() if entry.fault} <= {action}


@pytest.mark.parametrize("action", ["drop", "reset_response", "lose_response"])
def test_a_commit_is_not_retried_by_the_client(api, repo, hub, action):
    hub.faults.set([Fault("/commit/", action, times=1)])
    with pytest.raises(Exception, match=r"disconnected|reset|peer"):
        api.upload_file(repo_id=repo, path_or_fileobj=b"1", path_in_repo="a.txt")
    assert len(hub.store.titles(repo)) == (action != "drop"), "only a dropped request was not done"


def test_a_truncated_download_is_tried_again(api, repo, hub, folder):
    api.upload_folder(repo_id=repo, folder_path=folder)
    hub.faults.set([Fault("^GET .*large.pt", "truncate", times=1)])

    path = api.hf_hub_download(repo, "large.pt")

    assert Path(path).read_bytes() == (folder / "large.pt").read_bytes()
    assert len(hub.requests("^GET .*large.pt")) == 2


def test_a_range_of_a_file(api, repo, hub, folder):
    content = (folder / "large.pt").read_bytes()
    api.upload_folder(repo_id=repo, folder_path=folder)
    for asked, expected in (("5-9", content[5:10]), (f"{len(content) - 3}-", content[-3:])):
        answer = get_session().get(f"{hub.url}/{repo}/resolve/main/large.pt", headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (206, expected)
    beyond = {"Range": f"bytes={len(content)}-"}
    assert get_session().get(f"{hub.url}/{repo}/resolve/main/large.pt", headers=beyond).status_code == 416


def test_a_server_that_is_killed_and_comes_back(api, repo, hub):
    hub.faults.set([Fault("refs", "delay", delay=60)])
    errors = []

    def ask() -> None:
        try:
            api.list_repo_refs(repo)
        except Exception as error:
            errors.append(type(error).__name__)

    waiting = threading.Thread(target=ask)
    waiting.start()
    while not hub.faults._faults[0].seen:
        threading.Event().wait(0.01)
    hub.stop()
    waiting.join(timeout=10)
    assert errors, "the connection was cut at once"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", hub.port), timeout=1)
    hub.faults.set()
    hub.start()
    assert api.list_repo_refs(repo).branches[0].name == "main"


def test_a_process_of_its_own_keeps_its_repositories(tmp_path, online, hub):
    command = [sys.executable, "-m", "hub_server", "--store", str(tmp_path / "store")]
    for name, attempt in (("alice/one", signal.SIGKILL), ("alice/two", signal.SIGTERM)):
        server = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
        api = HfApi(endpoint=server.stdout.readline().strip(), token=ALICE)
        api.create_repo(name)
        api.upload_file(repo_id=name, path_or_fileobj=b"\0" * 100, path_in_repo="a.pt")
        assert api.model_info("alice/one").siblings[1].rfilename == "a.pt"
        server.send_signal(attempt)
        server.wait()
        server.stdout.close()


@pytest.mark.slow
def test_a_new_process_talks_to_it(hub, hub_environment, run_python):
    code = """
import huggingface_hub
api = huggingface_hub.HfApi()
repo = api.create_repo("new-process").repo_id
import transformers
config = transformers.BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1,
                                 vocab_size=32)
transformers.BertForMaskedLM(config).push_to_hub(repo)
again = transformers.AutoModelForMaskedLM.from_pretrained(repo)
print(api.whoami()["name"], repo, api.model_info(repo).sha)
"""
    name, repo, sha = run_python(code, hub_environment()).stdout.split()[-3:]
    assert (name, repo) == ("alice", "alice/new-process")
    assert sha == hub.store.repositories["model", repo].resolve("main").sha
    run_python(code, hub_environment(ALICE_READ), status=1)
