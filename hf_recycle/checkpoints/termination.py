"""SIGTERM under `enable_jit_checkpoint`: an ordinary checkpoint at the end of the step in which it came."""

from transformers import Trainer
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class SaveAfterStep(JITCheckpointCallback):
    """Asks for a checkpoint, which the Trainer saves once all callbacks have acted and the step is logged.

    The callback of transformers saves by itself and at once: a run that resumes in the middle of a step draws other
    random numbers in it, and counts its loss twice.
    """

    def on_step_begin(self, args, state, control, **kwargs):
        pass

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        pass

    def on_step_end(self, args, state, control, **kwargs):
        if self.jit_manager is not None and self.jit_manager.is_checkpoint_requested:
            self.jit_manager.is_checkpoint_requested = False
            control.should_save = control.should_training_stop = True

    on_epoch_end = on_step_end


def save_after_step(trainer: Trainer) -> None:
    """Puts `SaveAfterStep` in the place of the callback of transformers, if there is one."""
    theirs = trainer.pop_callback(JITCheckpointCallback)
    if theirs is not None:
        ours = SaveAfterStep()
        vars(ours).update(vars(theirs))
        trainer.add_callback(ours)
