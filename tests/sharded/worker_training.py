"""For test_training.py: what a run with fully_shard makes and keeps, and what a failed process does."""

from __future__ import annotations

import gc
import pickle
import re
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedlr
from fusedlr.backends import compiled
from sharded.processes import main


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 6) for _ in range(4)]
    return nn.Sequential(*layers)


def backward(module: nn.Module, k: int) -> None:
    torch.manual_seed(100 + k)
    module(torch.randn(8, 6)).square().mean().backward()


def optimizer_of(module: nn.Module, **options: Any) -> fusedlr.FusedAdamW:
    return fusedlr.FusedAdamW(module.parameters(), lr=0.01, max_grad_norm=0.1, **options)


def optimizer_of_params(params: list[Any]) -> fusedlr.FusedAdamW:
    return fusedlr.FusedAdamW(params, lr=0.1, max_grad_norm=1.0)


def equals_one_process() -> None:
    whole, sharded = model(), model()
    for layer in (*sharded, sharded):  # type: ignore[has-type]
        fully_shard(layer)
    alone, ours = optimizer_of(whole), optimizer_of(sharded)
    for k in range(5):
        backward(whole, k), backward(sharded, k)
        norm = ours.grad_norm()
        torch.testing.assert_close(norm, alone.grad_norm())
        alone.step(), ours.step()
        alone.zero_grad(), ours.zero_grad()
        torch.testing.assert_close(ours.metrics()["grad_norm"], norm)
    for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-7)  # type: ignore[attr-defined]
        assert isinstance(ours.state[p]["exp_avg"], DTensor)
        assert not isinstance(ours.state[p]["step"], DTensor)


def a_zclip_sees_the_same_norms_on_every_process() -> None:
    zclip = fusedlr.ZClip(warmup_steps=3, z_thresh=1.0, alpha=0.5)
    whole, sharded = model(), model()
    for layer in (*sharded, sharded):  # type: ignore[has-type]
        fully_shard(layer)
    alone, ours = (fusedlr.FusedAdamW(x.parameters(), lr=0.01, max_grad_norm=zclip) for x in (whole, sharded))
    spikes = 0
    for k in range(8):
        backward(whole, k), backward(sharded, k)
        if k in (4, 6):
            for p in (*whole.parameters(), *sharded.parameters()):
                p.grad.mul_(20)  # type: ignore[union-attr]
        alone.step(), ours.step()
        alone.zero_grad(), ours.zero_grad()
        spikes += int(ours.metrics()["coef"] < 1)
        torch.testing.assert_close(ours.metrics()["limit"], alone.metrics()["limit"], rtol=1e-5, atol=0)
    assert spikes >= 2
    norms = ours._counts.counters.norms
    everywhere = [torch.empty_like(norms) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everywhere, norms.contiguous())
    assert norms[0, 0] == 8 and all(torch.equal(other, norms) for other in everywhere)


def a_step_like_the_last_makes_nothing() -> None:
    sharded = model()
    fully_shard(sharded)
    ours = optimizer_of(sharded)
    backward(sharded, 0)
    ours.step()
    plan, made, new = ours._planner.plan, [], DTensor.__new__
    for k in range(3):
        ours.zero_grad()
        backward(sharded, k)
        DTensor.__new__ = lambda *given, **named: made.append(1) or new(*given, **named)  # type: ignore
        ours.step()
        DTensor.__new__ = new  # type: ignore[method-assign]
    # without the compiled watch every step is prepared anew
    assert compiled.host is None or (ours._planner.plan is plan and made == [])
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(2000):
        ours.step()
    gc.collect()
    assert len(gc.get_objects()) - before < 50
    # a plain optimizer can be pickled: groups of processes are not among what it holds
    assert pickle.loads(pickle.dumps(ours.state_dict()["param_groups"]))


def a_scope_that_is_assigned_is_one_on_every_process() -> None:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)])) for _ in range(2)]
    for p in params:
        p.grad = distribute_tensor(torch.ones(6), mesh, [Shard(0)])
    ours = optimizer_of_params([{"params": [p]} for p in params])
    ours.step()
    ours.param_groups[1]["scope"] = "own"
    ours.step()
    assert ours.metrics()["step"].tolist() == [2, 2]
    torch.testing.assert_close(ours.metrics()["grad_norm"], torch.full((2,), 6**0.5), check_dtype=False)


