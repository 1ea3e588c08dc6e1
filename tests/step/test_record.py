"""`record=fusedlr.Record()`: what steps write down, against plain torch, on every backend that runs here."""

import copy
import math
import pickle
import threading
from collections import defaultdict

import numpy as np
import pytest
import torch
from kit import make, make_params, quiet, scheduled, set_grads, spoil, step, steps, through_a_file
from snapshots import params_of
from torch import nn

from fusedlr import Record, ZClip, reference

SHAPES = ((40, 30), (7,), (), (5, 3))


def named(dtypes=(torch.float32,), shapes=SHAPES, device="cpu"):
    """Parameters with names."""
    return [(f"p{i}", p) for i, p in enumerate(make_params(dtypes, shapes, device))]


def watched_step(optimizer, expected, scale=1.0):
    """Make a step, and note under the recording's keys what plain torch says of it."""
    before = [p.detach().double().clone() for p in params_of(optimizer)]
    skipped = int(np.sum(optimizer.last_metrics()["skipped"]))
    optimizer.step()
    after = optimizer.last_metrics()
    expected["skipped"].append(int(np.sum(after["skipped"])) > skipped)
    for name in ("lr", "grad_norm", "coef", "limit"):
        expected[name].append(after[name])
    norms, ratios = [], []
    for p, old in zip(params_of(optimizer), before, strict=True):
        missing = p.grad is None
        norms.append(math.nan if missing else float((p.grad.double() / scale).norm()))
        change = float((p.detach().double() - old).norm())
        ratios.append(math.nan if missing else 0.0 if change == 0 else change / float(old.norm()))
    expected["tensor_grad_norm"].append(norms)
    expected["tensor_update_ratio"].append(ratios)


