"""When to record magnitudes."""

from hf_recycle.callbacks.base import NeuronCallback
from hf_recycle.methods.schedule import resolve_steps
from hf_recycle.settings import MagnitudeSettings


class MagnitudeCallback(NeuronCallback):
    """Records a histogram of neuron magnitudes per block every `steps` optimizer steps, before the first step and
    after the last (*Neuron Recycling*, section "Understanding neuron magnitudes").

    On a stock `Trainer` the histograms are in `callback.recorder`; only a `RecyclingTrainer` saves them.
    """

    settings_class = MagnitudeSettings
    settings: MagnitudeSettings

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.attach(model, state)
        self._every = resolve_steps(self.settings.steps, state.max_steps)
        if state.global_step == 0:
            self._record(0)

    def on_step_end(self, args, state, control, **kwargs):
        if self._every and (state.global_step % self._every == 0 or state.global_step == state.max_steps):
            self._record(state.global_step)

    def _record(self, step: int) -> None:
        if self.settings.enabled:
            for name, magnitudes in self.table.magnitudes().items():
                self.recorder.magnitudes(step, name, magnitudes)
