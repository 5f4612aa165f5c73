"""For the site: what docstrings say in reStructuredText becomes Markdown."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data):`(~?)([\w.]+)`")
# A block of code is announced by two colons; an example is one of the section "Examples".
_PLAIN = ((re.compile(r"::$", re.M), ":"), (re.compile(r"^Example:$", re.M), "Examples:"))
_RETURNS = re.compile(r"(?<=^Returns:\n)(?: {4}.*\n?)+", re.M)


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
        found.docstring.value = _RETURNS.sub(lambda lines: _returned(lines[0]), text)
    for member in found.members.values():
        if not member.is_alias:
            _rewrite(member)


def _link(found: griffe.Object, short: str, name: str) -> str:
    """A link to where the name is documented; the name alone where it is on no page."""
    first, dot, rest = name.partition(".")
    try:
        path = found.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        path = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{path}" optional>`{shown}`</autoref>'


def _returned(lines: str) -> str:
    """One value in one line, as otherwise each line is taken for a value; named values have one."""
    if re.match(r" +\w+: ", lines):
        return lines
    return f"    {' '.join(lines.split())}\n"