def assert_recorded(recording, expected, rtol=1e-5):
    """The latest steps are as expected."""
    count = len(recording["step"])
    for name, values in expected.items():
        theirs = np.array(values, dtype=float)[-count:]
        np.testing.assert_allclose(recording[name].astype(float), theirs, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_every_step_is_recorded_as_plain_torch_has_it(device, backend, dtype, limit):
    optimizer = scheduled(
        named((dtype,), device=device),
        max_grad_norm=limit,
        nonfinite="skip",
        record=Record(last=16),
        backend=backend,
    )
    expected = defaultdict(list)
    for k in range(9):
        set_grads(optimizer, k, missing=lambda k, i: k in (2, 3) and i == 1)
        if k == 5:
            spoil(optimizer)
        watched_step(optimizer, expected)
    recording = optimizer.record()
    assert recording["names"] == ("p0", "p1", "p2", "p3")
    assert recording["step"].tolist() == list(range(9))
    assert recording["k"][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 7]
    assert_recorded(recording, expected)
    np.testing.assert_allclose(recording["lr"], recording.planned(), rtol=1e-6)


def test_large_tensors_are_recorded_whole(device, backend):
    shapes = ((300, 700), (8192,), (8193,), (1024,), (1025,))
    optimizer = scheduled(named(shapes=shapes, device=device), record=Record(last=2), backend=backend)
    expected = defaultdict(list)
    for k in range(3):
        set_grads(optimizer, k)
        watched_step(optimizer, expected)
    assert_recorded(optimizer.record(), expected)


def test_the_ring_keeps_the_last_steps(device, backend):
    optimizer = scheduled(named(device=device), record=Record(last=3), backend=backend)
    assert optimizer.record()["step"].tolist() == []
    steps(optimizer, 0, 2)
    assert optimizer.record()["step"].tolist() == [0, 1]
    steps(optimizer, 2, 8)
    recording = optimizer.record()
    assert recording["step"].tolist() == [5, 6, 7]
    assert recording["k"][:, 0].tolist() == [5, 6, 7]


def test_scaled_gradients_are_recorded_unscaled(device, backend):
    optimizer = scheduled(named(device=device), max_grad_norm=1.0, record=Record(), backend=backend)
    twin = scheduled(named(device=device), max_grad_norm=1.0, record=Record(), backend=backend)
    for k in range(3):
        step(twin, k)
        set_grads(optimizer, k, scale=1024.0)
        optimizer.grad_scale, optimizer.found_inf = (
            torch.tensor(1024.0, device=device),
            torch.tensor(0.0, device=device),
        )
        optimizer.step()
        optimizer.grad_scale = optimizer.found_inf = None
    for name, theirs in twin.record().items():
        if isinstance(theirs, np.ndarray):
            np.testing.assert_allclose(optimizer.record()[name], theirs, rtol=1e-6, err_msg=name)


def test_without_tensors_only_what_steps_used_is_kept(device, backend):
    optimizer = scheduled(named(device=device), record=Record(tensors=False), backend=backend)
    steps(optimizer, 0, 3)
    recording = optimizer.record()
    assert recording["names"] == () and recording["tensor_grad_norm"].shape == (3, 0)
    assert recording["lr"].shape == (3, 1)


def test_with_master_weights_the_change_is_that_of_the_full_value(device, backend):
    # too small a change for bf16 to show
    options = {"lr": 1e-5, "weight_decay": 0.0, "record": Record(), "backend": backend}
    optimizer = make(named((torch.bfloat16,), device=device), master_weights=True, **options)
    fp32 = make(
        [(name, nn.Parameter(p.detach().float())) for name, p in named((torch.bfloat16,), device=device)],
        **options,
    )
    for k in range(3):
        set_grads(optimizer, k)
        for p, q in zip(params_of(optimizer), params_of(fp32), strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        fp32.step()
    ratios = optimizer.record()["tensor_update_ratio"]
    np.testing.assert_allclose(ratios, fp32.record()["tensor_update_ratio"], rtol=1e-6)
    assert (ratios > 0).all()


def test_scopes_are_recorded_apart(device, backend):
    params = make_params((torch.float32,), SHAPES, device)
    groups = [
        {"params": [("w", params[0])], "scope": "first", "max_grad_norm": 0.5},
        {"params": [("w", params[1])], "scope": "second"},
        {"params": [("v", params[2])]},
    ]
    optimizer = scheduled(groups, record=Record(), backend=backend)
    for k, only in enumerate((None, ["first"], ["second"])):
        set_grads(optimizer, k)
        optimizer.step(only=only)
    recording = optimizer.record()
    assert recording["names"] == ("w (group 0)", "w (group 1)", "v")
    assert recording["scopes"] == ("first", "second", None)
    took_part = [[True, True, True], [True, False, False], [False, True, False]]
    assert (~np.isnan(recording["lr"])).tolist() == took_part
    assert (~np.isnan(recording["tensor_grad_norm"])).tolist() == took_part
    assert recording["k"].tolist() == [[0, 0, 0], [1, -1, -1], [-1, 1, -1]]
    assert (recording["grad_norm"][:2, 0] > 0.5).all() and (recording["coef"][:2, 0] < 1).all()
    assert np.isnan(recording.planned()[1, 1])


@pytest.mark.parametrize("reaches", ["a file", "a copy", "a pickle"])
def test_a_recording_goes_on(device, backend, reaches):
    whole = scheduled(named(device=device), max_grad_norm=1.0, record=Record(last=4), backend=backend)
    steps(whole, 0, 6)
    part = scheduled(named(device=device), max_grad_norm=1.0, record=Record(last=4), backend=backend)
    steps(part, 0, 3)
    if reaches == "a file":
        state = through_a_file(part.state_dict())
        again = scheduled(
            [
                (name, nn.Parameter(p.detach().clone()))
                for (name, _), p in zip(named(device=device), params_of(part), strict=True)
            ],
            max_grad_norm=1.0,
            record=Record(last=4),
            backend=backend,
        )
        again.load_state_dict(state)
    else:
        again = copy.deepcopy(part) if reaches == "a copy" else pickle.loads(pickle.dumps(part))
    steps(again, 3, 6)
    for name, theirs in whole.record().items():
        if isinstance(theirs, np.ndarray):
            np.testing.assert_array_equal(again.record()[name], theirs, err_msg=name)


def test_a_file_is_read_into_rings_of_other_lengths_and_into_none():
    optimizer = scheduled(named(), record=Record(last=8))
    steps(optimizer, 0, 5)
    state = through_a_file(optimizer.state_dict())
    short, none = scheduled(named(), record=Record(last=2)), scheduled(named())
    for other in (short, none):
        other.load_state_dict(state)
    assert short.record()["step"].tolist() == [3, 4]
    step(short, 5)
    assert short.record()["step"].tolist() == [4, 5]
    # a file without a recording begins one, at the number of the step
    short.load_state_dict(through_a_file(none.state_dict()))
    step(short, 5)
    assert short.record()["step"].tolist() == [5]


def test_groups_and_parameters_that_come_later_are_recorded_from_then_on(device, backend):
    optimizer = scheduled(named(device=device), record=Record(), backend=backend)
    steps(optimizer, 0, 2)
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("late", late)]})
    steps(optimizer, 2, 4)
    recording = optimizer.record()
    assert recording["names"][-1] == "late"
    assert np.isnan(recording["tensor_grad_norm"][:2, -1]).all()
    assert not np.isnan(recording["tensor_grad_norm"][2:]).any()
    assert recording["k"].tolist() == [[0, -1], [1, -1], [2, 0], [3, 1]]


