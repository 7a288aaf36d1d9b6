"""The feed-forward blocks of a checkpoint whose weights stay on disk."""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
)

from hf_recycle.analysis.source import Source
from hf_recycle.analysis.weight_files import SafetensorsFile, Tensors, WeightFile, read_pickled
from hf_recycle.engines.weight_names import conversions_of, renamed
from hf_recycle.errors import UserError
from hf_recycle.hub.checks.configuration import configuration_problem
from hf_recycle.neurons.blocks import FeedForward, NeuronSlice
from hf_recycle.neurons.find import Survey, survey
from hf_recycle.neurons.slices import full_shape
from hf_recycle.neurons.storage.tiles import Tile, tiles_of_rectangle

_BYTES_AT_ONCE = 1 << 19  # of float32 weights in memory at a time, unless a single row is longer


@dataclass
class Checkpoint:
    """A model's shapes in memory, its weights on disk.

    Attributes:
        source: where the files come from. Only `config.json`, the index and the shards that hold feed-forward weights
            are fetched.
        pattern, ff_blocks: see `find_feed_forwards`.
    """

    source: Source
    pattern: str | None = None
    ff_blocks: str | None = None
    _files: dict[str, WeightFile] = field(default_factory=dict, init=False, repr=False)
    _converted: tuple[str, Tensors] = field(default=("", Tensors(Path(), {})), init=False, repr=False)

    @cached_property
    def config(self) -> PreTrainedConfig:
        path = self.source.file("config.json")
        if path is None:
            raise UserError(f"{self.source.name}: there is no config.json; name the folder or repository of a model")
        if problem := configuration_problem(path):
            raise UserError(f"{self.source.name}: its config.json can't be used ({problem})")
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # of many kinds: every family has checks of its own
            reason = str(error).strip().replace("\n", " ").rstrip(". ")[:300]
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
        except Exception as error:  # of many kinds, as above
            raise UserError(
                f"{self.source.name}: transformers can't build its architecture {architecture!r} ({error})"
            ) from error

    @property
    def blocks(self) -> list[FeedForward]:
        """The blocks, in the model's own order.

        Raises:
            UserError: none is found; the message lists what could be one.
        """
        return self.survey.blocks

    @cached_property
    def survey(self) -> Survey:
        """The blocks with what looks like one and is left out; see `blocks`. Needs the configuration alone."""
        model = self.model
        try:
            return survey(model, self.pattern, self.ff_blocks)
        except ValueError as error:
            raise UserError(f"{self.source.name}: {error}") from error

    def tiles(self, piece: NeuronSlice) -> Iterator[Tile]:
        """The weights of a slice, half a megabyte at a time: float32 (float64 if stored so), each entry once.

        Raises:
            UserError: the checkpoint lacks a tensor, or it has another shape than the model, or it can't be read.
        """
        rows, columns = piece.matrix_shape
        first, last = 0, rows
        if piece.dim == 0:
            first, last = piece.offset, min(rows, piece.offset + piece.length * piece.stride)
        step = max(1, _BYTES_AT_ONCE // (4 * columns))
        for part in self._parts(piece):
            end = min(last, part.row + part.rows)
            for start in range(max(first, part.row), end, step):
                stop, shift = min(start + step, end), part.at - part.row
                values = part.file.rows(part.key, start + shift, stop + shift, columns)
                yield from tiles_of_rectangle(piece, values, piece.first_row + start, 0)

    def _parts(self, piece: NeuronSlice) -> list["_Part"]:
        """The tensors that the matrix of a slice is stored in, one below the other."""
        names = self._names[id(piece.parameter)]
        found = [(self._keys[name], name) for name in names if name in self._keys]
        if not found:
            raise UserError(f"{self.source.name}: its weights lack {names[0]}, which its config.json asks for")
        stored, name = found[0]
        shape, rows = tuple(full_shape(piece.parameter)), piece.matrix_shape[0]
        if stored.is_whole:
            [[key]] = stored.keys
            return [_Part(key, self._open(key, shape), 0, rows, piece.first_row)]
        if not stored.is_stacked:
            return [_Part(name, self._convert(stored, name, shape), 0, rows, piece.first_row)]
        keys = [
            column[piece.expert or 0]
            for column in stored.keys
            if len(column) == (1 if piece.expert is None else shape[0])
        ]
        if len(keys) != len(stored.keys) or rows % len(keys):
            raise UserError(f"{self.source.name}: its weights lack a part of {name}; copy or download it again")
        height = rows // len(keys)
        below = (height, *shape[(1 if piece.expert is None else 2) :])
        return [_Part(key, self._open(key, below), n * height, height, 0) for n, key in enumerate(keys)]

    def _open(self, key: str, expected: tuple[int, ...] | None = None) -> WeightFile:
        file = self._file(self._weight_map[0][key] if self._weight_map[0] else self._weight_map[1])
        if key not in file.entries:
            raise UserError(f"{file.path} lacks {key}, which the index places there; copy or download it again")
        shape = file.shape(key)
        if expected not in (None, shape):
            raise UserError(f"{file.path}: {key} has shape {shape}, and config.json asks for {expected}")
        return file

    def _convert(self, stored: "Stored", name: str, expected: tuple[int, ...]) -> Tensors:
        """What transformers makes of some tensors: whole, and kept until others are asked for."""
        if self._converted[0] != stored.first:
            assert stored.converter is not None, "one tensor is not converted"
            parts = copy.deepcopy(stored.converter)
            for pattern, keys in zip(parts.source_patterns, stored.keys, strict=True):
                for key in keys:
                    parts.add_tensor(stored.first, key, pattern, partial(self._whole, key))  # type: ignore[arg-type]
            try:
                made = parts.convert(stored.first, model=self.model, config=self.config)
            except Exception as error:  # as many kinds as there are conversions
                raise UserError(f"{self.source.name}: the parts of {name} don't fit together ({error})") from error
            whole = {key: tensor[0] if isinstance(tensor, list) else tensor for key, tensor in made.items()}
            self._converted = stored.first, Tensors(Path(self.source.name), whole)
        tensors = self._converted[1]
        if name not in tensors.entries or tensors.shape(name) != expected:
            raise UserError(f"{self.source.name}: its weights don't give a {name} of shape {expected}")
        return tensors

    def _whole(self, key: str) -> Tensor:
        file = self._open(key)
        rows, *columns = file.shape(key)
        return file.rows(key, 0, rows, math.prod(columns)).view(rows, *columns)

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
    def _keys(self) -> dict[str, "Stored"]:
        """For each parameter of the model, the tensors that it is stored in."""
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
    return SafetensorsFile(path) if path.suffix == ".safetensors" else read_pickled(path)


@dataclass(frozen=True)
class _Part:
    """Rows `row` to `row + rows` of a matrix: those of the tensor `key` from `at` on."""

    key: str
    file: WeightFile
    row: int
    rows: int
    at: int


@dataclass(frozen=True)
class Stored:
    """How a parameter is stored.

    Attributes:
        keys: names of tensors; for each part that the parameter is put together from, those of all experts.
        converter: how transformers puts them together; None: the parameter is the one tensor.
        first: name of the first parameter that it makes of them.
    """

    keys: list[list[str]]
    converter: WeightConverter | None = None
    first: str = ""

    @property
    def is_whole(self) -> bool:
        return self.converter is None

    @property
    def is_stacked(self) -> bool:
        """Whether the parts lie one below the other in the matrix: in that of each expert, if there are experts."""
        if self.converter is None:
            return False
        steps = [(type(step), getattr(step, "dim", None)) for step in self.converter.operations]
        merge = (MergeModulelist, 0)
        known = steps in ([merge], [merge, (Concatenate, 1)], [(Concatenate, 0)])
        return known and len(self.converter.target_patterns) == 1


def stored_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Stored]:
    """How each parameter of a model is stored, by its name.

    The renamings and conversions are those that `from_pretrained` applies: old names, a base model's prefix,
    reorganised layers, experts gathered into one parameter.
    """
    parameters: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    names: dict[str, Stored] = {}
    for key, name, part in renamed(stored, model, parameters, conversions_of(model)):
        if part is None:
            names[name] = Stored([[key]])
            continue
        converter, pattern = part
        patterns = converter.source_patterns
        known = names.setdefault(name, Stored([[] for _ in patterns], converter, name))
        if known.converter is converter:
            known.keys[patterns.index(pattern)].append(key)
    for each in list(names.values()):
        if each.converter is not None:
            own, *others = each.converter.target_patterns
            for other in others:
                names.setdefault(each.first.replace(own, other), each)
    return names
