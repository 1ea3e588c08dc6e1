"""For mkdocs: files beside docs/ (examples, say) are no part of the site, so links to them become names.

Where the pages are read in the repository the links work; tests/test_readme.py sees that they lead somewhere.
"""

import re

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown, **_):
    """A hook of mkdocs: the page's text before it is converted."""
    return OUTSIDE.sub(lambda link: link[1] if link[2] in link[1] else f"{link[1]} (`{link[2]}`)", markdown)
