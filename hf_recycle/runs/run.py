"""A run from its arguments: everything made, trained, evaluated, saved and summed up."""

import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, default_data_collator, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_recycle.checkpoints.claims import claimed
from hf_recycle.data.arguments import DataArguments, ModelArguments
from hf_recycle.data.facts import Facts, facts_tokenizer
from hf_recycle.data.loading import load_data, unigram_entropy
from hf_recycle.data.model import load_model, pin_revision
from hf_recycle.data.sources import load_texts
from hf_recycle.data.stages import Stages
from hf_recycle.data.tokenizer import load_tokenizer, trained_tokenizer
from hf_recycle.engines.launch import check_process_count, check_same, shared_arguments
from hf_recycle.errors import UserError
from hf_recycle.hub.address import is_address
from hf_recycle.hub.pull.resume import local_checkpoint
from hf_recycle.mlm.tasks import TASKS
from hf_recycle.runs.announcement import Announcement
from hf_recycle.runs.context import run_context
from hf_recycle.runs.launcher import LAUNCH_WORDS
from hf_recycle.runs.parse import RunArguments
from hf_recycle.runs.stages import StageEnd, as_wide_as, check_stages, first_stage
from hf_recycle.trainer.trainer import RecyclingTrainer
from hf_recycle.utils.command_words import our_command, path_from_here, without
from hf_recycle.utils.whole_files import write_bytes


@dataclass
class Run:
    """One training run, ready to start."""

    arguments: RunArguments
    trainer: RecyclingTrainer
    checkpoint: str | None
    floor: float | None

    @classmethod
    def prepare(cls, arguments: RunArguments, words: Sequence[str] = (), *, quiet: bool = False) -> "Run":
        """Load and build everything, so that what can fail fails before the first step.

        Args:
            words: the command line that the arguments were parsed from, for the model card.
            quiet: no banner when training begins, and no progress.

        Raises:
            UserError: see `check_arguments`, `load_texts`, `load_data`, `load_model` and `find_checkpoint`.
            ValueError: what the trainer refuses.
        """
        args = arguments.training
        check_arguments(arguments)
        _check_folder(args.output_dir)
        # A second run in the folder is refused before its data is prepared, and what a killed one left is put right.
        with claimed(Path(args.output_dir), args):
            checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        if checkpoint is None and args.resume_from_checkpoint and args.should_log:
            print(f"no checkpoint in {args.output_dir} yet: starting from scratch")
        if arguments.data.whole_word_mask:
            args.remove_unused_columns = False  # the model takes no word_starts, but the collator needs them
        # Now, so that what the Hub refuses is said before the data is prepared.
        checkpoint = local_checkpoint(checkpoint, args)
        pin_revision(arguments.model)
        set_seed(args.seed)
        # The main process fills the caches, the others then read them.
        with args.main_process_first(local=False, desc="preparing the data"):
            tokenizer, train, validation = prepare_data(arguments.model, arguments.data)
        check_evaluation(args, validation)
        model = load_model(first_stage(arguments.model), tokenizer, arguments.data.max_seq_length)
        model = as_wide_as(model, checkpoint, args.ff_pattern, args.ff_blocks)
        trainer = RecyclingTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=make_collator(arguments, tokenizer),
            processing_class=tokenizer,
        )
        floor = None
        if isinstance(train, Dataset) and isinstance(validation, Dataset):
            floor = unigram_entropy(TASKS[arguments.model.task], train, validation, tokenizer)
        trainer.run_context = run_context(arguments, words, floor)
        if arguments.model.ff_stages is not None:
            trainer.add_callback(StageEnd(Stages.of(arguments.model.ff_stages)))
        trainer.add_callback(Announcement(trainer, arguments, quiet=quiet))
        for progress in (PrinterCallback, ProgressCallback) if quiet else ():
            trainer.remove_callback(progress)
        return cls(arguments, trainer, checkpoint, floor)

    def train(self) -> None:
        """Train, evaluate, save, and on the main process print the summary and draw the figures."""
        trainer = self.trainer
        result = trainer.train(resume_from_checkpoint=self.checkpoint)
        if trainer.state.global_step < trainer.state.max_steps and self.arguments.model.ff_stages is not None:
            return  # a stage is over, and the run is not
        trainer.save_metrics("train", result.metrics, combined=False)
        if trainer.eval_dataset is not None:
            trainer.save_metrics("eval", trainer.evaluate(), combined=False)
        # After the evaluation, which belongs to the history that is saved with the model. The state first, which the
        # model card reads.
        trainer.save_state()
        trainer.save_model()
        # A baseline without feed-forward neurons has no history of them.
        if trainer.is_world_process_zero() and trainer.neuron_table() is not None:
            _report(Path(trainer.args.output_dir), self.floor, TASKS[self.arguments.model.task].auto_class.__name__)
            if trainer.publisher is not None and (unpublished := trainer.publisher.report()):
                print(unpublished)

    def how_to_go_on(self, words: Sequence[str]) -> str:
        """A clause that tells how to resume what was interrupted."""
        folder = self.trainer.args.output_dir
        if last_checkpoint(folder) is None:
            return f"no checkpoint was saved yet in {folder}, so the same command starts again"
        parts = [
            shlex.join(without(words, ["resume_from_checkpoint"])),
            os.environ.get(LAUNCH_WORDS),
            "--resume_from_checkpoint true",
        ]
        command = " ".join(filter(None, parts))
        return f"go on from the last checkpoint with: {our_command()} train {command}"