class Operations(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def options_that_are_taken_anew_bring_nothing_from_the_host() -> None:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(6), mesh, [Shard(0)])
    ours = fusedlr.FusedAdamW([p], lr=0.1, max_grad_norm=1.0)
    ours.step()
    ours.param_groups[0]["weight_decay"] = 0.5
    with Operations() as called:
        ours.step()
    assert "c10d.allreduce_.default" in called.names
    # which `torch.tensor` calls
    assert "aten.lift_fresh.default" not in called.names, called.names
    # nor is it found out again which scopes have a gradient here
    # without the compiled watch the step that reduces is made anew
    assert compiled.host is None or "aten.fill_.Scalar" not in called.names, called.names


def a_failure_on_one_process_is_one_on_all(rank: int) -> None:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)]))
    q = nn.Parameter(torch.ones(2))
    ours = fusedlr.FusedAdamW([("p", p), ("q", q)], lr=0.1, max_grad_norm=1.0)

    def gradients() -> None:
        p.grad = distribute_tensor(torch.ones(6), mesh, [Shard(0)])
        q.grad = torch.ones(2)

    gradients()
    ours.step()
    before = p.to_local().clone(), q.detach().clone()  # type: ignore[attr-defined]
    gradients()
    if rank == 1:
        q.grad = torch.ones(2).to_sparse()
    expected = "parameter 'q': .*layout" if rank == 1 else "another process of this optimizer could not make"
    refused(ours.step, expected)
    assert torch.equal(p.to_local(), before[0]) and torch.equal(q, before[1])  # type: ignore[attr-defined]
    gradients()
    ours.step()
    assert ours.last_metrics()["step"] == [2]
    # the norm is asked of all together, too
    if rank == 1:
        q.grad = torch.ones(2).to_sparse()
        refused(ours.grad_norm, "parameter 'q'")
    else:
        assert torch.isnan(ours.grad_norm())
    gradients()
    torch.testing.assert_close(ours.grad_norm().item(), 8**0.5)


def a_failure_where_nothing_is_agreed_on_holds_up_nobody(rank: int) -> None:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)]))
    q = nn.Parameter(torch.ones(2))
    ours = fusedlr.FusedAdamW([("p", p), ("q", q)], lr=0.1)
    p.grad = distribute_tensor(torch.ones(6), mesh, [Shard(0)])
    q.grad = torch.ones(2).to_sparse() if rank == 1 else torch.ones(2)
    if rank == 1:
        with CommDebugMode() as counted:
            refused(ours.step, "parameter 'q'")
        assert counted.get_total_counts() == 0
    else:
        ours.step()


def a_step_that_only_allocates_is_one_on_all(rank: int) -> None:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for here, updates in ((0.0, 0), (float(rank == 1), 1)):
        p = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)]))
        ours = fusedlr.FusedAdamW([p], lr=0.1, schedule=fusedlr.constant())
        p.grad = distribute_tensor(torch.full((6,), here), mesh, [Shard(0)], src_data_rank=None)
        # as a tool does that wants the state to be there: a gradient on one process is one on all
        ours.param_groups[0]["lr"] = 0.0
        ours.step()
        assert ours.last_metrics()["step"] == [updates] and int(ours.state[p]["step"]) == updates


def refused(call: Any, words: str) -> None:
    try:
        call()
    except RuntimeError as error:
        assert re.search(words, str(error)), str(error)
    else:
        raise AssertionError(f"no error of {words!r}")


def gradients_that_are_spread_otherwise_are_refused() -> None:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    ours = fusedlr.FusedAdamW([("p", p)], lr=0.1, max_grad_norm=1.0)
    for grad, words in (
        (
            distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]),
            r"gradient is .*Shard\(dim=1\).*Shard\(dim=0\).*: redistribute it first",
        ),
        (DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]), "gradient is .*Partial.*still to be made"),
        (torch.ones(4, 4), "gradient is a plain tensor, but the parameter is .*Shard"),
    ):
        assign(p, grad)
        refused(ours.step, f"parameter 'p': its {words}")
    assert not ours.state


