"""A checkpoint brought from the Hub into its cache: one commit, only the files training needs, each checked."""

import itertools
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from transformers.trainer import TRAINER_STATE_NAME

from hf_recycle.errors import UserError
from hf_recycle.hub.address import LAST, HubAddress
from hf_recycle.hub.explain import explained
from hf_recycle.hub.pull.names import (
    MAX_FILES,
    WANTED,
    by_checkpoint,
    check_names,
    check_sizes,
    missing_files,
    wanted_files,
)
from hf_recycle.hub.pull.trust import check_checkpoint, read_step
from hf_recycle.hub.retry import RetryPolicy, insist


@dataclass(frozen=True)
class Pull:
    """What to bring, settled: every process that carries it out gets the same files.

    Attributes:
        address: with its folder and, as revision, a commit.
        files: paths in the repository.
        trust_pickled: see `plan`.
    """

    address: HubAddress
    files: tuple[str, ...]
    trust_pickled: bool = False

    def fetch(self, token: str | None = None) -> Path:
        """Downloads what is not in the cache yet and checks all of it; returns the checkpoint's folder there.

        Raises:
            UserError: a file can't be downloaded, or is damaged or hostile.
        """
        with explained(self.address):
            snapshot = insist(
                RetryPolicy(),
                lambda: snapshot_download(
                    self.address.repo_id, revision=self.address.revision, allow_patterns=list(self.files), token=token
                ),
            )
        folder = Path(snapshot, self.address.folder or "")
        check_checkpoint(folder, self.address)
        return folder


def plan(address: HubAddress, token: str | None = None, trust_pickled: bool = False) -> Pull:
    """Settles which commit and which checkpoint an address stands for, and which files are needed of it.

    Without a folder it is the newest checkpoint of the repository; where the Hub can't be reached, the newest one in
    the cache.

    Args:
        token: token of a user who may read the repository; by default the one that is logged in.
        trust_pickled: also take checkpoints whose shards DeepSpeed or torch.distributed.checkpoint will unpickle.

    Raises:
        UserError: in one sentence, what stands in the way.
    """
    address.check_checkpoint()
    with explained(address):
        commit = HfApi(token=token).resolve_revision(address.repo_id, revision=address.revision).resolved
    pinned = HubAddress(address.repo_id, address.folder, commit)
    sizes, told = _sizes(pinned, token)
    check_names(address, sizes)
    found = by_checkpoint(sizes)
    folder = address.folder or _newest(pinned, found, sizes, token, trust_pickled)
    if folder not in found:
        there = f"it has {', '.join(sorted(found))}" if found else "it has no checkpoint to resume from"
        raise UserError(f"{address}: the repository has no folder {folder}; {there}")
    pinned = HubAddress(address.repo_id, folder, commit)
    if not told:
        # A folder of which an interrupted download left only a part would make a run that differs silently.
        with explained(pinned):
            _cached(pinned, [f"{folder}/{pattern}" for pattern in WANTED])
    names = wanted_files(pinned, found[folder], trust_pickled)
    if missing := missing_files(names, trust_pickled):
        raise UserError(f"{address}: the checkpoint {folder} lacks {missing[0]}; name another one, or push it again")
    check_sizes(pinned, {name: sizes[f"{folder}/{name}"] for name in names}, _free())
    return Pull(pinned, tuple(f"{folder}/{name}" for name in names), trust_pickled)


def is_pulled(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder lies in the Hub's cache, so that others wrote what is in it; by whichever links it is named."""
    cache = Path(constants.HF_HUB_CACHE)
    if not cache.is_dir():
        return False
    # A link may lead into the cache, and a folder of the cache may itself be a link to a larger disk.
    ways = (Path(os.path.realpath(folder)), Path(os.path.abspath(folder)))
    return any(place.exists() and place.samefile(cache) for way in ways for place in (way, *way.parents))


def _sizes(pinned: HubAddress, token: str | None) -> tuple[dict[str, int], bool]:
    """The files of the repository at a commit with their sizes in bytes, and whether the Hub itself has named them.

    Where it can't be reached it is what the cache holds of that commit.
    """
    with explained(pinned):
        try:
            tree = HfApi(token=token).list_repo_tree(pinned.repo_id, recursive=True, revision=pinned.revision)
            files = [entry for entry in itertools.islice(tree, MAX_FILES) if isinstance(entry, RepoFile)]
        except (OfflineModeIsEnabled, httpx2.TransportError):
            root = _cached(pinned, [])
            paths = [path for path in root.rglob("*") if path.is_file()]
            return {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}, False
    if len(files) >= MAX_FILES:
        raise UserError(f"{pinned}: the repository has {MAX_FILES} files or more; name one made for checkpoints")
    return {entry.path: entry.size for entry in files}, True


def _cached(pinned: HubAddress, patterns: list[str]) -> Path:
    """The repository's folder in the cache; an error if a file of these names was never downloaded."""
    path = snapshot_download(pinned.repo_id, revision=pinned.revision, allow_patterns=patterns, local_files_only=True)
    return Path(path)


def _newest(
    pinned: HubAddress,
    found: Mapping[str, list[str]],
    sizes: Mapping[str, int],
    token: str | None,
    trust_pickled: bool,
) -> str:
    """The folder of the newest checkpoint that has all files; `last-checkpoint` tells its step in a file of its."""
    complete = [folder for folder, names in found.items() if not missing_files(names, trust_pickled)]
    steps = {int(folder.partition("-")[2]): folder for folder in complete if folder != LAST}
    newest = max(steps, default=-1)
    if LAST in complete:
        name = f"{LAST}/{TRAINER_STATE_NAME}"
        check_sizes(pinned, {TRAINER_STATE_NAME: sizes[name]}, _free())
        with explained(pinned):
            path = hf_hub_download(pinned.repo_id, name, revision=pinned.revision, token=token)
        if read_step(Path(path), pinned) > newest:
            return LAST
    if newest >= 0:
        return steps[newest]
    incomplete = next(iter(found), None)
    problem = (
        f"its checkpoint {incomplete} lacks {missing_files(found[incomplete], trust_pickled)[0]}"
        if incomplete
        else f"it has neither {LAST} nor a checkpoint-N"
    )
    raise UserError(
        f"{pinned}: the repository holds no checkpoint that training can go on from ({problem}); to start a new run "
        f"from its weights pass --model_name_or_path {pinned.repo_id}"
    )


def _free() -> int:
    """Bytes free where the Hub's cache lies or will lie."""
    folder = Path(os.path.abspath(constants.HF_HUB_CACHE))
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
