"""A repository on the Hub: made sure of before training, and brought up to date in one commit per push."""

from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from hf_recycle import __version__
from hf_recycle.hub.asking import Asking
from hf_recycle.hub.deadline import Deadline
from hf_recycle.hub.push.commit import Commit, Refused
from hf_recycle.hub.push.job import Push
from hf_recycle.hub.push.staging import is_overtaken
from hf_recycle.hub.retry import RetryPolicy, say, status_of
from hf_recycle.hub.scrub import Secrets

logger = logging.get_logger(__name__)


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
        self.api = HfApi(library_name="hf_recycle", library_version=__version__)
        self.repo_id: str | None = None  # once it is known to exist
        self._branches: set[str] = set()

    def ensure(self, deadline: Deadline) -> str:
        """Makes sure that the repository and the branch exist and may be written to; returns the full name.

        Raises:
            Refused: if no later attempt can succeed: no token or a wrong one, a bad name, a right that is missing.
            Exception: whatever the client raises when the Hub can't be reached or is in trouble.
        """
        if self.repo_id is None:
            self._check_name_and_token()
            ask = Asking(self.policy, deadline)
            try:
                url = ask(self.api.create_repo, self.name, token=self.token, private=self.private, exist_ok=True)
                ask(self._check_right, url.repo_id)
                self._ensure_branch(url.repo_id, self.revision, ask)
            except HfHubHTTPError as error:
                raise self._refusal(error) or error from error
            self.repo_id = url.repo_id
        return self.repo_id

    def check_at_start(self) -> str:
        """As `ensure`, before training; where the Hub can't be reached the name as the user wrote it, with a warning.

        Raises:
            Refused: if nothing can ever be pushed there.
        """
        try:
            return self.ensure(Deadline(self.policy.start_patience))
        except Refused:
            raise
        except Exception as error:
            logger.warning(
                "The Hub can't be reached now (%s). Training starts; what it publishes to %s is kept in its output "
                "folder and pushed once the Hub answers.",
                say(error),
                self.name,
            )
            return self.name

    def publish(self, push: Push, deadline: Deadline) -> CommitInfo:
        """One commit that holds everything of a push, and its tag.

        It starts from what is in the repository now and is refused by the Hub (412) if that has changed meanwhile;
        the next call starts from the new state. Calling it again for what has landed already changes nothing.

        An older copy than the one that has landed leaves the root of the branch alone: only the folder that it fills
        by itself is published.

        Raises:
            Refused: it is older and has no folder of its own, or the Hub does not take its tag.
            Overdue: the deadline has passed.
            Exception: whatever the client raises; `retry.passes` tells what is worth another call.
        """
        repo_id, ask = self.ensure(deadline), Asking(self.policy, deadline)
        if is_overtaken(push, repo_id):
            if not push.has_own_folder:
                raise Refused(
                    f"{push.branch} of {repo_id} holds a newer model than {push.folder} already: publish this one on "
                    "another branch, with --revision."
                )
            logger.warning("%s holds a newer model: only %s/ is published.", repo_id, push.checkpoint)
        if push.revision != self.revision:
            self._ensure_branch(repo_id, push.revision, ask)
        secrets = Secrets.of_this_machine(self.token, push.token, output_dir=self.output_dir)
        return Commit(self.api, ask, push, repo_id, push.token or self.token, secrets).make()

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

    def _ensure_branch(self, repo_id: str, revision: str | None, ask: Asking) -> None:
        if revision is None or revision in (constants.DEFAULT_REVISION, *self._branches):
            return
        if revision.startswith("refs/"):
            return
        ask(self.api.create_branch, repo_id, branch=revision, token=self.token, exist_ok=True)
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
