"""The feed-forward blocks of a checkpoint whose weights stay on disk."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from hf_recycle.analysis.source import Source
from hf_recycle.analysis.weight_files import PickledFile, SafetensorsFile, WeightFile
from hf_recycle.errors import UserError
from hf_recycle.hub.checks.configuration import configuration_problem
from hf_recycle.neurons.blocks import FeedForward, NeuronSlice
from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.neurons.storage.tiles import Tile, tiles_of_rectangle

_BYTES_AT_ONCE = 1 << 19  # of float32 weights in memory at a time, unless a single row is longer


@dataclass
class Checkpoint:
    """A model's shapes in memory, its weights on disk.

    Attributes:
        source: where the files come from. Only `config.json`, the index and the shards that hold feed-forward weights
            are fetched.
        pattern: see `find_feed_forwards`.
    """

    source: Source
    pattern: str | None = None
    _files: dict[str, WeightFile] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def config(self) -> PreTrainedConfig:
        path = self.source.file("config.json")
        if path is None:
            raise UserError(f"{self.source.name}: there is no config.json; name the folder or repository of a model")
        if problem := configuration_problem(path):
            raise UserError(f"{self.source.name}: its config.json can't be used ({problem})")
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().split("\n", 1)[0].rstrip(". ")
            raise UserError(f"{self.source.name}: its config.json can't be used ({reason})") from error
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(
                f"{self.source.name} is quantised: such weights have no magnitudes to measure; use the checkpoint that "
                "it was made from"
            )
        return config

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on the meta device: shapes, no weights."""
        architecture = (self.config.architectures or [""])[0]
        cls = getattr(transformers, architecture, None)
        try:
            with torch.device("meta"):
                if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
                    return cls(self.config)
                return AutoModel.from_config(self.config, trust_remote_code=False)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"{self.source.name}: transformers can't build its architecture {architecture!r} ({error})"
            ) from error

    @cached_property
    def blocks(self) -> list[FeedForward]:
        """The blocks, in the model's own order.

        Raises:
            UserError: none is found; the message lists what could be one.
        """
        model = self.model
        try:
            return find_feed_forwards(model, self.pattern)
        except ValueError as error:
            raise UserError(f"{self.source.name}: {error}") from error

    def tiles(self, piece: NeuronSlice) -> Iterator[Tile]:
        """The weights of a slice, half a megabyte at a time: float32 (float64 if stored so), each entry once.

        Raises:
            UserError: the checkpoint lacks the tensor, or it has another shape than the model, or it can't be read.
        """
        key, file = self._find(piece)
        parameter = piece.parameter
        first, last = (piece.offset, piece.offset + piece.length) if piece.dim == 0 else (0, parameter.shape[0])
        columns = parameter.shape[1] if parameter.dim() == 2 else 1
        step = max(1, _BYTES_AT_ONCE // (4 * columns))
        for start in range(first, last, step):
            rows = file.rows(key, start, min(start + step, last))
            yield from tiles_of_rectangle(piece, rows, start, 0)

    def _find(self, piece: NeuronSlice) -> tuple[str, WeightFile]:
        names = self._names[id(piece.parameter)]
        found = [(self._keys[name], name) for name in names if name in self._keys]
        if not found:
            raise UserError(f"{self.source.name}: its weights lack {names[0]}, which its config.json asks for")
        (key, converter), name = found[0]
        if converter is not None:
            raise UserError(
                f"{self.source.name}: {name} is put together from several tensors when transformers loads it; load the "
                "model and save it with save_pretrained(..., save_original_format=False) first"
            )
        file = self._file(self._weight_map[0][key] if self._weight_map[0] else self._weight_map[1])
        if key not in file.entries:
            raise UserError(f"{file.path} lacks {key}, which the index places there; copy or download it again")
        shape, expected = file.shape(key), tuple(piece.parameter.shape)
        if shape != expected:
            raise UserError(f"{file.path}: {key} has shape {shape}, and config.json asks for {expected}")
        return key, file

    @cached_property
    def _weight_map(self) -> tuple[dict[str, str] | None, str]:
        return self.source.weight_map()

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        """Every name of each parameter, by its identity: tied ones have several, and are stored under one of them."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return names

    @cached_property
    def _keys(self) -> dict[str, tuple[str, str | None]]:
        """For each parameter of the model, the tensor it is stored in and, if it must be computed, by what pattern."""
        in_files, single = self._weight_map
        stored = in_files if in_files is not None else self._file(single).entries
        return stored_names(self.model, stored)

    def _file(self, name: str) -> WeightFile:
        if name not in self._files:
            path = self.source.file(name)
            if path is None:
                raise UserError(f"{self.source.name}: the file {name} is missing, which the index of its weights names")
            self._files[name] = open_weights(path)
        return self._files[name]


def open_weights(path: Path) -> WeightFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)


def stored_names(model: nn.Module, stored: Iterator[str]) -> dict[str, tuple[str, str | None]]:
    """`{parameter of the model: (name in the checkpoint, pattern of the conversion it needs or None)}`.

    The renamings are those that `from_pretrained` applies: old names, a base model's prefix, reorganised layers.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    parameters: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    names = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = key, None
        names[name] = (key, pattern)
    return names
