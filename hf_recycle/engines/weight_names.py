"""The names of weights in files, turned into those of the model's modules.

transformers saves many families (ESM, GPT-NeoX, ViT, mixtures of experts and others) under names that their modules no
longer bear, with tensors split that the modules hold in one. `from_pretrained` turns them back; `load_state_dict`
doesn't know of it, and the stock Trainer resumes through `load_state_dict`.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from hf_recycle.internals.of_transformers import names_not_saved, patterns_not_loaded


def conversions_of(model: nn.Module) -> list[WeightTransform]:
    """What `from_pretrained` does to the weights of a model's files, in order; nothing for other modules.

    To be asked before FSDP shards the model: it looks classes up by their names, which FSDP changes.
    """
    return get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []


def renamed(
    keys: Iterable[str], model: nn.Module, targets: dict[str, Tensor], conversions: list[WeightTransform]
) -> Iterator[tuple[str, str, tuple[WeightConverter, str] | None]]:
    """The names of a model's weights for the names in its files, in the order in which `from_pretrained` takes them.

    Args:
        keys: names in the files.
        targets: the model's state dict.
        conversions: of `conversions_of`.

    Yields:
        A name in the files; that of the parameter; and, where this is put together from several tensors, what does it
        and the pattern by which it knows this one.
    """
    renamings = [step for step in conversions if isinstance(step, WeightRenaming)]
    converters = [step for step in conversions if isinstance(step, WeightConverter)]
    of_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    prefix = getattr(model, "base_model_prefix", None)
    # Experts are stacked in the order in which they come.
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, targets)
        if name not in targets and key in targets:  # a pattern that means names of another time
            name, pattern = key, None
        yield key, name, None if pattern is None else (of_pattern[pattern], pattern)


def as_in_model(
    files: Mapping[str, Callable[[], Tensor]],
    model: nn.Module,
    targets: dict[str, Tensor],
    conversions: list[WeightTransform],
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of files as the model holds them, each when it is needed.

    Args:
        files: reads a tensor, by its name in the files.
        targets: the model's state dict.
        conversions: of `conversions_of`.

    Yields:
        A name of `targets`, or that of a file's tensor that the model has no place for, and the tensor.

    Raises:
        ValueError: tensors that belong together don't fit together.
    """
    merged: dict[str, WeightConverter] = {}
    for key, name, part in renamed(files, model, targets, conversions):
        if name in targets and part is not None:
            converter, pattern = part
            parts = merged.setdefault(name, copy.deepcopy(converter))
            parts.add_tensor(name, key, pattern, files[key])  # type: ignore[arg-type]  # or a function that gives it
        else:
            yield (name if name in targets else key), files[key]()
    for first, parts in merged.items():
        try:
            whole = parts.convert(first, model=model, config=model.config)
        except Exception as error:  # as many kinds as there are conversions
            raise ValueError(f"the parts of {first} don't fit together ({error})") from error
        for name, tensor in whole.items():
            yield name, tensor[0] if isinstance(tensor, list) else tensor


def is_left_out(model: nn.Module, name: str) -> bool:
    """Whether `save_pretrained` leaves a tensor out on purpose, because the model makes it anew."""
    return name in names_not_saved(model)


def is_obsolete(model: nn.Module, name: str) -> bool:
    """Whether a tensor of a file is one that the model's class says it no longer has."""
    return any(re.search(pattern, name) for pattern in patterns_not_loaded(model))
