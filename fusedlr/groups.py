"""Param groups that remember who wrote their learning rate last."""

from __future__ import annotations

from typing import Any


class ParamGroup(dict[str, Any]):
    """A param group that notes an assignment to `lr` from outside in its optimizer's set `writes`.

    The assignment is what counts, not a changed value: a scheduler may write the same number again. Copies
    and pickles of it are plain dicts, which the optimizer wraps when it finds them.
    """

    __slots__ = ("_writes",)

    def __init__(self, group: dict[str, Any], writes: set[int]) -> None:
        super().__init__(group)
        self._writes = writes
        # an id may have been that of a group that is gone
        writes.discard(id(self))

    def belongs_to(self, writes: set[int]) -> bool:
        """Whether it reports to this set."""
        return self._writes is writes

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key == "lr":
            self._writes.add(id(self))

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As of dict; setting a missing `lr` is a write."""
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As of dict; an `lr` among the items is a write."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> ParamGroup:  # type: ignore[override,misc]
        self.update(other)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


def set_quietly(group: dict[str, Any], key: str, value: Any) -> None:
    """Set a value as the optimizer itself does: not a write from outside."""
    dict.__setitem__(group, key, value)
