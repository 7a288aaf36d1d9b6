"""L2 to the initial weights: after each optimizer step, W ← W − lr · weight · (W − W₀).

Source: Kumar, Marklund and Van Roy, *Maintaining Plasticity in Continual Learning via Regenerative Regularization*
(arXiv:2308.11958), there a term of the loss; here decoupled, as AdamW does with weight decay.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_recycle.methods.base import Method, Run, refuse_half_precision
from hf_recycle.methods.coordinator import NeuronCallback
from hf_recycle.methods.settings import L2InitSettings
from hf_recycle.neurons.blocks import FeedForward, NeuronSlice, whole_slices
from hf_recycle.neurons.layers import Layers
from hf_recycle.neurons.optimizer_state import check_optimizer, unwrap_optimizer
from hf_recycle.neurons.slices import full_shape
from hf_recycle.neurons.storage import Fragments
from hf_recycle.utils.whole_files import put

FILE = "initial_weights.safetensors"
"""W₀, in the folder of the run beside its checkpoints; these have its checksum. It is never published."""


class L2Init(Method[L2InitSettings]):
    """Pulls weights back to where they were when training began."""

    settings_class = L2InitSettings
    _handle: RemovableHandle | None = None

    def start(self, run: Run, settings: L2InitSettings) -> None:
        super().start(run, settings)
        check_optimizer(run.optimizer, "l2_init_weight", settings.weight)
        model = extract_model_from_parallel(run.model, keep_torch_compile=False)
        slices = whole_slices(model, parameters_of(model, run.table.blocks, settings.parts))
        self._slices = {name: piece for name, piece in slices.items() if run.watch.is_optimized(piece)}
        if not self._slices:
            raise ValueError(f"l2_init_parts={settings.parts} names nothing that {type(model).__name__} trains.")
        refuse_half_precision(self._slices.values(), f"l2_init_weight={settings.weight}")
        if run.step == 0:
            initial = {name: piece.storage.read(piece, piece.lines()) for name, piece in self._slices.items()}
            self._write(Path(run.args.output_dir or "", FILE), initial)
        else:
            initial = self._read()
        # What the optimizer steps, and of it what belongs to these parameters: each with W and W₀ on this process.
        self._pulled: dict[int, list[tuple[nn.Parameter, Tensor, Tensor]]] = {}
        for name, piece in self._slices.items():
            pulled = self._pulled.setdefault(id(piece.storage.stepped(piece, run.optimizer)), [])
            for tile, values in zip(piece.storage.tiles(piece), initial[name], strict=True):
                pulled.append((piece.parameter, tile.values, values))
        # Right behind the optimizer's own step: DeepSpeed makes the weights of the masters just then. It comes before
        # neurons that fade in take their effective weights again, and pruned ones become zero, as weight decay does.
        self._handle = unwrap_optimizer(run.optimizer).register_step_post_hook(self._pull)

    @torch.no_grad()
    def _pull(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        if not self.run.watch.stepped:
            return
        for group in optimizer.param_groups:
            size = group["lr"] * self.settings.weight
            for stepped in group["params"]:
                for parameter, weights, initial in self._pulled.get(id(stepped), ()):
                    if parameter.requires_grad:
                        weights.add_((initial - weights).mul_(size))

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    # ---- The file ----

    def _write(self, path: Path, initial: dict[str, Fragments]) -> None:
        """Writes W₀ on the process that saves, where the run saves anything."""
        args = self.run.args
        if args.save_strategy == "no":
            return
        whole = {}
        for name, piece in self._slices.items():  # all processes gather
            value = piece.storage.gather(piece, piece.lines(), initial[name])
            if args.should_save:
                whole[name] = value.cpu().view(full_shape(piece.parameter))
        if args.should_save:
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path, lambda temporary: save_file(whole, temporary))
            self.table.initial_weights = _checksum(path)

    def _read(self) -> dict[str, Fragments]:
        """W₀ as this process holds the weights, from the folder of the checkpoint or that of the run."""
        checkpoint, own = self.run.checkpoint, Path(self.run.args.output_dir or "", FILE)
        places = [own] if checkpoint is None else [Path(checkpoint).parent / FILE, own]
        path = next((place for place in places if place.is_file()), None)
        if path is None or (checkpoint is not None and _checksum(path) != self.table.initial_weights):
            where = "the checkpoint" if checkpoint is None else checkpoint
            why = f"{FILE} is not beside it" if path is None else f"{path} is not the file of its run"
            # No checkpoint holds it, and so no repository of the Hub.
            todo = f"copy it from that run's output_dir to {own}"
            if checkpoint is not None and not self.table.initial_weights:
                why, todo = "its run had none", "leave l2_init_weight out"
            raise ValueError(
                f"l2_init_weight={self.settings.weight} needs the weights that the run of {where} began with, and "
                f"{why}: {todo}, or start a new run from the checkpoint's weights."
            )
        try:
            with safe_open(path, framework="pt") as file:
                initial = {name: _cut(piece, file.get_tensor(name)) for name, piece in self._slices.items()}
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} does not hold the initial weights of this model: {error}.") from None
        if path != own and self.run.args.should_save:
            own.parent.mkdir(parents=True, exist_ok=True)
            put(own, lambda temporary: shutil.copyfile(path, temporary))
        return initial


def parameters_of(model: nn.Module, blocks: Iterable[FeedForward], parts: Iterable[str]) -> dict[str, nn.Parameter]:
    """Parameters of some parts of a model, by name.

    Args:
        model: unwrapped.
        parts: "all", or some of "ff" (the blocks, with the biases of their out-projections), "attention" (and other
            modules that mix tokens) and "embeddings".
    """
    # Of the names of a tied parameter the last: it is the one that stays under FSDP2, see `drop_tied_aliases`.
    last = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    named = {last[id(parameter)]: parameter for parameter in model.parameters()}
    if "all" in parts:
        return named
    modules = {
        "ff": lambda: (piece.module for block in blocks for piece in block.slices),
        "attention": lambda: _mixers(model),
        "embeddings": lambda: (module for module in model.modules() if isinstance(module, nn.Embedding)),
    }
    wanted = {id(p) for part in parts for module in modules[part]() for p in module.parameters(recurse=False)}
    return {name: parameter for name, parameter in named.items() if id(parameter) in wanted}


def _mixers(model: nn.Module) -> Iterator[nn.Module]:
    layers = Layers(model)
    return (module for path, module in layers.modules.items() if layers.mixes_tokens(path))


def _cut(piece: NeuronSlice, value: Tensor) -> Fragments:
    shape, dtype = full_shape(piece.parameter), torch.promote_types(piece.dtype, torch.float32)
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(f"it has {tuple(value.shape)} {value.dtype} for {tuple(shape)} {dtype}")
    return piece.storage.shard(piece, piece.lines(), value)


def _checksum(path: Path) -> int:
    """A number of 63 bits, which a state file can hold."""
    with path.open("rb") as file:
        return int.from_bytes(hashlib.file_digest(file, "sha256").digest()[:8], "big") >> 1


class L2InitCallback(NeuronCallback):
    """L2 to the initial weights: after each optimizer step, W ← W − lr · weight · (W − W₀), on all trained parameters.

    Source: Kumar et al., *Maintaining Plasticity in Continual Learning via Regenerative Regularization*. W₀ are the
    weights when training began, also those of a pretrained model; lr is the learning rate of the step just taken, of
    each parameter's own group. `parts` restricts it to the feed-forward blocks, attention or embeddings. Frozen
    parameters stay as they are, and steps that the optimizer skips do not count. It costs the memory of the weights
    once more, shards under FSDP2, of the float32 masters under DeepSpeed. Half-precision weights without masters are
    refused.

    W₀ lies in `initial_weights.safetensors` in the output directory, and a run that is resumed needs it: a checkpoint
    has its checksum only. On a stock `Trainer`, whose checkpoints have none, the file is taken as it is.

    Takes the settings of `RecyclingArguments` whose names begin with `l2_init_`, without that prefix.
    """

    method_class = L2Init
