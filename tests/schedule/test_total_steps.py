"""`total_steps` counts updates as the Hugging Face Trainer does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

import fusedlr


class Batches:
    """A loader that only knows its length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(str(tmp_path_factory.mktemp("run")), use_cpu=True, report_to=[])
    return transformers.Trainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=[{"x": 0}] * 10)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("examples", "batch_size", "accumulation", "epochs"),
    [
        (1, 1, 1, 1),
        (10, 3, 2, 1),
        (100, 8, 4, 3),
        (100, 8, 4, 0.1),
        (101, 8, 4, 2.5),
        (1000, 7, 16, 3.0),
        (4, 8, 8, 5),
        (52002, 4, 8, 3),
        (999, 1, 1, 1 / 3),
    ],
)
def test_total_steps_is_what_the_trainer_computes(
    trainer: Any, examples: int, batch_size: int, accumulation: int, epochs: float, world_size: int
) -> None:
    from accelerate.data_loader import BatchSamplerShard

    sampler = BatchSampler(range(examples), batch_size, drop_last=False)
    args = copy.copy(trainer.args)
    args.gradient_accumulation_steps, args.num_train_epochs, args.max_steps = accumulation, epochs, -1
    counted = set()
    for rank in range(world_size):
        shard = BatchSamplerShard(sampler, world_size, rank)
        if examples < 2000:
            assert len(shard) == sum(1 for _ in shard)
        counted.add(trainer.set_initial_training_values(args, Batches(len(shard)))[-1])
    assert counted == {fusedlr.total_steps(examples, batch_size, accumulation, epochs, world_size)}


def test_total_steps_is_what_the_trainer_runs(trainer: Any) -> None:
    # its own loader, and the number of updates its own scheduler is made for
    loader = trainer.get_train_dataloader()
    assert isinstance(loader, DataLoader)
    max_steps = trainer.set_initial_training_values(trainer.args, loader)[-1]
    assert max_steps == fusedlr.total_steps(10, trainer.args.per_device_train_batch_size, epochs=3)
