"""A repository on the Hub: made sure of before training, and brought up to date in one commit per push."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from hf_recycle.errors import UserError
from hf_recycle.files import package_version
from hf_recycle.hub.job import Push
from hf_recycle.hub.layout import CARD, checkpoint_files, model_files, replaced_files
from hf_recycle.hub.merge import merge_card, valid_card
from hf_recycle.hub.privacy import Secrets, Withheld
from hf_recycle.hub.retry import Result, RetryPolicy, insist, limit_waiting, say, status_of

logger = logging.get_logger(__name__)

# The history is a parquet file; the client takes that for a data set in the wrong place.
warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")


class Refused(UserError):
    """The Hub will not take pushes as they are asked for, now or later."""


class Repository:
    """A model repository.

    Args:
        name: with or without its namespace.
        token: None for the one that is logged in.
        private: whether it is made private if it is made; None for the namespace's default.
        revision: the branch to push to; made if it is not there. None for `main`.
        output_dir: the run's folder, whose path is not to be published.
        named_by: the argument that the name comes from, for messages.
        policy: how patiently a request is tried again.
    """

    def __init__(
        self,
        name: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        output_dir: Path = Path(),
        named_by: str = "hub_model_id",
        policy: RetryPolicy | None = None,
    ):
        self.name, self.token, self.private, self.revision = name, token, private, revision
        self.output_dir, self.named_by = output_dir, named_by
        self.policy = policy or RetryPolicy()
        self.api = HfApi(library_name="hf_recycle", library_version=package_version())
        self.repo_id: str | None = None  # once it is known to exist
        self._branches: set[str] = set()
        self._lock = threading.Lock()

    def ensure(self) -> str:
        """Makes sure that the repository and the branch exist and may be written to; returns the full name.

        Raises:
            Refused: if no later attempt can succeed: no token or a wrong one, a bad name, a right that is missing.
            Exception: whatever the client raises when the Hub can't be reached or is in trouble.
        """
        with self._lock:
            if self.repo_id is None:
                self._check_name_and_token()
                try:
                    url = self._insist(
                        self.api.create_repo, self.name, token=self.token, private=self.private, exist_ok=True
                    )
                    self._insist(self._check_right, url.repo_id)
                    self._ensure_branch(url.repo_id, self.revision)
                except HfHubHTTPError as error:
                    raise self._refusal(error) or error from error
                self.repo_id = url.repo_id
            return self.repo_id

    def publish(self, push: Push) -> CommitInfo:
        """One commit that holds everything of a push, and its tag.

        It starts from what is in the repository now and is refused by the Hub (412) if that has changed meanwhile;
        the next call starts from the new state. Calling it again for what has landed already changes nothing.

        Raises:
            Refused: it is late and has no place.
            Exception: whatever the client raises; `retry.passes` tells what is worth another call.
        """
        limit_waiting()
        repo_id, token = self.ensure(), push.token or self.token
        if push.revision != self.revision:
            self._ensure_branch(repo_id, push.revision)
        if not push.late:
            return self._commit(push, repo_id, token)
        if not push.has_place:
            raise Refused(
                f"{push.branch} of {repo_id} holds a newer model than {push.folder} already: give this one a --tag, or "
                "another --revision."
            )
        info = self._tag_beside(push, repo_id, token) if push.tag else None
        if push.checkpoint and not push.folder_taken:
            info = self._commit(push.to(tag=None), repo_id, token)
        return info

    def _tag_beside(self, push: Push, repo_id: str, token: str | None) -> CommitInfo:
        """The commit and the tag of a model older than the branch's: a tag has its model at the root, a branch the
        newest, so it is a commit that no branch holds."""
        beside = f"hf-recycle-late-{push.tag}"
        self._insist(self.api.create_branch, repo_id, branch=beside, revision=push.branch, token=token, exist_ok=True)
        info = self._commit(push.to(revision=beside, late=False), repo_id, token)
        self._insist(self._drop_branch, repo_id, beside, token)
        return info

    def _drop_branch(self, repo_id: str, branch: str, token: str | None) -> None:
        # Looked up each time: an answer may have been lost.
        if any(ref.name == branch for ref in self.api.list_repo_refs(repo_id, token=token).branches):
            self.api.delete_branch(repo_id, branch=branch, token=token)

    def _commit(self, push: Push, repo_id: str, token: str | None) -> CommitInfo:
        revision = push.branch
        inside = f"{push.checkpoint}/"
        head = self._head(repo_id, revision, token)
        present = self._files(repo_id, head, token) if head else []
        if push.late:  # the root is not its business
            present = [name for name in present if name.startswith(inside)]
        old_card = self._card(repo_id, head, token) if CARD in present else ""
        additions = self._additions(push, repo_id, old_card)
        new_card = additions[CARD].decode() if isinstance(additions.get(CARD), bytes) else old_card
        stale = replaced_files(present, additions, push.checkpoint, old_card, new_card)
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in additions.items()
        ]
        # The model first: the client would send what goes to two places twice if it went in one call.
        for part in (False, True):
            some = [operation for operation in operations if operation.path_in_repo.startswith(inside) is part]
            self._insist(self.api.preupload_lfs_files, repo_id, some, revision=revision, token=token, free_memory=False)
        info = self._insist(
            self.api.create_commit,
            repo_id,
            [*(CommitOperationDelete(name, is_folder=False) for name in stale), *operations],
            commit_message=push.message,
            commit_description=push.description,
            revision=revision,
            parent_commit=head,
            token=token,
        )
        if push.tag:
            self._insist(self._tag, repo_id, push.tag, info.oid, token)
        return info

    def _insist(self, call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        return insist(self.policy, lambda: call(*args, **kwargs))

    # ---- What goes up ----

    def _additions(self, push: Push, repo_id: str, old_card: str) -> dict[str, Path | bytes]:
        """{path in the repository: file or bytes}."""
        secrets = Secrets.of_this_machine(self.token, push.token, output_dir=self.output_dir, public=self.name)
        targets = {name: [name] for name in model_files(push.folder)} if not push.late else {}
        if push.checkpoint:
            for name in checkpoint_files(push.folder):
                targets.setdefault(name, []).append(f"{push.checkpoint}/{name}")
        additions: dict[str, Path | bytes] = {}
        for name, places in targets.items():
            try:
                content = secrets.content(push.folder / name)
            except Withheld as reason:
                logger.warning("%s is not published: %s.", push.folder / name, reason)
                continue
            additions |= dict.fromkeys(places, content)
        if CARD in additions:
            additions[CARD] = _merged(old_card, _card_for(push.folder, repo_id, secrets)).encode()
        return additions

    def _head(self, repo_id: str, revision: str, token: str | None) -> str | None:
        try:
            return self._insist(self.api.repo_info, repo_id, revision=revision, token=token).sha
        except RevisionNotFoundError:  # a repository without any commit
            return None

    def _files(self, repo_id: str, revision: str, token: str | None) -> list[str]:
        def listed() -> list[str]:
            tree = self.api.list_repo_tree(repo_id, recursive=True, revision=revision, token=token)
            return [item.path for item in tree if isinstance(item, RepoFile)]

        return self._insist(listed)

    def _card(self, repo_id: str, revision: str, token: str | None) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = self._insist(
                self.api.hf_hub_download, repo_id, CARD, revision=revision, token=token, local_dir=folder
            )
            return Path(path).read_text(encoding="utf-8", errors="replace")

    def _tag(self, repo_id: str, tag: str, commit: str, token: str | None) -> None:
        refs = self.api.list_repo_refs(repo_id, token=token)
        at = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
        if at == commit:
            return
        if at is not None:  # an earlier run's, or this one's before it was resumed
            self.api.delete_tag(repo_id, tag=tag, token=token)
        self.api.create_tag(repo_id, tag=tag, revision=commit, token=token, exist_ok=True)

    # ---- Before training ----

    def _check_name_and_token(self) -> None:
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise Refused(f"{self.named_by}={self.name!r} is no name for a repository: {say(error)}") from None
        if not (self.token or get_token()):
            raise Refused(
                f"Pushing to {self.name!r} needs a token: run `hf auth login`, set HF_TOKEN or pass hub_token."
            )

    def _check_right(self, repo_id: str) -> None:
        """A repository that existed already may be one that this user can only read."""
        try:
            self.api.auth_check(repo_id, token=self.token, write=True)
        except HfHubHTTPError as error:
            if status_of(error) == 404 and type(error) is HfHubHTTPError:
                return  # a Hub that can't tell
            raise

    def _ensure_branch(self, repo_id: str, revision: str | None) -> None:
        if revision in (None, constants.DEFAULT_REVISION, *self._branches) or revision.startswith("refs/"):
            return
        self._insist(self.api.create_branch, repo_id, branch=revision, token=self.token, exist_ok=True)
        self._branches.add(revision)

    def _refusal(self, error: HfHubHTTPError) -> Refused | None:
        """What the user can mend; None for a trouble of the Hub's."""
        status, what = status_of(error), f"{self.named_by}={self.name!r}"
        if status == 401:
            return Refused(
                f"The Hub at {self.api.endpoint} does not accept the token (401) to push to {what}: run "
                "`hf auth login`, or pass a valid hub_token."
            )
        if status in (403, 404):
            return Refused(
                f"This token has no right to write to {what}: {say(error)}. Use a token with write "
                "access, or the name of a repository in your own or your organisation's namespace."
            )
        if status == 400:
            branch = f" or hub_revision={self.revision!r}" if self.revision else ""
            return Refused(f"The Hub refuses {what}{branch}: {say(error)}.")
        return None


def _card_for(folder: Path, repo_id: str, secrets: Secrets) -> str:
    from hf_recycle.hub.card import card_for  # late, because it brings pandas

    try:
        card = card_for(folder, repo_id)
    except Exception as error:  # a card of another place is better than none
        logger.warning("The card of %s can't be written for %s (%s).", folder, repo_id, say(error))
        card = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    return secrets.card(card)


def _merged(theirs: str, ours: str) -> str:
    """A card of a folder that was not made by us, without our marks, does not replace what is there either."""
    try:
        return merge_card(theirs, ours)
    except ValueError:
        return theirs or valid_card(ours)