def test_what_is_no_record_is_refused():
    with pytest.raises(TypeError, match=r"record=3 is not a fusedlr\.Record"):
        make(record=3)
    with pytest.raises(ValueError, match="last=0"):
        Record(last=0)
    with pytest.raises(ValueError, match="last=1048577 must be at most 1048576"):
        Record(last=2**20 + 1)
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        make().record()


@pytest.mark.parametrize("record", [None, Record()])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_first_tensor_that_is_not_finite_is_named(device, backend, record, value, dtype):
    shapes = [(3,), (9000,), (17, 5), (1,)]
    optimizer = make(named((dtype,), shapes, device), max_grad_norm=1.0, backend=backend, record=record)
    found = optimizer.last_metrics()
    assert found["nonfinite_tensor"] is None and found["nonfinite_step"] is None
    for k, (index, element) in enumerate([(1, 8999), (3, 0), (2, 40), (0, 1)]):
        set_grads(optimizer, 2 * k)
        params_of(optimizer)[index].grad.view(-1)[element] = value
        # a later one is not the first
        params_of(optimizer)[3].grad.fill_(value)
        optimizer.step()
        step(optimizer, 2 * k + 1)
        found = optimizer.last_metrics()
        assert found["nonfinite_tensor"] == f"p{index}" and found["nonfinite_step"] == 2 * k


def test_a_scaler_without_clipping_names_it_too(device, backend):
    optimizer = make(named(device=device), backend=backend)
    set_grads(optimizer)
    spoil(optimizer, index=2)
    optimizer.grad_scale, optimizer.found_inf = (
        torch.tensor(2.0, device=device),
        torch.tensor(1.0, device=device),
    )
    optimizer.step()
    assert optimizer.last_metrics()["nonfinite_tensor"] == "p2"


def test_a_norm_that_overflows_names_no_tensor(device, backend):
    optimizer = make(named(device=device), max_grad_norm=1.0, backend=backend)
    set_grads(optimizer)
    params_of(optimizer)[0].grad.fill_(1e30)
    optimizer.step()
    assert optimizer.last_metrics()["skipped"] == 1
    assert optimizer.last_metrics()["nonfinite_tensor"] is None


def test_scopes_name_their_own_tensors(device, backend):
    params = make_params((torch.float32,), SHAPES, device)
    groups = [
        {"params": params[:2], "scope": "first"},
        {"params": params[2:3], "scope": "second"},
        {"params": params[3:], "scope": "first"},
    ]
    optimizer = make(groups, max_grad_norm=1.0, backend=backend)
    for k, index in enumerate((3, 2)):
        set_grads(optimizer, k)
        spoil(optimizer, index=index)
        optimizer.step()
    found = optimizer.last_metrics()
    assert found["scopes"] == ("first", "second")
    assert found["nonfinite_tensor"] == ["parameter 0 of group 2", "parameter 0 of group 1"]
    assert found["nonfinite_step"] == [0, 1]


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_norm_that_was_measured_before_the_step_leaves_nothing_out(device, backend, contiguous):
    optimizer = make(named(device=device), max_grad_norm=1.0, record=Record(), backend=backend)
    p = params_of(optimizer)[0]
    for k in range(3):
        set_grads(optimizer, k)
        if not contiguous:
            p.grad = p.grad.t().contiguous().t()
        optimizer.grad_norm()
        optimizer.step()
        expected = [q.grad.norm().item() for q in params_of(optimizer)]
        np.testing.assert_allclose(optimizer.record()["tensor_grad_norm"][-1], expected, rtol=1e-5)


def test_clipping_that_comes_between_norm_and_step_leaves_nothing_out(device, backend):
    optimizer = make(named(device=device), record=Record(), backend=backend)
    step(optimizer)
    optimizer.grad_norm()
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    first, second = optimizer.record()["tensor_grad_norm"]
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_a_step_skipped_for_a_spike_names_what_was_not_finite_besides(device, backend):
    limit = ZClip(warmup_steps=2, action="skip")
    options = {"max_grad_norm": limit, "nonfinite": "propagate", "backend": backend}
    optimizer = make(named(device=device), **options)
    steps(optimizer, 0, 3)
    set_grads(optimizer, 3)
    spoil(optimizer, index=1)
    optimizer.step()
    found = optimizer.last_metrics()
    assert (found["skipped"], found["nonfinite_tensor"]) == (1, "p1")


