"""The model to train: continued from a checkpoint, or built from scratch for its tokenizer and sequences."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hf_recycle.data.arguments import ModelArguments
from hf_recycle.data.overrides import apply_overrides, parse_overrides
from hf_recycle.data.tokenizer import loading_problem
from hf_recycle.errors import UserError
from hf_recycle.hub.checks.configuration import configuration_problem
from hf_recycle.hub.fetch import check_small_files, fetch_file
from hf_recycle.hub.retry import RetryPolicy, insist, say
from hf_recycle.internals.of_transformers import has_class_for, note_commit
from hf_recycle.mlm.tasks import TASKS
from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.utils.suggest import nearest

_DEAD_BIAS = -10.0

logger = logging.get_logger(__name__)

# What configurations call the number of feed-forward neurons of a layer.
_WIDTHS = ("intermediate_size", "d_ff", "n_inner", "hidden_dim", "ffn_dim")


def load_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> PreTrainedModel:
    """The model `arguments` name, fit for the tokenizer's vocabulary and the length of the sequences.

    A model built from scratch takes the size of the vocabulary, the ids of the special tokens and, where its
    default is too short, the number of positions from the tokenizer and the data, unless config_overrides
    sets them. It is initialised from torch's global random state: seed it first.

    Raises:
        UserError: an unknown model, type or configuration key, or a model that doesn't fit.
    """
    config = load_config(arguments)
    scratch = arguments.model_name_or_path is None
    if scratch:
        changes = parse_overrides(arguments.config_overrides or "")
        apply_overrides(config, changes)
        _fit(config, changes, tokenizer, max_seq_length)
        scale_width(config, arguments.ff_factor)
    _check_fit(config, arguments, tokenizer, max_seq_length)
    auto_class = TASKS[arguments.task].auto_class
    if not has_class_for(auto_class, config):
        others = [name for name, task in TASKS.items() if has_class_for(task.auto_class, config)]
        hint = f"try task={others[0]}" if others else "name a language model"
        raise UserError(f"a {config.model_type} model cannot be trained with task={arguments.task!r}; {hint}")
    try:
        if scratch:
            model = auto_class.from_config(config)
            _begin_dead(model, arguments.dead_fraction)
            return model
        model = auto_class.from_pretrained(
            str(arguments.model_name_or_path),
            config=config,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
            dtype="float32",
        )
    except (ValueError, OSError) as error:
        source = (
            arguments.model_name_or_path
            or f"a {config.model_type} with config_overrides={arguments.config_overrides!r}"
        )
        raise UserError(f"{source} could not be built: {loading_problem(error)}") from error
    note_commit(model.config, getattr(arguments.model_revision, "resolved", None))
    return model


def pin_revision(arguments: ModelArguments) -> None:
    """Settles the commit of `model_name_or_path` or `config_name`, once: configuration, tokenizer and weights then come
    from the same one, whatever is pushed meanwhile.

    `model_revision` becomes a `huggingface_hub.ResolvedRevision`: the text it was, and the commit as `.resolved`. It
    stays as it is for a local folder, and, with a warning, if neither the Hub nor the cache knows it.

    Raises:
        UserError: a small file of that commit is too large to be what its name says.
    """
    name = arguments.model_name_or_path or arguments.config_name
    if name is None or os.path.exists(name):
        return
    ask = partial(HfApi().resolve_revision, name, revision=arguments.model_revision)
    try:
        arguments.model_revision = insist(RetryPolicy(), ask)
        check_small_files(name, revision=arguments.model_revision)
    except UserError:
        raise
    except Exception as error:  # loading says what is wrong, or finds its files in the cache
        logger.warning("Which commit %s is at can't be found out (%s): none is recorded.", name, say(error))


def load_config(arguments: ModelArguments) -> PreTrainedConfig:
    """The configuration `arguments` name, before config_overrides.

    Raises:
        UserError: nothing is named, or what is named does not exist.
    """
    name = arguments.model_name_or_path or arguments.config_name
    if name:
        argument = "model_name_or_path" if arguments.model_name_or_path else "config_name"
        if problem := _configuration_problem(name, arguments.model_revision):
            raise UserError(f"{argument}={name!r}: its config.json can't be used ({problem}); name another model")
        try:
            return AutoConfig.from_pretrained(
                name, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"{argument}={name!r} could not be loaded ({loading_problem(error)}); name a model of "
                "the Hub or a local folder that holds a config.json"
            ) from error
    if not arguments.model_type:
        raise UserError("no model is named; pass model_type (such as bert) or model_name_or_path, or a scale recipe")
    if arguments.model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model_type={arguments.model_type!r} is unknown to transformers; "
            + nearest(arguments.model_type, CONFIG_MAPPING.keys())
        )
    return CONFIG_MAPPING[arguments.model_type]()


def _configuration_problem(name: str, revision: str) -> str | None:
    path = Path(name, "config.json")
    if not os.path.exists(name):
        try:
            path = fetch_file(name, "config.json", revision)
        except UserError:
            raise
        except Exception:  # transformers says what is wrong
            return None
    return configuration_problem(path) if path.is_file() else None


def _fit(
    config: PreTrainedConfig, changes: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> None:
    """Give a configuration from scratch what it must know of the tokenizer and the data."""
    values: dict[str, int | None] = {"vocab_size": len(tokenizer)}
    # RoBERTa counts positions by which ids are not its padding id: a wrong one would silently shift them.
    for role in ("pad", "bos", "eos", "cls", "sep", "mask", "unk"):
        key = f"{role}_token_id"
        if hasattr(config, key):
            values[key] = getattr(tokenizer, key, None)
    # An encoder's tokenizer marks beginning and end with [CLS] and [SEP].
    if values.get("bos_token_id", 0) is None:
        values["bos_token_id"] = tokenizer.cls_token_id
    if values.get("eos_token_id", 0) is None:
        values["eos_token_id"] = tokenizer.sep_token_id
    for key, value in values.items():
        if key not in changes:
            setattr(config, key, value)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and "max_position_embeddings" not in changes:
        config.max_position_embeddings = max(positions, positions_needed(config, max_seq_length))


def scale_width(config: PreTrainedConfig, factor: float) -> None:
    """Multiply the number of feed-forward neurons of every layer.

    Raises:
        UserError: the configuration has no such number, or the product is not whole.
    """
    if factor == 1:
        return
    field = next((name for name in _WIDTHS if hasattr(config, name)), None)
    if field is None:
        raise UserError(
            f"ff_factor={factor} can't be used with a {config.model_type}: set its width in config_overrides"
        )
    # GPT-2 leaves its n_inner empty, which means four times the width of the model.
    width = getattr(config, field) or 4 * config.hidden_size
    if not float(width * factor).is_integer():
        raise UserError(
            f"ff_factor={factor} of {field}={width} is not a whole number of neurons; choose another factor"
        )
    setattr(config, field, int(width * factor))


@torch.no_grad()
def _begin_dead(model: PreTrainedModel, fraction: float) -> None:
    """Lets the first neurons of every layer begin dead: with an in-bias so low that they never fire.

    Raises:
        UserError: a block has no in-biases.
    """
    if not fraction:
        return
    for block in find_feed_forwards(model):
        biases = [piece for piece in block.slices if piece.role == "in.bias"]
        if not biases:
            raise UserError(f"dead_fraction={fraction} lowers in-biases, and {block.name} has none; leave it out")
        biases[0].parameter[: round(fraction * block.num_neurons)] = _DEAD_BIAS


def _check_fit(
    config: PreTrainedConfig,
    arguments: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
) -> None:
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} entries, more than the model's vocabulary of {vocabulary}; name the "
            "model's own tokenizer, or build a model from scratch with config_overrides "
            f"vocab_size={len(tokenizer)} or more"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions_needed(config, max_seq_length) > positions:
        raise UserError(
            f"max_seq_length={max_seq_length} needs {positions_needed(config, max_seq_length)} "
            "positions, but the model "
            f"has max_position_embeddings={positions}; shorten the sequences, or change it in config_overrides of a "
            "model from scratch"
        )
    if arguments.task == "mlm" and tokenizer.mask_token_id is None:
        raise UserError(
            f"task='mlm' needs a tokenizer with a mask token, which {tokenizer.name_or_path!r} lacks; name another "
            "tokenizer, or train with task=clm"
        )


def positions_needed(config: PreTrainedConfig, max_seq_length: int) -> int:
    """Position embeddings a sequence takes up: the RoBERTa family counts from its padding id, plus one."""
    if _counts_from_padding(config):
        return max_seq_length + (config.pad_token_id or 0) + 1
    return max_seq_length


def _counts_from_padding(config: PreTrainedConfig) -> bool:
    return config.model_type in {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
