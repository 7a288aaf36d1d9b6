"""Downloads files of a repository into the Hub's cache, unless one is larger than its kind can be."""

from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from hf_recycle.errors import UserError
from hf_recycle.hub.checks.sizes import SMALL_FILES, small_file_problem


def fetch_file(repo_id: str, name: str, revision: str | None = None, token: str | None = None) -> Path:
    """Its path in the cache.

    Raises:
        UserError: by what the Hub says of its size it is not what its name says; nothing was downloaded.
        Exception: what the Hub's client raises, see `explain`.
    """
    told = hf_hub_download(repo_id, name, revision=revision, token=token, dry_run=True)
    _check_size(repo_id, name, told.file_size or 0)
    return Path(hf_hub_download(repo_id, name, revision=revision, token=token))


def check_small_files(repo_id: str, folder: str = "", revision: str | None = None, token: str | None = None) -> None:
    """Refuses a model whose small files, which transformers is about to fetch, are larger than their kind can be.

    Args:
        folder: inside the repository; empty, or ends with a slash.

    Raises:
        UserError: names the file; nothing was downloaded.
        Exception: what the Hub's client raises, see `explain`.
    """
    names = [f"{folder}{name}" for name in SMALL_FILES]
    for entry in HfApi(token=token).get_paths_info(repo_id, names, revision=revision):
        if isinstance(entry, RepoFile):
            _check_size(repo_id, entry.path, entry.size)


def _check_size(repo_id: str, name: str, size: int) -> None:
    if problem := small_file_problem(PurePosixPath(name).name, size):
        raise UserError(f"{repo_id}: {name} is not to be trusted ({problem}); nothing of it was fetched")
