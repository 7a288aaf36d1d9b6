"""Publishing while training: the stock Trainer's arguments and methods, and nothing lost on the way."""

import inspect
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_recycle.card.words import Words
from hf_recycle.engines.replica_checksum import from_main_process
from hf_recycle.hub.push.commit_message import commit_message, step_of
from hf_recycle.hub.push.job import Push
from hf_recycle.hub.push.publisher import Publisher
from hf_recycle.hub.push.repository import Repository
from hf_recycle.hub.push.staging import leftovers, stage
from hf_recycle.hub.retry import RetryPolicy
from hf_recycle.records import files
from hf_recycle.trainer.base import NeuronTrainer

logger = logging.get_logger(__name__)

_CARD_ARGUMENTS = frozenset(inspect.signature(Trainer.create_model_card).parameters) - {"self"}


class HubMixin(NeuronTrainer):
    """Publishes checkpoints in the background, from private copies, in order.

    What the Hub refuses for good (a wrong token, a right that is missing, a bad name) is raised before training starts.
    After that nothing about the Hub stops training: a failed push is tried again, and what could not be published is
    said with the command that publishes it later.

    Attributes:
        push_policy: how patiently; a class attribute, to be overridden.
        publisher: on process 0 of a run that publishes; None elsewhere.
        card_words: the arguments that `create_model_card` was called with.
    """

    push_policy = RetryPolicy()
    publisher: Publisher | None = None
    card_words: Words = {}  # noqa: RUF012 - replaced, never changed

    # ---- Before training ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes sure of the repository: on process 0, for all.

        Raises:
            UserError: on every process, if nothing can be pushed there.
        """

        def settle() -> str:
            args = self.args
            repository = Repository(
                args.hub_model_id or Path(args.output_dir).absolute().name,
                token=token or args.hub_token,
                private=args.hub_private_repo if private is None else private,
                revision=args.hub_revision,
                output_dir=Path(args.output_dir),
                named_by="hub_model_id" if args.hub_model_id else "the name of output_dir, hub_model_id",
                policy=self.push_policy,
            )
            name = repository.check_at_start()
            self.publisher = Publisher(repository)
            return name

        self.hub_model_id = from_main_process(settle, self.args.device)
        self.push_in_progress = None  # the stock Trainer's, which stays unused

    # ---- While training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        if self.publisher is not None:
            self._take_up_leftovers(self.publisher, resume=bool(resume_from_checkpoint))
        try:
            result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except BaseException:
            if self.publisher is not None:
                self.publisher.abandon()
            raise
        if self.args.push_to_hub and self.args.hub_strategy == HubStrategy.END and self.hp_search_backend is None:
            self.push_to_hub()
        return result

    def _take_up_leftovers(self, publisher: Publisher, resume: bool) -> None:
        """What an earlier run in this folder could not publish: a run that goes on publishes it first."""
        try:
            found = leftovers(Path(self.args.output_dir))
        except Exception as error:
            logger.warning("What an earlier run left unpublished can't be read: %s", error)
            return
        for push in found:
            ours = (push.repo_id, push.revision) == (publisher.repository.name, self.args.hub_revision)
            if resume and ours:
                publisher.submit(push)
            else:
                logger.warning("An earlier run left a checkpoint unpublished; publish it with: %s", push.command)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy, folder = HubStrategy(self.args.hub_strategy), Path(checkpoint_folder)
        if self.publisher is None or strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        inside = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        try:
            push = self._push_of(self.publisher.repository, folder)
            push = push.to(
                checkpoint=inside.get(strategy),
                always=self.args.hub_always_push or strategy == HubStrategy.ALL_CHECKPOINTS or push.tag is not None,
            )
            self.publisher.submit(stage(push, Path(self.args.output_dir), link=True))
        except Exception as error:  # a full disk, say
            logger.error("%s can't be set aside for publishing (%s); training goes on.", folder, error)

    def _finish_current_push(self) -> None:
        if self.publisher is not None:
            self.publisher.finish()

    # ---- On request ----

    def push_to_hub(  # type: ignore[override]  # nothing where nothing could be published, a future if asked for
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """Saves the model to `output_dir` and publishes what lies there, after everything that waits already.

        Args:
            commit_message: a message of your own stands alone; step, loss and share of neurons recycled are then in the
                description.
            blocking: wait for the commit.
            token, private: as in `args`, which they override.
            revision: the branch to push to.
            kwargs: metadata for the model card, as `create_model_card` takes it.

        Returns:
            On process 0 the commit, or with `blocking=False` a future of it; None if it could not be published, which
            is said with the command that publishes it later. None on the other processes.

        Raises:
            UserError: if nothing can be pushed there.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.card_words = {**self.card_words, **{name: kwargs[name] for name in _CARD_ARGUMENTS & kwargs.keys()}}
        self.save_model(_internal_call=True)
        if self.publisher is None:
            return None
        folder = Path(self.args.output_dir)
        self.create_model_card(**kwargs)
        push = self._push_of(self.publisher.repository, folder, commit_message).to(
            revision=revision or self.args.hub_revision, token=token, always=True
        )
        if self.args.hub_strategy != HubStrategy.END:
            push = push.to(tag=None)  # it belongs to the commit of the checkpoint
        if not blocking:
            return self.publisher.submit(stage(push, folder, link=False))
        future = self.publisher.submit(push)
        self.publisher.finish()
        return future.result()

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes our card into `output_dir`, with what the caller says in it and in its header; cards that this trainer
        writes later say it too. The stock card where there can't be one of ours: without feed-forward blocks, or before
        anything was saved by several processes."""
        words = {name: value for name, value in locals().items() if name in _CARD_ARGUMENTS and value is not None}
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        if not all((folder / name).is_file() for name in files.RECYCLING_FILES):
            if self.neuron_table() is None or self.args.world_size > 1:
                super().create_model_card(**words)
                return
            self.write_recycling_files(folder)
        self.card_words = {**self.card_words, **words}
        self.write_card(folder)

    def _push_of(self, repository: Repository, folder: Path, wanted: str | None = None) -> Push:
        message, description = commit_message(folder, wanted)
        step = step_of(folder)
        return Push(
            folder=folder,
            repo_id=repository.name,
            message=message,
            description=description,
            revision=self.args.hub_revision,
            tag=f"step-{step}" if self.args.hub_tag_steps and step is not None else None,
            private=repository.private,
        )