def test_names_are_unique_and_can_be_printed():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    params = [(name, p) for layer in layers for name, p in layer.named_parameters()]
    optimizer = make([*params, ("w\n", nn.Parameter(torch.ones(1)))], record=Record())
    step(optimizer)
    names = optimizer.record()["names"]
    assert names[:2] == ("weight (group 0)", "bias (group 0)")
    assert names[2:] == ("weight (group 0, 2)", "bias (group 0, 2)", r"'w\n'")
    scoped = make([{"params": [nn.Parameter(torch.ones(1))], "scope": "a\x1b"}], record=Record())
    step(scoped)
    assert scoped.record()["scopes"] == (r"'a\x1b'",)
    scoped.remove_scope("a\x1b")
    with pytest.raises(RuntimeError, match="without groups"):
        scoped.record()


def test_groups_of_a_scope_number_their_steps_alike(device, backend):
    optimizer = make(named(device=device), max_grad_norm=1.0, backend=backend)

    def spoiled(k, index):
        set_grads(optimizer, k)
        spoil(optimizer, index=index)
        optimizer.step()
        found = optimizer.last_metrics()
        return found["nonfinite_tensor"], found["nonfinite_step"]

    steps(optimizer, 0, 4)
    assert spoiled(4, 1) == ("p1", 4)
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2, device=device)))]})
    assert spoiled(5, 4) == ("late", 5)
    state = through_a_file(optimizer.state_dict())
    assert spoiled(6, 0) == ("p0", 6)
    # what is loaded knows of none
    optimizer.load_state_dict(state)
    assert optimizer.last_metrics()["nonfinite_tensor"] is None
    assert spoiled(6, 4) == ("late", 6)


def test_a_scope_is_recorded_whichever_of_its_groups_is_the_first():
    optimizer = make(named(), max_grad_norm=1.0, record=Record())
    steps(optimizer, 0, 3)
    before = optimizer.record()["grad_norm"]
    options = {key: value for key, value in optimizer.param_groups[0].items() if "param" not in key}
    late = {**options, "params": [nn.Parameter(torch.ones(2))], "param_names": ["late"]}
    optimizer.param_groups.insert(0, late)
    step(optimizer, 3)
    after = optimizer.record()
    np.testing.assert_array_equal(after["grad_norm"][:3], before)
    assert not np.isnan(after["grad_norm"]).any() and after["k"][:, 0].tolist() == [-1, -1, -1, 0]


def counted(*numbers):
    """What a file of one group has of steps with these numbers."""
    return torch.tensor([[number, 0] for number in numbers])


USED = torch.zeros((5, 5, 1), dtype=torch.float64)
with quiet():
    # torch calls them a prototype
    NESTED = torch.nested.nested_tensor([*USED])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (5, "record=5 of the loaded state dict is not a dict"),
        ({"steps": 2**52}, "steps of the loaded record=4503599627370496"),
        ({"steps": -1}, "steps of the loaded record=-1"),
        ({"process": "here"}, "process='here' of"),
        ({"process": 5}, "process=5 of"),
        ({"process": [0, "a"]}, r"process=\[0, 'a'\] of"),
        ({"params": None}, "params=None of"),
        ({"params": [0, 0, 1, 2]}, r"params=\[0, 0, 1, 2\] of .* name no parameters"),
        ({"params": [0, 1, 2, 4]}, "name no parameters"),
        ({"params": [0, 1, 2, -1]}, "name no parameters"),
        ({"params": [0, 1, 2, 3.0]}, "name no parameters"),
        ({"ints": None}, "ints of the loaded record is no torch.int64 tensor"),
        ({"ints": torch.tensor(0)}, "ints of the loaded record is no torch.int64 tensor"),
        ({"ints": counted(0, 1, 2, 3, 4).to("meta")}, "ints of the loaded record is no torch.int64 tensor"),
        ({"ints": counted(0, 1, 2, 3, 4).double()}, "ints of the loaded record is no torch.int64 tensor"),
        ({"ints": counted(0).expand(2**42, 2)}, "ints of the loaded record has 4398046511104 rows"),
        ({"ints": counted(0, 2**63 - 1, -(2**63), -1, 4)}, "do not count up to steps=5"),
        ({"ints": counted(-1, 0, 1, 2, 3)}, "do not count up to steps=5"),
        ({"ints": counted(0, 1, 2, 3, 5)}, "do not count up to steps=5"),
        ({"used": None}, r"used of the loaded record is no torch.float64 tensor of shape \(5, 5, 1\)"),
        ({"used": USED[:4]}, "used of the loaded record is no"),
        ({"used": USED.float()}, "used of the loaded record is no"),
        ({"used": USED.to_sparse()}, "used of the loaded record is no"),
        ({"used": NESTED}, "used of the loaded record is no"),
    ],
)
def test_a_file_that_is_damaged_is_refused(change, message):
    optimizer = make(named(), record=Record())
    steps(optimizer, 0, 5)
    state = optimizer.state_dict()
    if isinstance(change, dict):
        state["fusedlr"]["record"].update(change)
    else:
        state["fusedlr"]["record"] = change
    before = optimizer.record()["step"].tolist()
    with quiet(), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.record()["step"].tolist() == before


