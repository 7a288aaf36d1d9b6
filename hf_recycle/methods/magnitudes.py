"""The method `Magnitudes`: records magnitudes every so many steps; and its public callback."""

from hf_recycle.methods.base import Histograms, Method, Run, StepInfo
from hf_recycle.methods.coordinator import NeuronCallback
from hf_recycle.methods.schedule import resolved
from hf_recycle.methods.settings import MagnitudeSettings


class Magnitudes(Method[MagnitudeSettings]):
    """Records magnitude histograms."""

    settings_class = MagnitudeSettings
    changes_weights = False
    _histograms: Histograms = {}  # noqa: RUF012  # of a run that has not begun: there are none

    def start(self, run: Run, settings: MagnitudeSettings) -> None:
        super().start(run, settings)
        self._every = resolved(settings.steps)
        self._histograms = {}
        if run.step == 0:
            self._record(0)

    def acting_steps(self, max_steps: int) -> list[int]:
        return sorted({*range(0, max_steps, resolved(self.settings.steps)), max_steps})

    def after_step(self, info: StepInfo) -> None:
        if info.step % self._every == 0 or info.step == info.max_steps:
            self._record(info.step)

    def _record(self, step: int) -> None:
        for name, magnitudes in self.table.magnitudes().items():
            self.run.recorder.magnitudes(step, name, magnitudes)
            self._histograms[f"magnitudes/{name}"] = step, magnitudes

    def take_histograms(self) -> Histograms:
        """The magnitudes of each block that were recorded last."""
        taken, self._histograms = self._histograms, {}
        return taken


class MagnitudeCallback(NeuronCallback):
    """Records a histogram of neuron magnitudes per block every `steps` optimizer steps, before the first step and
    after the last (*Neuron Recycling*, section "Understanding neuron magnitudes").

    On a stock `Trainer` the histograms are in `callback.recorder`; only a `RecyclingTrainer` saves them.
    """

    method_class = Magnitudes
