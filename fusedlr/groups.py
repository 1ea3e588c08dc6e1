"""Param groups that remember who wrote their learning rate last, and whether anything else was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Notes:
    """What was written to an optimizer's groups from outside.

    Attributes:
        writes: ids of the groups whose lr was assigned since the last step.
        changed: whether anything but an lr was written since it was last set to False.
    """

    writes: set[int] = field(default_factory=set)
    changed: bool = True


class ParamGroup(dict[str, Any]):
    """A param group that notes assignments from outside in its optimizer's `notes`.

    The assignment is what counts, not a changed value: a scheduler may write the same number again. Copies
    and pickles of it are plain dicts, which the optimizer wraps when it finds them.
    """

    __slots__ = ("_notes",)

    def __init__(self, group: dict[str, Any], notes: Notes) -> None:
        super().__init__(group)
        self._notes = notes
        # an id may have been that of a group that is gone
        notes.writes.discard(id(self))

    def belongs_to(self, notes: Notes) -> bool:
        """Whether it reports here."""
        return self._notes is notes

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key == "lr":
            self._notes.writes.add(id(self))
        else:
            self._notes.changed = True

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

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._notes.changed = True

    def pop(self, *args: Any) -> Any:
        """As of dict."""
        self._notes.changed = True
        return super().pop(*args)

    def popitem(self) -> tuple[str, Any]:
        """As of dict."""
        self._notes.changed = True
        return super().popitem()

    def clear(self) -> None:
        """As of dict."""
        self._notes.changed = True
        super().clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


def set_quietly(group: dict[str, Any], key: str, value: Any) -> None:
    """Set a value as the optimizer itself does: not a write from outside."""
    dict.__setitem__(group, key, value)
