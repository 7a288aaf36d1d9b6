"""The method `Overtraining`: when neurons are overtrained, and on which batches; and its public callback."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_recycle.batches.extra_batches import ExtraBatches
from hf_recycle.engines.replica_checksum import process_count
from hf_recycle.methods.base import Method, Run, StepInfo
from hf_recycle.methods.coordinator import NeuronCallback
from hf_recycle.methods.overtraining.subsets import subset_size
from hf_recycle.methods.overtraining.training import overtrain
from hf_recycle.methods.schedule import resolved
from hf_recycle.methods.settings import OvertrainingSettings
from hf_recycle.neurons.fresh_optimizer import fresh_optimizer
from hf_recycle.neurons.optimizer_state import check_optimizer
from hf_recycle.records.recorder import HistoryRecorder, metric_values


class Overtraining(Method[OvertrainingSettings]):
    """Overtrains feed-forward weights every so many steps."""

    settings_class = OvertrainingSettings

    def start(self, run: Run, settings: OvertrainingSettings) -> None:
        super().start(run, settings)
        self._every = resolved(settings.steps)
        if any(block.out_slice.storage.separate_masters for block in run.table.blocks):
            raise ValueError("overtrain_steps can't be used with DeepSpeed: use DDP or FSDP2.")
        check_optimizer(run.optimizer, "overtrain_steps", self._every)
        self._check_subset()
        # One is made at every overtraining; what can't be made is said now.
        fresh_optimizer(run.optimizer, (p for block in run.table.blocks for p in block.parameters()))
        self._data = (run.extra_batches or extra_batches_of(run.train_dataloader))(
            resolved(settings.seed), "overtrain_steps"
        )
        self._last_loss = _last_loss(run.recorder)

    def _check_subset(self) -> None:
        smallest = min(self.table.blocks, key=lambda block: block.num_neurons)
        if self.settings.subset != "all" and not subset_size(self.settings.fraction, smallest.num_neurons):
            raise ValueError(
                f"overtrain_fraction={self.settings.fraction:g} of the {smallest.num_neurons} neurons of "
                f"{smallest.name} is less than one: raise it."
            )

    def acting_steps(self, max_steps: int) -> range:
        every = resolved(self.settings.steps)
        return range(every, max_steps + 1, every)

    def after_step(self, info: StepInfo) -> None:
        if not info.stepped or info.optimizer_steps % self._every:
            return
        args, table = self.run.args, self.table
        size = args.per_device_train_batch_size
        own_tokens: list[int] = []
        with self.run.attached():
            record = overtrain(
                table,
                self.settings,
                info.optimizer_steps,
                model=self.run.model,
                optimizer=self.run.optimizer,
                batches=self._batches(size, args.process_index, args.world_size, own_tokens),
                loss_of=self.run.loss_of or model_loss,
                max_grad_norm=args.max_grad_norm,
                device=args.device,
                process=args.process_index,
                frozen=self.run.frozen(),
            )
        if record is None:
            return
        first, last, tokens = _over_processes([*record.losses[[0, -1]].tolist(), sum(own_tokens)], args.device)
        samples = self.settings.batches * size * args.world_size
        table.overtrain_samples += samples
        table.overtrain_tokens += int(tokens)
        self._last_loss = last / args.world_size
        self.run.recorder.overtraining(
            info.step,
            {
                "batches": self.settings.batches,
                "skipped": record.skipped,
                "samples": samples,
                "tokens": tokens,
                "neurons": record.neurons,
                "learning_rate": record.learning_rate,
                "first_loss": first / args.world_size,
                "last_loss": self._last_loss,
            },
        )

    def _batches(self, size: int, process: int, processes: int, tokens: list[int]) -> Iterator[Any]:
        """The batches of one process; appends to `tokens` how many each has."""
        position = self.table.overtrain_samples + process * size
        for number in range(self.settings.batches):
            batch = self._data.batch(position + number * processes * size, size)
            tokens.append(_count_tokens(batch))
            yield batch

    def scalars(self) -> dict[str, float]:
        """Extra tokens so far, over all processes, and the loss of the last extra batch."""
        if not self.has_started:
            return {}
        loss = {} if self._last_loss is None else {"overtrain_loss": self._last_loss}
        return {"overtrain_tokens": self.table.overtrain_tokens, **loss}


class OvertrainingCallback(NeuronCallback):
    """Overtraining: every `steps` optimizer steps, the FF weights alone are trained on `batches` extra batches.

    Source: *Neuron Recycling*, section "Understanding neuron magnitudes". Everything else is frozen, the
    out-projections' biases too; so are pruned neurons, neurons that fade in and, with `subset` smallest, largest or
    random, all but `fraction` of each layer's neurons. Blocks that are frozen at that time stay as they are.

    A batch is `per_device_train_batch_size` samples on each process and one optimizer step, without accumulation. The
    batches come from the training set, in an order and with masks of their own. The optimizer is a
    fresh one of the class and hyper-parameters of the main one, at the learning rate that the main schedule has come
    to; over the first tenth of the batches (at least one), w in all, the rate of batch b is b / (w + 1) of that.
    Gradients are clipped as in the main run, over the weights that are trained. Afterwards the main run goes on where
    it was: optimizer, schedule, data order and random states are untouched. Steps that the optimizer skips, because a
    gradient scaler found an overflow, do not count. It works on one process, DDP and FSDP2,
    uncompiled where the main run is compiled; DeepSpeed is refused.

    Takes the settings of `RecyclingArguments` whose names begin with `overtrain_`, without that prefix. On a stock
    `Trainer` it works with these limits, which `RecyclingTrainer` does not have: the loss is the one the model returns,
    each process averaging over its own batch; the extra tokens are in `callback.table` and `callback.recorder` only;
    and a resumed run begins the extra batches anew.
    """

    method_class = Overtraining


def _last_loss(recorder: HistoryRecorder) -> float | None:
    """The loss of the last extra batch of the run so far, None if there was none."""
    found = metric_values(recorder.to_table(), "overtraining").get("last_loss")
    return None if found is None or not len(found[1]) else float(found[1][-1])


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a model returns of a batch."""
    device = next(model.parameters()).device
    outputs = model(**{name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()})
    return outputs["loss"] if isinstance(outputs, dict) else outputs[0]


def extra_batches_of(loader) -> Callable[[int, str], ExtraBatches]:
    """Over the data of a stock Trainer's loader."""
    return lambda seed, wanted_by: ExtraBatches(loader.dataset, loader.collate_fn, seed, wanted_by)


def _count_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch, without padding where it says what is padding; a batch without `input_ids` has none."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel() if "input_ids" in batch else 0


def _over_processes(values: list[float], device: torch.device) -> list[float]:
    """Sums over processes."""
    if process_count() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()
