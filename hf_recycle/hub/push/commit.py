"""One commit that holds everything of a push, made from what is in the repository now."""

import tempfile
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from transformers.utils import logging

from hf_recycle.card.merge import merge_card, valid_card
from hf_recycle.errors import UserError
from hf_recycle.hub.asking import Asking
from hf_recycle.hub.push.job import Push
from hf_recycle.hub.push.layout import CARD, checkpoint_files, model_files, replaced_files
from hf_recycle.hub.push.privacy import Withheld, clean_card, published_content
from hf_recycle.hub.push.staging import is_overtaken
from hf_recycle.hub.retry import WrongAnswer, passes, say
from hf_recycle.hub.scrub import Secrets

logger = logging.get_logger(__name__)

# The history is a parquet file; the client takes that for a data set in the wrong place.
warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")


class Refused(UserError):
    """The Hub will not take pushes as they are asked for, now or later."""


@dataclass(frozen=True)
class Commit:
    """A push on its way.

    Attributes:
        ask: what every call of the client goes through.
        repo_id: the full name of the repository.
        secrets: what must not be published.
    """

    api: HfApi
    ask: Asking
    push: Push
    repo_id: str
    token: str | None
    secrets: Secrets

    def make(self) -> CommitInfo:
        """The commit, and its tag."""
        push, head = self.push, self._head()
        present = self._files(head) if head else []
        if self._is_older:  # the root is not its business
            present = [name for name in present if name.startswith(f"{push.checkpoint}/")]
        old_card = self._card(head) if head and CARD in present else ""
        additions = self._additions(old_card)
        content = additions.get(CARD)
        new_card = content.decode() if isinstance(content, bytes) else old_card
        stale = replaced_files(present, additions, push.checkpoint, old_card, new_card)
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in additions.items()
        ]
        # The model first: the client would send what goes to two places twice if it went in one call.
        for part in (False, True):
            some = [item for item in operations if item.path_in_repo.startswith(f"{push.checkpoint}/") is part]
            with self.ask.deadline.allowing(sum(item.upload_info.size for item in some)):
                self.ask(
                    self.api.preupload_lfs_files,
                    self.repo_id,
                    some,
                    revision=push.branch,
                    token=self.token,
                    free_memory=False,
                )
        info = self.ask(
            self.api.create_commit,
            self.repo_id,
            [*(CommitOperationDelete(name, is_folder=False) for name in stale), *operations],
            commit_message=push.message,
            commit_description=push.description,
            revision=push.branch,
            parent_commit=head,
            token=self.token,
        )
        if push.tag and not self._is_older:
            self._tag(push.tag, info.oid)
        return info

    @cached_property
    def _is_older(self) -> bool:
        return is_overtaken(self.push, self.repo_id)

    # ---- What is there ----

    def _head(self) -> str | None:
        try:
            return self.ask(self.api.repo_info, self.repo_id, revision=self.push.branch, token=self.token).sha
        except RevisionNotFoundError:  # a repository without any commit
            return None

    def _files(self, head: str) -> list[str]:
        def listed() -> list[str]:
            tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=head, token=self.token)
            return [item.path for item in tree if isinstance(item, RepoFile)]

        return self.ask(listed)

    def _card(self, head: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = self.ask(
                self.api.hf_hub_download, self.repo_id, CARD, revision=head, token=self.token, local_dir=folder
            )
            return Path(path).read_text(encoding="utf-8", errors="replace")

    # ---- What goes up ----

    def _additions(self, old_card: str) -> dict[str, Path | bytes]:
        """{path in the repository: file or bytes}."""
        folder = self.push.folder
        targets = {} if self._is_older else {name: [name] for name in model_files(folder)}
        if self.push.checkpoint:
            for name in checkpoint_files(folder):
                targets.setdefault(name, []).append(f"{self.push.checkpoint}/{name}")
        additions: dict[str, Path | bytes] = {}
        for name, places in targets.items():
            try:
                content = published_content(folder / name, self.secrets)
            except Withheld as reason:
                logger.warning("%s is not published: %s.", folder / name, reason)
                continue
            additions |= dict.fromkeys(places, content)
        if CARD in additions:
            card, figures = self._card_of_folder()
            additions[CARD] = _merged(old_card, card).encode()
            additions |= figures
        return additions

    def _card_of_folder(self) -> tuple[str, dict[str, bytes]]:
        """The card, and {path: PNG} of its figures as far as they don't lie in the folder."""
        from hf_recycle.card.card import card_for  # late, because it brings pandas

        folder = self.push.folder
        try:
            card, figures = card_for(folder, self.repo_id)
        except Exception as error:  # a card of another place is better than none
            logger.warning("The card of %s can't be written for %s (%s).", folder, self.repo_id, say(error))
            card, figures = (folder / CARD).read_text(encoding="utf-8", errors="replace"), {}
        return clean_card(card, self.secrets), figures

    def _tag(self, tag: str, commit: str) -> None:
        def at() -> str | None:
            refs = self.api.list_repo_refs(self.repo_id, token=self.token)
            return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)

        def move() -> None:
            there = at()
            if there == commit:
                return
            if there is not None:  # an earlier run's, or this one's before it was resumed
                self.api.delete_tag(self.repo_id, tag=tag, token=self.token)
            self.api.create_tag(self.repo_id, tag=tag, revision=commit, token=self.token, exist_ok=True)
            if at() != commit:  # whoever said so was not the Hub
                raise WrongAnswer(f"the tag {tag} is not there, though the Hub said that it was made")

        try:
            self.ask(move)
        except HfHubHTTPError as error:
            if passes(error):
                raise
            raise Refused(
                f"The commit {commit} is published, but its tag {tag!r} is not made: {say(error)}."
            ) from error


def _merged(theirs: str, ours: str) -> str:
    """A card of a folder that was not made by us, without our marks, does not replace what is there either."""
    try:
        return merge_card(theirs, ours)
    except ValueError:
        return theirs or valid_card(ours)
