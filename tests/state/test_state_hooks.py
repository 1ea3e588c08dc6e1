"""Hooks of `state_dict` and `load_state_dict` run as torch's."""

from __future__ import annotations

from typing import Any

from kit import scheduled, steps, through_a_file
from snapshots import bits


def test_load_hooks_run_as_torchs():
    source = scheduled()
    steps(source, 0, 2)
    optimizer = scheduled()
    seen: list[Any] = []

    def pre(self: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(("pre", self, int(self.metrics()["step"])))
        group = {**state_dict["param_groups"][0], "eps": 0.25}
        return {**state_dict, "param_groups": [group]}

    def post(self: Any) -> None:
        seen.append(("post", self, int(self.metrics()["step"])))

    handles = [
        optimizer.register_load_state_dict_pre_hook(pre),
        optimizer.register_load_state_dict_post_hook(post),
    ]
    state = source.state_dict()
    optimizer.load_state_dict(state)
    assert seen == [("pre", optimizer, 0), ("post", optimizer, 2)]
    assert optimizer.param_groups[0]["eps"] == 0.25
    assert state["param_groups"][0]["eps"] == 1e-8
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(state)
    assert len(seen) == 2


def test_a_load_hook_may_change_the_top_level_without_touching_the_callers_dict():
    optimizer = scheduled()

    def pre(self: Any, state_dict: dict[str, Any]) -> None:
        state_dict["state"] = {}

    optimizer.register_load_state_dict_pre_hook(pre)
    source = scheduled()
    steps(source, 0, 1)
    state = source.state_dict()
    optimizer.load_state_dict(state)
    assert state["state"] and not optimizer.state


def test_state_dict_hooks_see_what_is_saved():
    optimizer = scheduled()
    steps(optimizer, 0, 2)
    seen: list[Any] = []

    def post(self: Any, state_dict: dict[str, Any]) -> None:
        seen.append(bits(state_dict))
        # plain numbers already, also the schedule
        through_a_file(state_dict)
        state_dict["note"] = "from a hook"

    optimizer.register_state_dict_pre_hook(lambda self: seen.append(self))
    optimizer.register_state_dict_post_hook(post)
    state = optimizer.state_dict()
    assert state.pop("note") == "from a hook"
    assert seen == [optimizer, bits(state)]


def test_a_state_dict_hook_may_return_anything():
    optimizer = scheduled()
    optimizer.register_state_dict_post_hook(lambda self, state_dict: {"saved": state_dict["state"]})
    assert optimizer.state_dict() == {"saved": {}}
