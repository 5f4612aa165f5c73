"""The documents: their Python runs, their commands exist, their site has every public name."""

import html.parser
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cggr.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NOTEBOOK = ROOT / "docs" / "selected_tokens.md"  # its blocks are one program, run by a test below
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{i}")
    for page in PAGES
    if page != NOTEBOOK
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S))
]
PINS = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
SHOWN = ROOT / "docs" / "assets" / "selected_tokens.html"
# Of indented and fenced blocks, and of the running text.
COMMANDS = sorted(
    {
        line.strip()
        for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
        for pair in re.findall(
            r"^(?: {4}|\$ )?(cggr [a-z].*)$|`(cggr [^`]*)`", page.read_text(), re.M
        )
        for line in pair
        if line
    }
)


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 3


# What a trainer of transformers or TRL warns of on a machine without a GPU, and of its own names.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_the_documents_runs(block, tmp_path, monkeypatch):
    for package in ("datasets", "trl"):
        if re.search(rf"^(from|import) {package}\b", block, re.M):
            pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)  # what a block saves stays there
    exec(compile(block, "<document>", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def check_command(line):
    """Commands, options and choices of a command line exist; values may be placeholders."""
    words = shlex.split(line, comments=True)[1:]
    command, context = main, click.Context(main)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        command = command.get_command(context, name)
        assert command is not None, f"no command {name}"
        context = click.Context(command)
    given, _, _ = command.make_parser(context).parse_args(words)
    for parameter in command.params:
        value = given.get(parameter.name)
        if isinstance(parameter.type, click.Choice):
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, str):
                    parameter.type.convert(one, parameter, context)


def test_the_page_of_the_command_line_is_what_the_commands_say():
    """To renew it, paste what ``cggr ... --help`` prints in a terminal of 80 columns."""
    if (here := f"click=={metadata.version('click')}") not in PINS:
        pytest.skip(
            f"the page has what the click of requirements/constraints.txt prints, not {here}"
        )
    text = (ROOT / "docs" / "api" / "cli.md").read_text()
    shown = dict(re.findall(r"^```text\n\$ (cggr.*? --help)\n(.*?)^```$", text, re.M | re.S))
    assert shown.keys() == {"cggr --help", *(f"cggr {name} --help" for name in main.commands)}
    for line, output in shown.items():
        options = {"prog_name": "cggr", "env": {"COLUMNS": "80"}}
        assert output == CliRunner().invoke(main, line.split()[1:], **options).output


def test_there_are_commands_to_check():
    assert {line.split()[1] for line in COMMANDS} >= {"race", "score", "show", "bench", "info"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_documents_exists(line):
    check_command(line)


@pytest.mark.parametrize(
    "line", ["cggr rice", "cggr race --sedes 3", "cggr show FILE --selection best", "cggr bench x"]
)
def test_the_check_above_can_fail(line):
    with pytest.raises((AssertionError, click.UsageError)):
        check_command(line)


def test_the_page_of_selected_tokens_is_made_as_it_says(tmp_path, monkeypatch):
    """The cells train for seconds what the page was made from; its commands then run."""
    text = NOTEBOOK.read_text()
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        exec(compile(block, "<document>", "exec"), names)
    commands = re.findall(r"^    cggr (.*)$", text, re.M)
    assert len(commands) == 4
    for line in commands:
        done = CliRunner().invoke(main, shlex.split(line))
        assert done.exit_code == 0, done.output
    title = "<h1>What CGGR learns from in bisect.txt</h1>"
    assert title in (tmp_path / "selected_tokens.html").read_text()
    shown = SHOWN.read_text()
    assert title in shown
    assert len(shown) < 300_000
    # What the document says of it.
    selected, loss_of_selected, loss = re.search(
        r"^selected_tokens.html: (\d+) of .* of loss (.*); of all (.*) nats$", text, re.M
    ).groups()
    assert f"<td>{selected} of" in shown
    assert f"<td>{loss} nats; of the selected {loss_of_selected}</td>" in shown


# The reference: every public name is on a page of docs/api.
DOCUMENTED = set(
    re.findall(
        r"^::: (cggr\S+)$",
        "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")),
        re.M,
    )
)


def public_names(module):
    """What a module exports; without ``__all__``, the public functions and classes it defines."""
    module = importlib.import_module(module)
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }


@pytest.mark.parametrize(
    "module",
    [
        "cggr.torch",
        "cggr.torch.trainer",
        "cggr.torch.reference",
        "cggr.jax",
        "cggr.spec",
        "cggr.reference",
    ],
)
def test_every_public_name_has_its_place_in_the_reference(module):
    spec = public_names("cggr.spec")
    for name, value in public_names(module).items():
        home = "cggr.spec" if spec.get(name) is value else module  # a name of the spec is there
        assert f"{home}.{name}" in DOCUMENTED


def test_every_documented_name_exists():
    for path in DOCUMENTED:
        module, _, name = path.rpartition(".")
        assert name in public_names(module)


# The site.


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    if not os.environ.get("CI"):
        pytest.importorskip("mkdocs", reason="mkdocs is missing: requirements/docs.txt")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


class Links(html.parser.HTMLParser):
    """What a page refers to: addresses that are loaded with it, and all others."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.linked, self.identifiers = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if "id" in given:
            self.identifiers.add(given["id"])
        for name in ("src", "href"):
            if given.get(name):
                (self.linked if tag == "a" else self.loaded).append(given[name])


def test_the_site_builds_without_a_warning_and_has_all_its_pages(site):
    for page in (ROOT / "docs").rglob("*.md"):
        path = page.relative_to(ROOT / "docs").with_suffix("")
        built = site / ("" if path.name == "index" else path) / "index.html"
        assert built.is_file(), path


def test_a_page_of_the_site_loads_nothing_from_elsewhere_and_its_links_lead_somewhere(site):
    pages = {
        path: Links(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"
    }
    for path, page in pages.items():
        for address in page.loaded:
            assert not re.match(r"\w+:|//", address), f"{path}: {address}"
        for address in [*page.loaded, *page.linked]:
            target, _, anchor = address.partition("#")
            if re.match(r"\w+:|//", target):
                continue
            there = (path.parent / target).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{path}: {address}"
            if anchor and there in pages:
                assert anchor in pages[there].identifiers, f"{path}: {address}"


def test_the_reference_shows_what_the_docstrings_say(site):
    """No reStructuredText is left, and the examples are code."""
    for page in (site / "api").glob("*/index.html"):
        text = page.read_text()
        assert not re.search(r":(class|func|meth|mod|data):", text), page
    for name in DOCUMENTED:
        assert any(
            f'id="{name}"' in page.read_text() for page in (site / "api").glob("*/index.html")
        )


def test_the_pictures_are_those_that_the_code_draws(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    script = ROOT / "docs" / "pictures.py"
    subprocess.run([sys.executable, "-B", script, tmp_path], check=True, cwd=ROOT)
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn
    for name, picture in drawn.items():
        committed = (ROOT / "docs" / "assets" / name).read_text()
        if f"Matplotlib v{matplotlib.__version__}," in committed:
            is_new = picture == committed  # no listing of thousands of lines
            assert is_new, f"{name} is old: python docs/pictures.py"
        else:  # another version draws otherwise, but as many things
            assert picture.count('<g id="patch_') == committed.count('<g id="patch_')
