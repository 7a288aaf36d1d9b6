"""Makes what a data loader gives a pure function of seed, epoch and place, whoever built the loader."""

from typing import Any

from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset

from hf_recycle.batches.clock import TrainingClock
from hf_recycle.batches.numbered import NumberedDataset, NumberedStream
from hf_recycle.batches.sampling import SeededSampler
from hf_recycle.batches.seeded import SeededCollator

_DONE = "_hf_recycle_is_reproducible"


def base_loader(loader: Any) -> Any:
    """The torch loader inside a loader that Accelerate prepared; another loader itself."""
    return getattr(loader, "base_dataloader", loader)


def make_reproducible(loader: Any, seed: int, clock: TrainingClock) -> bool:
    """Wraps, in place, the dataset, the collator and the sampler of a loader, which then number and seed by themselves.

    Args:
        loader: a torch loader, prepared by Accelerate or not; one that was wrapped before is left as it is.
        seed: any integer.
        clock: tells the epoch, and in a training when examples are trained.

    Returns:
        Whether it could be done: not for a loader that is no torch loader.
    """
    base = base_loader(loader)
    if not isinstance(base, DataLoader):
        return False
    if getattr(base, _DONE, False):
        return True
    # Past the guard of DataLoader, which keeps a dataset from being exchanged for another one.
    holder = base.dataset if isinstance(base.dataset, IterableDatasetShard) else base
    if not isinstance(holder.dataset, IterableDataset):
        vars(holder)["dataset"] = NumberedDataset(holder.dataset, clock, seed)
        _seed_sampler(base, clock, seed)
    elif not isinstance(holder.dataset, NumberedStream):
        vars(holder)["dataset"] = NumberedStream(holder.dataset, clock, seed)
    base.collate_fn = SeededCollator(base.collate_fn, seed)
    setattr(base, _DONE, True)
    return True


def set_sampler_epoch(loader: Any, epoch: int) -> None:
    """Tells every sampler of a loader, however deep, which epoch comes. Accelerate reaches some only, and none behind
    the loader that skips batches on several processes."""
    holder = base_loader(loader)
    while (name := _inner_sampler(holder)) is not None:
        holder = vars(holder)[name]
        if hasattr(holder, "set_epoch"):
            holder.set_epoch(epoch)


def _seed_sampler(base: DataLoader, clock: TrainingClock, seed: int) -> None:
    holder: Any = base
    name = _inner_sampler(base)
    assert name is not None, "every loader of a dataset with a length draws from a sampler"
    while (inner := _inner_sampler(vars(holder)[name])) is not None:
        holder, name = vars(holder)[name], inner
    vars(holder)[name] = SeededSampler(vars(holder)[name], clock, seed)


def _inner_sampler(holder: Any) -> str | None:
    """The attribute of a loader or sampler that holds the sampler it draws from."""
    attributes = getattr(holder, "__dict__", {})
    return next((name for name in ("batch_sampler", "sampler") if attributes.get(name) is not None), None)
