"""Model and data arguments of the command line; their names are those of transformers' `run_mlm.py`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_recycle.data.stages import Stages
from hf_recycle.errors import UserError
from hf_recycle.mlm.mask_rates import SHAPES, MaskRates


def _argument(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """Which model is trained, from where, and with which tokenizer."""

    model_name_or_path: str | None = _argument(
        None,
        "Model of the Hub (user/repo, or hf://user/repo@revision) or local folder whose weights training continues.",
    )
    model_type: str | None = _argument(None, "Architecture of a model trained from scratch, such as bert or gpt2.")
    config_name: str | None = _argument(None, "Configuration of the Hub or local folder for a model from scratch.")
    config_overrides: str | None = _argument(
        None, "Changes to the configuration of a model from scratch: 'hidden_size=128,num_hidden_layers=2'."
    )
    ff_factor: float = _argument(
        1.0, "Multiplies the feed-forward neurons of a model from scratch; 0 leaves none of them."
    )
    dead_fraction: float = _argument(
        0.0,
        "Share of each layer's feed-forward neurons that a model from scratch begins with dead: their in-biases are "
        "-10. For studies of revival.",
    )
    ff_stages: dict | None = _argument(
        None,
        "Widths over training: from which step on (below 1: share of the training) which share of the feed-forward "
        'neurons, such as {0: 0.5, 0.1: 1.0} in a recipe, \'{"0": 0.5, "0.1": 1.0}\' on the command line. New neurons '
        "begin with out-columns of zeros, the smallest go.",
    )
    model_revision: str = _argument("main", "Branch, tag or commit of model_name_or_path and config_name.")
    trust_remote_code: bool = _argument(
        False, "Run the code that a repository brings for its model, configuration or tokenizer."
    )
    task: str = field(
        default="mlm",
        metadata={
            "help": "mlm: masked language modelling; clm: causal language modelling.",
            "choices": ["mlm", "clm"],
        },
    )
    tokenizer_name: str | None = _argument(
        None,
        "Tokenizer of the Hub or local folder. Without it: the one of model_name_or_path or config_name, else one is "
        "trained on the corpus: WordPiece for mlm, byte-level BPE for clm.",
    )
    tokenizer_vocab_size: int = _argument(8192, "Entries of a tokenizer trained on the corpus.")

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything, and split addresses into repository and revision."""
        for name in ("model_name_or_path", "config_name", "tokenizer_name"):
            self._split_address(name)
        if self.task not in ("mlm", "clm"):
            raise UserError(f"task={self.task!r} is unknown; use mlm or clm")
        if self.tokenizer_vocab_size < 256:
            raise UserError(f"tokenizer_vocab_size={self.tokenizer_vocab_size} is too small; use at least 256")
        if self.ff_factor < 0 or self.ff_factor == float("inf"):
            raise UserError(f"ff_factor={self.ff_factor} must be a number from 0")
        if self.ff_stages is not None:
            Stages.of(self.ff_stages)
        if not 0 <= self.dead_fraction <= 1:
            raise UserError(f"dead_fraction={self.dead_fraction} must lie between 0 and 1")
        of_scratch = {
            "ff_factor": self.ff_factor != 1,
            "dead_fraction": self.dead_fraction != 0,
            "config_overrides": bool(self.config_overrides),
        }
        for name, is_set in of_scratch.items():
            if self.model_name_or_path and is_set:
                raise UserError(
                    f"{name}={getattr(self, name)!r} changes a model built from scratch, but "
                    f"model_name_or_path={self.model_name_or_path!r} names a trained one; set one of them to null"
                )

    def _split_address(self, name: str) -> None:
        text = getattr(self, name)
        if text is None or "://" not in text:
            return
        from hf_recycle.hub.address import locate  # late, because it brings the Hub's client

        shared = name != "tokenizer_name"  # model_revision says nothing of the tokenizer
        given = self.model_revision if shared and self.model_revision != "main" else None
        repository, folder, revision = locate(text, given)
        if folder:
            raise UserError(
                f"{name}={text!r} names a folder, and is loaded from the root of a repository; bring the folder here "
                "with hf-recycle pull, and name that"
            )
        if revision and not shared:
            raise UserError(f"{name}={text!r} names a revision, and the newest is loaded; leave the revision out")
        setattr(self, name, repository)
        if shared and revision:
            self.model_revision = revision


