"""One LoRA fine-tuning run through PEFT and the Hugging Face Trainer, and what is measured while it runs.

Every run has the same base, seed, data order and dropout; runs differ in their optimizer alone.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedlr.demo.base import Base, build_model, held_out_loss
from fusedlr.demo.measure import Meter, recorder, show_progress
from fusedlr.demo.progress import bar
from fusedlr.demo.settings import Settings
from fusedlr.demo.tokens import Data

MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.01
# steps; a run of the demo has a tenth of that at most unless its options ask for more
MOST_RECORDED = 10_000


@dataclass(frozen=True)
class Run:
    """Which optimizer a run uses: fusedlr, or torch's AdamW by the name of one of its kernels."""

    name: str
    kernel: str | None = None  # None is fusedlr
    extra_warmup: int = 0  # updates


FUSEDLR = Run("fusedlr")
STOCK = Run("stock", "fused")
FOREACH = Run("stock, foreach", "foreach")
OFF_BY_ONE = Run("stock, warm-up + 1", "fused", extra_warmup=1)


@dataclass
class Result:
    """What came out of a run; lists have one entry per update."""

    run: Run
    backend: str
    seconds: float
    losses: list[float]  # training loss, nats per token
    lrs: list[float]
    grad_norms: list[float]  # before clipping, as the Trainer logs them: every tenth
    phase_ms: list[float]  # clipping, step and scheduler
    step_ms: list[float]  # the whole update: forward, backward and the phase above
    code: float  # held-out loss afterwards
    prose: float
    weights: dict
    recording: Any = None  # what fusedlr's steps used and did; stock's record nothing


def finetune(run: Run, settings: Settings, data: Data, base: Base, folder: Path, save: bool) -> Result:
    """Fine-tune `base` on the code; checkpoints go into `folder` if `save`."""
    import torch
    from transformers import PrinterCallback, default_data_collator, set_seed

    model = _lora_model(settings, base)
    meter = Meter(settings.device)
    trainer = _trainer_class(meter)(
        model=model,
        args=_training_arguments(run, settings, folder, save),
        train_dataset=_examples(data.blocks["code_train"]),
        data_collator=default_data_collator,
        **_optimizer(run, model, settings),
    )
    trainer.add_callback(recorder(meter, trainer.accelerator))
    # the Trainer's own bars are off, and this would print a dict per logging step in their place
    trainer.remove_callback(PrinterCallback)
    # again, after everything that may have drawn: dropout and data order agree between runs
    set_seed(settings.seed)
    began = time.perf_counter()
    with bar(label=f"LoRA, {run.name}", total=settings.steps) as progress:
        trainer.add_callback(show_progress(progress))
        trainer.train()
    optimizer = unwrap(trainer.optimizer)
    return Result(
        run=run,
        backend=_backend(optimizer),
        seconds=time.perf_counter() - began,
        losses=torch.stack(meter.losses).tolist(),
        lrs=meter.lrs,
        grad_norms=[float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry],
        phase_ms=meter.phase_ms,
        step_ms=meter.step_ms,
        code=held_out_loss(model, data.blocks["code_held_out"], settings, "held-out code"),
        prose=held_out_loss(model, data.blocks["prose_held_out"], settings, "held-out prose"),
        weights={name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad},
        recording=optimizer.record() if run.kernel is None else None,
    )


def unwrap(optimizer):
    """The optimizer inside accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def _lora_model(settings, base):
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    model = build_model(settings)
    model.load_state_dict(base.weights)
    set_seed(settings.seed)
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _optimizer(run, model, settings):
    """The Trainer's argument that decides the optimizer; the Trainer's own default is the fused kernel."""
    import torch

    import fusedlr

    if run.kernel == "fused":
        return {}
    if run.kernel == "foreach":
        # optim="adamw_torch" would leave the choice to torch, which is a loop over the tensors on a CPU
        return {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": settings.lr, "foreach": True})}
    optimizer = fusedlr.FusedAdamW(
        ((name, p) for name, p in model.named_parameters() if p.requires_grad),
        lr=settings.lr,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        schedule=settings.own_schedule(),
        record=fusedlr.Record(last=min(settings.steps, MOST_RECORDED)),
    )
    return {"optimizers": (optimizer, optimizer.scheduler)}


def _backend(optimizer):
    """What does the arithmetic: fusedlr's backend, or torch's kernel."""
    kernels = [name for name in ("fused", "foreach") if optimizer.defaults.get(name)]
    return str(getattr(optimizer, "backend", None) or " ".join(["torch", *kernels]))


def _training_arguments(run, settings, folder, save):
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.size.batch,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=settings.steps,
        learning_rate=settings.lr,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type=settings.schedule,
        lr_scheduler_kwargs=settings.schedule_arguments(),
        warmup_steps=settings.warmup + run.extra_warmup,
        # 0 because fusedlr clips inside its step
        max_grad_norm=MAX_GRAD_NORM if run.kernel else 0.0,
        optim="adamw_torch_fused",
        logging_steps=10,
        save_strategy="steps" if save else "no",
        save_steps=max(1, settings.steps // 2),
        save_total_limit=1,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=settings.device == "cuda" and _bf16_works(),
        use_cpu=settings.device == "cpu",
        dataloader_pin_memory=settings.device == "cuda",
        # the last, shorter batch of an epoch would make some updates see fewer examples
        dataloader_drop_last=True,
        report_to="none",
        disable_tqdm=True,
    )
    # one GPU is enough, and nn.DataParallel over several would multiply the batch
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _bf16_works():
    import torch

    return torch.cuda.is_bf16_supported()


def _examples(rows):
    """A dataset of the rows, each an example whose labels are its own tokens."""
    from torch.utils.data import Dataset

    from fusedlr.demo.base import to_tokens

    class Examples(Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            tokens = to_tokens(rows[index], "cpu")
            return {"input_ids": tokens, "labels": tokens}

    return Examples()


def _trainer_class(meter):
    """A Trainer that shows every loss to `meter` and leaves fusedlr's gradient norm to fusedlr."""
    from transformers import Trainer

    class DemoTrainer(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            meter.add_loss(loss)
            return loss

        def _get_grad_norm(self, model, grad_norm=None):
            # max_grad_norm=0 would make the Trainer compute the norm that the optimizer computes as well
            if hasattr(unwrap(self.optimizer), "metrics"):
                return None
            return super()._get_grad_norm(model, grad_norm=grad_norm)

        def log(self, logs, *args, **kwargs):
            # called after the step, so this is the norm of the update that the other values belong to
            optimizer = unwrap(self.optimizer)
            if "loss" in logs and hasattr(optimizer, "metrics"):
                logs["grad_norm"] = optimizer.metrics()["grad_norm"].item()
            super().log(logs, *args, **kwargs)

    return DemoTrainer
