"""For mkdocstrings: makes of docstrings what the reference, which is read from the sources, has to show.

Constructors of schedules get the arguments that they share, which are put in when they are imported; doctests
and `::` become blocks of code.
"""

import inspect
import re

from griffe import Docstring, Extension

from fusedlr.schedule import CONSTRUCTORS

DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.M)


class ForReference(Extension):
    def on_object(self, *, obj, **_):
        """A hook of griffe: an object has been read."""
        if obj.docstring is None:
            return
        text = obj.docstring.value
        if obj.path.startswith("fusedlr.schedule.constructors.") and obj.name in CONSTRUCTORS:
            text = inspect.getdoc(CONSTRUCTORS[obj.name])
        text = DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", text).replace("::\n\n", ":\n\n")
        obj.docstring = Docstring(text, parent=obj, parser="google")
