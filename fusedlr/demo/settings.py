"""What decides a run of the demo: the named sizes, and the settings that every other part reads.

`options.resolve` makes them from the command line.
"""

from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Size:
    """A model, its data and its training, as one named choice."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    sequence: int  # tokens per example
    batch: int  # examples per micro-batch
    corpus: int  # bytes of the standard library to read, 0 for all of it
    evaluation: int  # held-out examples per measurement
    base_steps: int
    base_lr: float
    steps: int  # LoRA updates
    lr: float


# quick and small take 35 s and 2.5 minutes on two cores of a Xeon (2026-11); large is for a GPU, unmeasured
SIZES = {
    "quick": Size(96, 2, 4, 256, 1024, 128, 4, 1_500_000, 64, 250, 6e-3, 25, 1e-2),
    "small": Size(128, 4, 4, 384, 1024, 128, 8, 6_000_000, 128, 350, 4e-3, 40, 5e-3),
    "large": Size(512, 12, 8, 1408, 4096, 256, 32, 0, 256, 1500, 1e-3, 200, 2e-3),
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run of the demo, checked and with no default left open."""

    size_name: str
    size: Size
    steps: int
    base_steps: int
    schedule: str
    lr: float
    warmup: int
    accumulation: int
    device: str
    seed: int
    teeth: bool
    panel: bool
    fresh: bool
    output: Path
    cache: Path

    def schedule_arguments(self) -> dict:
        """The arguments, in transformers' names, without which the chosen schedule is not defined."""
        if self.schedule in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
            return {"min_lr_rate": 0.1}
        if self.schedule == "cosine_with_restarts":
            return {"num_cycles": 2}
        if self.schedule == "warmup_stable_decay":
            return {"num_decay_steps": (self.steps - self.warmup) // 3}
        return {}

    def own_schedule(self):
        """The schedule as fusedlr's optimizer takes it."""
        import fusedlr

        return fusedlr.from_hf(
            self.schedule,
            num_warmup_steps=self.warmup,
            num_training_steps=self.steps,
            lr=self.lr,
            **self.schedule_arguments(),
        )

    def as_dict(self) -> dict:
        """Plain values for report.json; where files lie is nobody else's business."""
        values = asdict(self)
        for name in ("output", "cache", "fresh"):
            del values[name]
        return values | {"schedule_arguments": self.schedule_arguments()}
