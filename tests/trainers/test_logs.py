"""What `fusedlr.logs` gives to loggers: the numbers, their names, and the recording at the end of a run."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from kit import make, set_grads, spoil, step, steps
from torch import nn

from fusedlr import Record, Recording
from fusedlr.logs import RECORDING, Nonfinite, scalars, write_recording


def of_scopes(*scopes, **options):
    """An optimizer with a tensor per scope; None is without one."""
    groups = [{"params": [(f"p{i}", nn.Parameter(torch.ones(3)))]} for i in range(len(scopes))]
    for group, scope in zip(groups, scopes, strict=True):
        group.update({} if scope is None else {"scope": scope})
    return make(groups, max_grad_norm=1.0, **options)


def test_a_number_that_there_is_not_is_not_logged():
    optimizer = make([nn.Parameter(torch.ones(3))])
    step(optimizer)
    # no norm was needed
    assert scalars(optimizer) == {}
    optimizer = of_scopes(None)
    set_grads(optimizer, scale=0.0)
    optimizer.step()
    # a norm of 0 is one, and nothing was skipped
    assert scalars(optimizer) == {"grad_norm": 0.0}
    spoil(optimizer)
    optimizer.step()
    assert scalars(optimizer) == {"grad_norm": math.inf, "skipped_steps": 1}


@pytest.mark.parametrize(
    ("scopes", "options", "names"),
    [
        (("a", "b", None), {}, ["a", "b", "unnamed"]),
        (("unnamed", None, "unnamed_"), {}, ["unnamed", "unnamed__", "unnamed_"]),
        ((None, "1", None), {"groups": "independent"}, ["0", "1", "2"]),
        (("1", None), {"groups": "independent"}, ["1", "1_"]),
    ],
)
def test_every_scope_has_a_name_of_its_own(scopes, options, names):
    optimizer = of_scopes(*scopes, **options)
    step(optimizer)
    norms = [p.grad.norm().item() for group in optimizer.param_groups for p in group["params"]]
    found = scalars(optimizer)
    assert found == pytest.approx({f"grad_norm/{name}": x for name, x in zip(names, norms, strict=True)})
    spoil(optimizer, index=1)
    optimizer.step()
    assert scalars(optimizer)[f"skipped_steps/{names[1]}"] == 1
    with pytest.warns(UserWarning, match="step 1 was skipped: the gradient of p1 was"):
        Nonfinite().tell(optimizer)


def test_a_tensor_is_told_of_once():
    optimizer, nonfinite = of_scopes("a", None), Nonfinite()
    steps(optimizer, 0, 1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for k, index in enumerate((0, 0, 1)):
            set_grads(optimizer, k)
            spoil(optimizer, index=index)
            optimizer.step()
            nonfinite.tell(optimizer)
    assert [str(warning.message).split(": ")[1].split()[3] for warning in seen] == ["p0", "p1"]


def test_a_recording_is_written_where_there_is_one_by_whom_it_should_be(tmp_path):
    folder = tmp_path / "not yet" / "there"
    optimizer = of_scopes(None, record=Record())
    write_recording(optimizer, folder)
    step(optimizer)
    write_recording(optimizer, folder, writes=False)
    write_recording(of_scopes(None), folder)
    assert not folder.exists()
    write_recording(optimizer, folder)
    assert Recording.load(folder / RECORDING)["step"].tolist() == [0]
    empty = of_scopes("a", record=Record())
    step(empty)
    empty.remove_scope("a")
    write_recording(empty, tmp_path)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="the recording of this run could not be written to .*file"):
        write_recording(optimizer, tmp_path / "file")
    assert not (tmp_path / RECORDING).exists()
