"""For mkdocs: files beside docs/ (examples, say) are no part of the site, so links to them become names; the
pages stand in the order of the list on the front page.

Where the pages are read in the repository the links work; tests/tools/test_readme.py sees that they lead
somewhere.
"""

import re

OUTSIDE = re.compile(r"\[`?([^\]`]*)`?\]\(\.\./([^)\s]+)\)")
PAGE = re.compile(r"^- \[[^\]]*\]\((\S+\.md)\)", re.M)


def _name(link):
    return f"`{link[2]}`" if link[2] in link[1] else f"{link[1]} (`{link[2]}`)"


def on_page_markdown(markdown, **_):
    """A hook of mkdocs: the page's text before it is converted."""
    return OUTSIDE.sub(_name, markdown)


def on_nav(nav, **_):
    """A hook of mkdocs: the list of pages at the left; one that the front page does not name comes last."""
    order = [nav.homepage.file.src_uri, *PAGE.findall(nav.homepage.file.content_string)]
    place = {name: i for i, name in enumerate(order)}
    nav.items.sort(key=lambda page: place.get(page.file.src_uri, len(place)))
    nav.homepage.title = "Start"
    return nav
