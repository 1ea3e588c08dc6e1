"""What is measured while a run trains: loss and learning rate of every update, time of its optimizer phase.

The phase is gradient clipping, the optimizer's step and the scheduler's, timed by wrapping those three
calls, in the same way whichever optimizer runs.
"""

import functools
import time
from typing import Any


class Meter:
    """Collects one run's numbers; `finetune` feeds it from the Trainer's hooks."""

    def __init__(self, device: str):
        self.device = device
        self.losses: list[Any] = []  # 0-dim tensors on the device, read only when the run is over
        self.lrs: list[float] = []
        self.phase_ms: list[float] = []
        self.step_ms: list[float] = []
        self._micro: list[Any] = []
        self._phase = 0.0
        self._began = 0.0

    def wrap(self, owner: Any, name: str, last: bool = False) -> None:
        """Count time spent in `owner.name` towards the optimizer phase, which ends with the `last` call."""
        kind = type(owner)
        call = getattr(kind, name)

        @functools.wraps(call)
        def timed(*args, **kwargs):
            if not self._phase:
                # what the backward pass still has queued is not the optimizer's time
                self.synchronize()
            began = time.perf_counter()
            result = call(*args, **kwargs)
            if last:
                self.synchronize()
            self._phase += time.perf_counter() - began
            return result

        # in a subclass: an attribute of a scheduler itself would become part of its state_dict
        owner.__class__ = type(kind.__name__, (kind,), {name: timed})

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def add_loss(self, loss: Any) -> None:
        """Note a micro-batch's share of its update's loss."""
        self._micro.append(loss.detach().clone())

    def begin(self) -> None:
        """An update's first forward pass is about to start."""
        self.synchronize()
        self._began = time.perf_counter()
        self._phase = 0.0

    def end(self) -> None:
        """The update is complete."""
        self.synchronize()
        self.step_ms.append(1e3 * (time.perf_counter() - self._began))
        self.phase_ms.append(1e3 * self._phase)
        self.losses.append(sum(self._micro))
        self._micro = []


def recorder(meter: Meter, accelerator: Any) -> Any:
    """A Trainer callback that feeds `meter`."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
            meter.wrap(accelerator, "clip_grad_norm_")
            meter.wrap(optimizer, "step")
            meter.wrap(lr_scheduler, "step", last=True)

        def on_step_begin(self, args, state, control, **kwargs):
            meter.begin()

        def on_optimizer_step(self, args, state, control, lr_scheduler=None, **kwargs):
            # between the optimizer's step and the scheduler's: the rate this update used
            meter.lrs.append(float(lr_scheduler.get_last_lr()[0]))

        def on_step_end(self, args, state, control, **kwargs):
            meter.end()

    return Recorder()


def show_progress(progress: Any) -> Any:
    """A Trainer callback that moves `progress`, with the Trainer's logged loss and rate beside it."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            progress.update()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                text = f"loss {float(logs['loss']):.3f} lr {float(logs['learning_rate']):.2e}"
                progress.set_postfix_str(text, refresh=False)

    return Progress()
