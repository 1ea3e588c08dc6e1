"""For tools that are driven by a file: each module is named in that file, and the tool imports it."""