def meshes_of_which_none_covers_the_other_are_refused() -> None:
    params = []
    for rank in range(distributed.get_world_size()):
        mesh = DeviceMesh("cpu", [rank])
        p = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.ones(2), mesh, [Shard(0)])
        params.append(p)
    refused(optimizer_of_params(params).step, "whose processes overlap without one covering the other")


def a_mesh_of_one_process_concerns_no_other(rank: int) -> None:
    mesh = [DeviceMesh("cpu", [i]) for i in range(distributed.get_world_size())][rank]
    p = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(2), mesh, [Shard(0)])
    with CommDebugMode() as counted:
        optimizer_of_params([p]).step()
    assert counted.get_total_counts() == 0


def a_parameter_of_some_processes_counts_there_alone(rank: int) -> None:
    everywhere, one = DeviceMesh("cpu", range(distributed.get_world_size())), DeviceMesh("cpu", [0])
    params = []
    for mesh in (everywhere, one):
        p = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.ones(8), mesh, [Shard(0)])
        params.append(p)
    ours = optimizer_of_params(params)
    ours.step()
    assert ours.metrics()["grad_norm"] == 4 and ours.metrics()["step"] == 1
    assert (params[1].to_local() < 1).all() and params[1].to_local().numel() == (8 if rank == 0 else 0)


def a_scalers_flag_may_be_a_number(rank: int) -> None:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(6), mesh, [Shard(0)])
    ours = optimizer_of_params([p])
    ours.grad_scale, ours.found_inf = 1.0, float(rank == 1)  # type: ignore[attr-defined]
    ours.step()
    assert ours.metrics()["skipped"] == 1 and (p.to_local() == 1).all()  # type: ignore[attr-defined]


def a_norm_is_taken_over_by_no_process_alone(rank: int) -> None:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)]))
    ours = optimizer_of_params([p])
    p.grad = distribute_tensor(torch.ones(6), mesh, [Shard(0)])
    ours.grad_norm()
    # here alone, so that the others see no change
    if rank == 1:
        p.grad.to_local().fill_(2.0)
    ours.step()
    torch.testing.assert_close(ours.metrics()["grad_norm"].item(), 15**0.5)


def assign(p: Tensor, grad: Tensor) -> None:
    """Give a parameter a gradient that torch's own property refuses."""
    try:
        p.grad = grad
    except RuntimeError:
        raise AssertionError("torch refuses it itself") from None


def parts_kept_by_hand() -> None:
    rank, count = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    parts = [torch.randn(3 + i, dtype=torch.float64) for i in range(count)]
    whole = [nn.Parameter(part.clone()) for part in parts]
    mine = nn.Parameter(parts[rank].clone())
    alone = fusedlr.FusedAdamW(whole, lr=0.1, max_grad_norm=0.5)
    ours = fusedlr.FusedAdamW([mine], lr=0.1, max_grad_norm=0.5, process_group=distributed.group.WORLD)
    for k in range(4):
        for i, p in enumerate(whole):
            p.grad = torch.full_like(p, float("nan") if (k, i) == (2, 1) else 1.0 + i + k)
        mine.grad = whole[rank].grad.clone()  # type: ignore[union-attr]
        alone.step(), ours.step()
    torch.testing.assert_close(mine, whole[rank], rtol=1e-12, atol=0)
    assert ours.last_metrics()["skipped"] == alone.last_metrics()["skipped"] == 1
    assert pickle.loads(pickle.dumps(ours)).state


def work(rank: int, processes: int, arguments: list[str]) -> None:
    equals_one_process()
    a_zclip_sees_the_same_norms_on_every_process()
    a_step_like_the_last_makes_nothing()
    a_scope_that_is_assigned_is_one_on_every_process()
    options_that_are_taken_anew_bring_nothing_from_the_host()
    a_failure_on_one_process_is_one_on_all(rank)
    a_failure_where_nothing_is_agreed_on_holds_up_nobody(rank)
    a_step_that_only_allocates_is_one_on_all(rank)
    gradients_that_are_spread_otherwise_are_refused()
    meshes_of_which_none_covers_the_other_are_refused()
    a_mesh_of_one_process_concerns_no_other(rank)
    a_parameter_of_some_processes_counts_there_alone(rank)
    a_scalers_flag_may_be_a_number(rank)
    a_norm_is_taken_over_by_no_process_alone(rank)
    parts_kept_by_hand()


if __name__ == "__main__":
    main(work)
