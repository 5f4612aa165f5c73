"""For the site: what docstrings say in reStructuredText becomes Markdown."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data):`(~?)([\w.]+)`")
# A block of code is announced by two colons; an example is one of the section "Examples".
_PLAIN = ((re.compile(r"::$", re.M), ":"), (re.compile(r"^Example:$", re.M), "Examples:"))


class Markdown(griffe.Extension):
    """Rewrites every docstring of a package before it is rendered."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called when all modules of the package are known."""
        _rewrite(pkg)


def _rewrite(found: griffe.Object) -> None:
    if found.docstring is not None:
        text = _ROLE.sub(lambda role: _link(found, *role.groups()), found.docstring.value)
        for pattern, plain in _PLAIN:
            text = pattern.sub(plain, text)
        found.docstring.value = text
    for member in found.members.values():
        if not member.is_alias:
            _rewrite(member)


def _link(found: griffe.Object, short: str, name: str) -> str:
    """A link to where the name is documented; the name alone where it is on no page."""
    try:
        path = found.resolve(name)
    except griffe.NameResolutionError:
        path = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{path}" optional>`{shown}`</autoref>'
