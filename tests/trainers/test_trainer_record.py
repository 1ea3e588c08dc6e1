"""A record and `ZClip` asked for through `optim_args`: what the Trainer then logs, warns of and writes."""

from __future__ import annotations

import importlib
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("fusedlr.hf")
from small_runs import STEPS, arguments, make, train  # noqa: E402

import fusedlr  # noqa: E402
from fusedlr.recorded import Recording  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick")
NAMES = ("linear.weight", "linear.bias")


def options(folder: Path, optim_args: str) -> dict[str, Any]:
    return hf.FusedLRTrainer.get_optimizer_cls_and_kwargs(arguments(folder, optim_args=optim_args))[1]


@pytest.mark.parametrize(
    ("optim_args", "expected"),
    [
        ("record=64", {"record": fusedlr.Record(last=64)}),
        ("record=true", {"record": fusedlr.Record()}),
        ("record=8, record_tensors=false", {"record": fusedlr.Record(last=8, tensors=False)}),
        ("record=false,zclip=false", {}),
        ("zclip=3", {"max_grad_norm": fusedlr.ZClip(z_thresh=3.0)}),
        (
            "zclip=True, zclip_alpha=0.9, zclip_warmup_steps=5, zclip_max_norm=2, zclip_action=skip",
            {"max_grad_norm": fusedlr.ZClip(0.9, warmup_steps=5, max_norm=2.0, action="skip")},
        ),
        ("master_weights=true,record=4,other=1", {"master_weights": True, "record": fusedlr.Record(4)}),
    ],
)
def test_optim_args_reach_the_optimizer(tmp_path, optim_args, expected):
    found = options(tmp_path, optim_args)
    assert {name: found[name] for name in ("record", "max_grad_norm", "master_weights") if name in found} == (
        expected
    )


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("record=many", "optim_args='record=many': record=many cannot be read as a whole number"),
        ("record=0", r"optim_args='record=0': last=0"),
        ("record_tensors=true", "record_tensors is given without record"),
        ("record=1,record_tensors=2", "record_tensors is neither true nor false"),
        ("zclip=wide", "optim_args='zclip=wide': zclip=wide cannot be read as a number"),
        ("zclip=-1", "optim_args='zclip=-1': z_thresh=-1"),
        ("zclip=2,zclip_alpha=1", "alpha=1.0 must be below 1"),
        ("zclip=2,zclip_action=stop", "action='stop'"),
        ("zclip_alpha=0.5", "zclip_alpha is given without zclip"),
        ("zclip=2,zclip_warmup=5", "zclip_warmup is none of .*zclip_warmup_steps"),
        ("record=1,zclip=2,record=3", "optim_args='record=1,zclip=2,record=3': record is given twice"),
        ("zclip=2, zclip_alpha=0.5, zclip_alpha=0.5", "zclip_alpha is given twice"),
        ("recrd=1,recrd=2", None),
        ("recrd=1", None),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(tmp_path, optim_args, message):
    if message is None:
        # of another optimizer, for all we know
        assert "record" not in options(tmp_path, optim_args)
        return
    with pytest.raises(ValueError, match=message):
        options(tmp_path, optim_args)


def test_the_limit_of_the_arguments_caps_zclip(tmp_path):
    trainer = train(hf.FusedLRTrainer, tmp_path, optim_args="zclip=3", max_grad_norm=0.5)
    assert hf.unwrap(trainer.optimizer).max_grad_norm == fusedlr.ZClip(z_thresh=3.0, max_norm=0.5)


@pytest.mark.parametrize("patched", [False, True])
def test_ratios_are_logged_and_the_recording_is_written(tmp_path, patched):
    seen: list[dict[str, Any]] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    given = {"optim_args": "record=4", "trainer": {"callbacks": [Reporter()]}}
    if patched:
        with hf.patch_transformers():
            trainer = train(transformers.Trainer, tmp_path, **given)
    else:
        trainer = train(hf.FusedLRTrainer, tmp_path, **given)
    recording = Recording.load(tmp_path / "record.npz")
    assert recording["names"] == NAMES and recording["step"].tolist() == [2, 3, 4, 5]
    of_losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    for kind, column in (("matrices", 0), ("vectors", 1)):
        logged = [entry[f"update_ratio/{kind}"] for entry in of_losses]
        assert logged[2:] == pytest.approx(recording["tensor_update_ratio"][:, column].tolist(), rel=1e-6)
        # reporters behind the callback see the same
        assert logged == [entry[f"update_ratio/{kind}"] for entry in seen if "loss" in entry]
    assert [entry["grad_norm"] for entry in of_losses][2:] == pytest.approx(
        recording["grad_norm"].tolist(), rel=1e-5
    )
    # plain numbers, which go into the Trainer's own file
    json.dumps(of_losses, allow_nan=False)


