"""What is installed, and what an import loads."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(code, *, cwd, path=None):
    """Run code in a fresh interpreter outside the checkout."""
    env = {"PATH": "", "PYTHONPATH": str(path)} if path else None
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from the files that git tracks."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in tracked:
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            copy.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            copy.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out]
    subprocess.run([*command, source], check=True, capture_output=True)
    (path,) = out.glob("cggr-0.6.0-*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the wheel's content, as installed."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_holds_the_package_and_its_kernels_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"cggr", "cggr-0.6.0.dist-info"}
    assert {"cggr/py.typed", "cggr/show.html.j2"} <= set(names)
    for source in (ROOT / "kernels").iterdir():
        if source.suffix in (".py", ".md"):
            assert f"cggr/kernels/{source.name}" in names
    for source in (ROOT / "cggr").rglob("*.py"):
        assert source.relative_to(ROOT).as_posix() in names


def test_the_kernels_are_a_tracked_link_without_an_init():
    mode = subprocess.run(
        ["git", "ls-files", "-s", "cggr/kernels"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()[0]
    assert mode == "120000"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_an_installed_wheel_has_no_top_level_kernels(site, tmp_path):
    code = (
        "from importlib.util import find_spec; "
        "print(find_spec('kernels'), bool(find_spec('cggr.kernels')))"
    )
    assert run(code, cwd=tmp_path, path=site) == (0, "None True", "")


@pytest.mark.parametrize("module", ["cggr", "cggr.spec"])
def test_the_import_of_the_spec_loads_no_framework(site, tmp_path, module):
    code = (
        f"import {module}, sys; "
        "print(sorted({'torch', 'jax', 'flax', 'triton', 'transformers'} & set(sys.modules)))"
    )
    assert run(code, cwd=tmp_path, path=site) == (0, "[]", "")


def test_the_check_above_can_fail(site, tmp_path):
    code = "import cggr.torch, sys; print(sorted({'torch', 'jax'} & set(sys.modules)))"
    assert run(code, cwd=tmp_path, path=site) == (0, "['torch']", "")


def test_the_command_line_loads_no_framework_to_print_its_help(site, tmp_path):
    code = (
        "import sys; from cggr.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'jax', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    status, out, _ = run(code, cwd=tmp_path, path=site)
    assert (status, out.splitlines()[-1]) == (0, "[]")


def test_the_import_of_the_torch_frontend_changes_no_global_setting(site, tmp_path):
    code = (
        "import torch\n"
        "def settings(): return (torch.backends.cuda.matmul.allow_tf32, torch.get_default_dtype(), "
        "torch.backends.cudnn.allow_tf32, torch.get_num_threads(), torch.is_grad_enabled())\n"
        "before = settings()\n"
        "import cggr.torch\n"
        "print(before == settings())"
    )
    assert run(code, cwd=tmp_path, path=site) == (0, "True", "")


def test_the_import_of_the_jax_frontend_loads_no_torch(site, tmp_path):
    code = (
        "import cggr.jax, sys; "
        "print(sorted({'torch', 'jax', 'flax', 'triton', 'jax_triton'} & set(sys.modules)))"
    )
    assert run(code, cwd=tmp_path, path=site) == (0, "['flax', 'jax']", "")


def test_the_import_of_the_jax_frontend_changes_no_global_setting(site, tmp_path):
    code = (
        "import jax, flax, os\n"
        "def settings(): return (dict(jax.config.values), dict(os.environ))\n"
        "before = settings()\n"
        "import cggr.jax\n"
        "print(before == settings())"
    )
    assert run(code, cwd=tmp_path, path=site) == (0, "True", "")


def test_frontend_names_are_pointed_to_their_frontends(site, tmp_path):
    status, _, error = run("from cggr import CGGRLoss", cwd=tmp_path, path=site)
    assert status == 1
    assert error.splitlines()[-1] == (
        "ImportError: CGGRLoss lives in a frontend: use `from cggr.torch import CGGRLoss` with "
        "PyTorch or `from cggr.jax import CGGRLoss` with Flax."
    )


def test_the_version_is_that_of_the_distribution(site, tmp_path):
    assert run("import cggr; print(cggr.__version__)", cwd=tmp_path, path=site)[1] == "0.6.0"