def prepare_data(
    model: ModelArguments, data: DataArguments
) -> tuple[PreTrainedTokenizerBase, Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The tokenizer (loaded, or trained on the texts), and the training and validation sequences."""
    for name in ("whole_word_mask", "mlm_probability_schedule"):
        if getattr(data, name) and (model.task != "mlm" or data.are_facts):
            why = "the facts say so themselves" if data.are_facts else f"task={model.task!r} masks nothing"
            raise UserError(f"{name}={getattr(data, name)} says what is masked, and {why}; leave it out")
    if data.are_facts:
        facts = Facts.of(data)
        return facts_tokenizer(facts.keys, facts.values), facts, facts.last_task()
    texts = load_texts(data)
    named = model.tokenizer_name or model.model_name_or_path or model.config_name
    if named:
        revision = "main" if model.tokenizer_name else model.model_revision
        tokenizer = load_tokenizer(named, data.max_seq_length, revision, model.trust_remote_code)
    else:
        kind = TASKS[model.task].tokenizer
        tokenizer = trained_tokenizer(texts.sample(), model.tokenizer_vocab_size, data.max_seq_length, kind)
    train, validation = load_data(data, tokenizer, texts)
    return tokenizer, train, validation


def make_collator(arguments: RunArguments, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], Any]:
    """The collator of the task: masks tokens, or repeats them as labels."""
    if arguments.data.are_facts:
        return default_data_collator  # what is masked, and what belongs there, is in the data
    masking = {
        "mlm_probability": arguments.data.mlm_probability,
        "mask_rates": arguments.data.mask_rates(),
        "whole_word_mask": arguments.data.whole_word_mask,
        "seed": arguments.training.seed,
    }
    return TASKS[arguments.model.task].collator(tokenizer, **masking)


def last_checkpoint(folder: str) -> str | None:
    """The last checkpoint in an output folder, or None."""
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def _check_folder(folder: str) -> None:
    """Raises a UserError if nothing can be written to `folder`, which is made if it is not there."""
    if Path(folder).is_file():
        raise UserError(f"output_dir={folder!r} is a file; name a folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"output_dir={folder!r} can't be written to ({error.strerror or error}); name another folder"
        ) from None


# What the Trainer, or DeepSpeed, keeps only beside an optimizer.
_RESUMABLE = ("scheduler.pt", "latest")


def find_checkpoint(output_dir: str, resume: str | None) -> str | None:
    """The checkpoint to resume from, or None to start from scratch.

    Args:
        output_dir: the folder of the run.
        resume: a path; or `hf://user/repo...`, which is returned as it is; or "true": the last checkpoint of
            `output_dir`, if there is one; or None or "false".

    Raises:
        UserError: `resume` does not exist, or `output_dir` holds another run and no resume was asked for.
    """
    found = last_checkpoint(output_dir)
    if resume is None or resume.lower() == "false":
        if found is not None:
            raise UserError(
                f"output_dir={output_dir!r} already holds checkpoints of a run; pass "
                "--resume_from_checkpoint true to go on with it, or another --output_dir"
            )
        return None
    if resume.lower() == "true":
        return found
    if is_address(resume):
        return resume
    if not Path(resume).is_dir():
        raise UserError(
            f"resume_from_checkpoint={resume!r} does not exist; pass true, the path of a checkpoint folder or "
            "hf://user/repo"
        )
    # The folder of a finished run has a trainer state, but no optimizer: going on from it would not be resuming.
    if not Path(resume, "trainer_state.json").is_file() or not any(Path(resume, n).exists() for n in _RESUMABLE):
        raise UserError(
            f"resume_from_checkpoint={resume!r} is not a checkpoint that training can go on from; name one of its "
            "checkpoint-N folders, or pass true for the last one in output_dir"
        )
    return resume


def check_arguments(arguments: RunArguments) -> None:
    """What can be told before anything is loaded.

    Raises:
        UserError: the processes are not those that were asked for, or were started with other arguments; see
            `check_stages`; or something can't be used with the built-in task of facts.
    """
    args = arguments.training
    check_process_count(args.world_size)
    check_same(asdict(arguments.model) | asdict(arguments.data) | shared_arguments(args))
    _check_facts(arguments)
    check_stages(arguments)


def _check_facts(arguments: RunArguments) -> None:
    """Raises a UserError for what can't be used with the built-in task of facts."""
    model, data, training = arguments.model, arguments.data, arguments.training
    if not data.are_facts:
        return
    if model.task != "mlm":
        raise UserError(f"task={model.task!r} can't be used with dataset_name={data.dataset_name!r}; use task=mlm")
    if model.tokenizer_name:
        raise UserError(
            f"tokenizer_name={model.tokenizer_name!r} can't be used with dataset_name={data.dataset_name!r}, which has "
            "words of its own; leave it out"
        )
    if data.facts_tasks > 1 and training.train_sampling_strategy != "sequential":
        raise UserError(
            f"facts_tasks={data.facts_tasks} needs train_sampling_strategy=sequential, so that tasks come one after "
            "the other (within one, facts are shuffled anyway)"
        )


def check_evaluation(args: Any, validation: Any) -> None:
    """Raises a UserError if an evaluation is asked for without data to evaluate on."""
    if validation is None and args.eval_strategy != "no":
        raise UserError(
            f"eval_strategy={args.eval_strategy.value!r} needs something to evaluate on, and a "
            "stream has no validation data of its own; pass validation_file or eval_strategy=no"
        )


def _report(folder: Path, floor: float | None, auto_class: str) -> None:
    # Drawing needs matplotlib, which the other processes need not load.
    from hf_recycle.plots.run import figure_pictures
    from hf_recycle.records.history import RecyclingHistory
    from hf_recycle.runs.summary import next_steps, summary_text

    history = RecyclingHistory.of_own_run(folder)
    pictures = figure_pictures(history, unigram_entropy=floor)
    (folder / "figures").mkdir(exist_ok=True)
    for name, picture in pictures.items():  # as PNG they came with the card
        write_bytes((folder / "figures" / name).with_suffix(".svg"), picture)
    shown = path_from_here(folder)
    print(summary_text(history, unigram_entropy=floor, model_folder=shown, auto_class=auto_class))
    if pictures:
        print(f"Figures: {shown}/figures")
    print(next_steps(shown))