def test_it_is_logged_at_logging_steps_alone(tmp_path, monkeypatch):
    asked = []
    stock = fusedlr.FusedAdamW.last_update_ratios
    monkeypatch.setattr(fusedlr.FusedAdamW, "last_update_ratios", lambda self: asked.append(1) or stock(self))

    def record(self: Any) -> Any:
        raise AssertionError("it copies the whole ring")

    monkeypatch.setattr(fusedlr.FusedAdamW, "record", record)
    monkeypatch.setattr(hf, "write_recording", lambda *args, **kwargs: None)
    trainer = train(hf.FusedLRTrainer, tmp_path, optim_args="record=4", logging_steps=3)
    assert len(asked) == STEPS / 3
    assert [entry["step"] for entry in trainer.state.log_history if "update_ratio/matrices" in entry] == [
        3,
        6,
    ]


def test_without_a_record_nothing_is_written_and_logs_are_as_before(tmp_path):
    trainer = train(hf.FusedLRTrainer, tmp_path)
    assert not (tmp_path / "record.npz").exists()
    names = set().union(*(entry for entry in trainer.state.log_history if "loss" in entry))
    assert names == {"loss", "grad_norm", "learning_rate", "epoch", "step"}


def test_tensorboard_gets_them_through_the_trainers_own_logger(tmp_path, monkeypatch):
    scalars: dict[str, list[tuple[int, float]]] = {}

    class Writer:
        """The face of a SummaryWriter, so that tensorboard need not be there."""

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.setdefault(name, []).append((step, value))

        def add_text(self, *args: Any) -> None: ...

        flush = close = add_text

    utils = importlib.import_module("transformers.integrations.integration_utils")
    monkeypatch.setattr(utils, "is_tensorboard_available", lambda: True)
    tensorboard = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    callback = utils.TensorBoardCallback(tb_writer=Writer())
    train(hf.FusedLRTrainer, tmp_path, optim_args="record=true", trainer={"callbacks": [callback]})
    recorded = Recording.load(tmp_path / "record.npz")["tensor_update_ratio"][:, 1].tolist()
    steps, values = zip(*scalars["train/update_ratio/vectors"], strict=True)
    assert list(steps) == list(range(1, STEPS + 1)) and values == pytest.approx(recorded, rel=1e-6)
    assert "train/update_ratio/matrices" in scalars and "train/grad_norm" in scalars


def test_the_tensor_of_a_skipped_step_is_named_once(tmp_path):
    class Spoil(transformers.TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            if state.global_step in (2, 3):
                model.linear.bias.grad.fill_(torch.nan)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make(hf.FusedLRTrainer, tmp_path, optim_args="record=8", trainer={"callbacks": [Spoil()]})
        trainer.train()
    said = [str(w.message) for w in caught if "was skipped" in str(w.message)]
    assert said == ["step 2 was skipped: the gradient of linear.bias was inf or nan"]
    assert Recording.load(tmp_path / "record.npz")["skipped"].tolist() == [
        step in (2, 3) for step in range(STEPS)
    ]
    ratios = [entry.get("update_ratio/vectors") for entry in trainer.state.log_history if "loss" in entry]
    assert ratios[2] == ratios[3] == 0 != ratios[4]
    assert np.isfinite(ratios).all()


def test_a_recording_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "record.npz").mkdir()
    with pytest.warns(UserWarning, match="the recording of this run could not be written to"):
        trainer = train(hf.FusedLRTrainer, tmp_path, optim_args="record=4")
    assert trainer.state.global_step == STEPS


def test_a_resumed_run_writes_what_both_parts_did(tmp_path):
    given = {"optim_args": "record=8", "save_strategy": "steps", "save_steps": 3}
    train(hf.FusedLRTrainer, tmp_path / "whole", **given)
    resumed = make(hf.FusedLRTrainer, tmp_path / "resumed", **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    whole, again = (Recording.load(tmp_path / name / "record.npz") for name in ("whole", "resumed"))
    for name, values in whole.items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(again[name], values, err_msg=name)