def test_a_file_loads_where_no_tensors_are_recorded():
    optimizer, other = make(named(), record=Record()), make(named(), record=Record(tensors=False))
    steps(optimizer, 0, 5)
    other.load_state_dict(optimizer.state_dict())
    np.testing.assert_array_equal(other.record()["lr"], optimizer.record()["lr"])
    assert other.record()["names"] == ()


def test_a_file_has_nothing_of_tensors_that_have_been_taken_out():
    params = named()
    optimizer = make([{"params": params[:1]}, {"params": params[1:]}], record=Record())
    step(optimizer)
    expected = optimizer.record()["tensor_grad_norm"][:, 1:]
    del optimizer.param_groups[0], optimizer.state[params[0][1]]
    state = optimizer.state_dict()
    assert state["fusedlr"]["record"]["params"] == [0, 1, 2]
    again = make(named()[1:], record=Record())
    again.load_state_dict(state)
    np.testing.assert_array_equal(again.record()["tensor_grad_norm"], expected)


def test_a_file_is_whole_while_another_thread_makes_steps():
    optimizer = make(named(), max_grad_norm=1.0, record=Record(last=4))
    set_grads(optimizer)
    optimizer.step()
    other = make(named(), record=Record(last=4))
    stop = threading.Event()

    def train():
        while not stop.is_set():
            optimizer.step()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(100):
            other.load_state_dict(optimizer.state_dict())
            assert np.diff(other.record()["step"]).tolist() in ([], [1], [1, 1], [1, 1, 1])
    finally:
        stop.set()
        thread.join()


def test_the_warning_of_many_skips_names_the_tensor():
    optimizer = make(named(), max_grad_norm=1.0)
    with quiet():
        for k in range(9):
            set_grads(optimizer, k)
            spoil(optimizer, index=3)
            optimizer.step()
    set_grads(optimizer, 9)
    spoil(optimizer, index=3)
    with pytest.warns(UserWarning, match="in step 9 the first of them was that of p3"):
        optimizer.step()


def test_recording_changes_no_bit(device, backend):
    shapes = (*SHAPES, (3, 4000))
    twins = [
        scheduled(named(shapes=shapes, device=device), max_grad_norm=1.0, record=record, backend=backend)
        for record in (None, Record())
    ]
    for k in range(5):
        for optimizer in twins:
            step(optimizer, k)
    for p, q in zip(*map(params_of, twins), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("at", (0, 1))
def test_an_interrupted_step_is_recorded_of_the_groups_that_have_made_it(at, monkeypatch):
    params = named(shapes=((4,), (3,)))
    groups = [{"params": params[:1], "scope": "first"}, {"params": params[1:], "scope": "second"}]
    optimizer = make(groups, record=Record(), backend="reference")
    step(optimizer)
    update, updated = reference.adamw_, []

    def interrupted(*given):
        if len(updated) == at:
            raise KeyboardInterrupt
        updated.append(update(*given))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference, "adamw_", interrupted)
        step(optimizer, 1)
    step(optimizer, 2)
    recording = optimizer.record()
    assert recording["step"].tolist() == [0, 1, 2]
    assert recording["k"].tolist() == [[0, 0], [1 if at else -1, -1], [1 + at, 1]]
    assert np.isnan(recording["tensor_update_ratio"][1]).tolist() == [not at, True]