@dataclass
class DataArguments:
    """Which texts are trained on, and how they become sequences."""

    dataset_name: str | None = _argument(
        None, "Dataset of the Hub or local dataset folder; or facts: the built-in task of learning facts by heart."
    )
    dataset_config_name: str | None = _argument(None, "Configuration of dataset_name.")
    text_column: str | None = _argument(None, "Column that holds the text; 'text' or the only column of strings.")
    train_file: str | None = _argument(
        None,
        "Local file to train on: text (.txt, a document a line), JSON (.json, .jsonl), CSV (.csv, .tsv) or Parquet "
        "(.parquet), with a document a row in text_column; all but Parquet may be compressed.",
    )
    validation_file: str | None = _argument(None, "Local file to evaluate on, as train_file.")
    validation_split_percentage: int = _argument(
        5, "Share of the training sequences to evaluate on when no validation data is named."
    )
    max_seq_length: int = _argument(128, "Tokens of a sequence, special tokens included.")
    mlm_probability: float = _argument(0.15, "Share of the tokens that are masked.")
    mlm_probability_schedule: dict[str, float] | None = _argument(
        None,
        "Shares that are masked instead while training, from a step, or a share of the training, on: "
        "{0: 0.3, 0.8: 0.15}. Evaluations mask mlm_probability.",
    )
    mlm_probability_shape: str = field(
        default="steps",
        metadata={
            "help": "steps: a share of mlm_probability_schedule holds until the next; linear: it changes evenly to it.",
            "choices": list(SHAPES),
        },
    )
    whole_word_mask: bool = _argument(False, "Mask all tokens of a word or none of them.")
    line_by_line: bool = _argument(False, "One line a sequence, padded, instead of packing texts to full sequences.")
    streaming: bool = _argument(False, "Read the training data while training, without storing it.")
    preprocessing_num_workers: int | None = _argument(None, "Processes that tokenise.")
    max_train_samples: int | None = _argument(None, "Train on at most so many sequences.")
    max_eval_samples: int | None = _argument(None, "Evaluate on at most so many sequences.")
    facts_keys: int = _argument(
        64, "dataset_name=facts: number of first keys, and of second ones; a fact says which value one of each have."
    )
    facts_values: int = _argument(64, "dataset_name=facts: number of values.")
    facts_number: int | None = _argument(None, "dataset_name=facts: number of facts. None: one for each pair of keys.")
    facts_tasks: int = _argument(1, "dataset_name=facts: tasks one after the other, with the same keys and new values.")
    facts_epochs: int = _argument(1, "dataset_name=facts: epochs of a task before the next one comes.")

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if self.dataset_name and self.train_file:
            raise UserError(
                f"dataset_name={self.dataset_name!r} and train_file={self.train_file!r} both name training data; "
                "set one of them to null"
            )
        if self.validation_file and not (self.dataset_name or self.train_file):
            raise UserError(
                f"validation_file={self.validation_file!r} needs training data beside it; pass train_file or "
                "dataset_name"
            )
        if self.streaming and not (self.dataset_name or self.train_file):
            raise UserError("streaming=True needs something to stream; pass train_file or dataset_name")
        if self.max_seq_length < 4:
            raise UserError(f"max_seq_length={self.max_seq_length} is too short; use at least 4")
        if not 0 < self.mlm_probability < 1:
            raise UserError(f"mlm_probability={self.mlm_probability} must lie between 0 and 1, both excluded")
        self.mask_rates()
        if not 1 <= self.validation_split_percentage <= 50:
            raise UserError(f"validation_split_percentage={self.validation_split_percentage} must lie between 1 and 50")
        for name in ("preprocessing_num_workers", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1; leave it out to have no limit")
        for name in ("train_file", "validation_file"):
            value = getattr(self, name)
            if value is not None:
                check_text_file(name, value)
        self._check_facts()

    @property
    def are_facts(self) -> bool:
        """Whether the data is the built-in task of facts. (A folder of that name is `./facts`.)"""
        return self.dataset_name == FACTS

    def _check_facts(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not item.name.startswith("facts_") or value == item.default:
                continue
            if not self.are_facts:
                raise UserError(f"{item.name}={value} is a setting of dataset_name={FACTS!r}; pass that too")
            if value < 1:
                raise UserError(f"{item.name}={value} must be at least 1")
        if self.facts_number is not None and self.facts_number > self.facts_keys**2:
            raise UserError(
                f"facts_number={self.facts_number} is more than the {self.facts_keys**2} pairs of facts_keys="
                f"{self.facts_keys} keys; lower it, or raise facts_keys"
            )
        if self.are_facts and self.streaming:
            raise UserError(
                f"streaming=True can't be used with dataset_name={FACTS!r}, which is built in; leave it out"
            )

    def mask_rates(self) -> MaskRates | None:
        """The schedule of the share that is masked, if there is one.

        Raises:
            UserError: it is not.
        """
        if self.mlm_probability_schedule is None:
            return None
        try:
            return MaskRates(self.mlm_probability_schedule, self.mlm_probability_shape)
        except ValueError as error:
            raise UserError(str(error)) from None


FACTS = "facts"
"""The name of the built-in task of facts."""


# The endings that name a builder of `datasets`, and those of compression it sees through by itself.
BUILDERS = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSION = (".gz", ".xz", ".bz2", ".zst")


def text_builder(path: str) -> str | None:
    """The builder of `datasets` that reads a file, by its ending; None for an unknown one."""
    return BUILDERS.get(_ending(path) or "")


def is_tab_separated(path: str) -> bool:
    """Whether the ending of a file names values separated by tabs."""
    return _ending(path) == ".tsv"


def _ending(path: str) -> str | None:
    """The last ending of a file that says nothing of its compression."""
    endings = [suffix.lower() for suffix in Path(path).suffixes]
    while endings and endings[-1] in COMPRESSION:
        endings.pop()
    return endings[-1] if endings else None


def check_text_file(argument: str, path: str) -> None:
    """Refuse a file that is missing, empty or of an unknown kind.

    Raises:
        UserError: with a sentence that names `argument` and `path`.
    """
    if text_builder(path) is None:
        raise UserError(f"{argument}={path!r} has an unknown extension; use one of {', '.join(BUILDERS)}")
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(f"{argument}={path!r} does not exist; pass the path of a file with text in it")
    if not file.is_file():
        raise UserError(f"{argument}={path!r} is not a file; pass the path of a file with text in it")
    if file.stat().st_size == 0:
        raise UserError(f"{argument}={path!r} is empty; pass a file with text in it")
