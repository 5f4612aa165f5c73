"""Settings of the suite, and a guard over its torch part.

The guard: no float64 tensor is made from lower precision, since MPS has none.
"""

import contextlib
import os

import pytest
from hypothesis import settings

# A slow machine is no failure. In CI the same examples each time, elsewhere new ones.
settings.register_profile("cggr", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("cggr")

# The tensors are tiny. Threads that wait for each other on a busy machine made the suite ten times
# slower; set before torch is imported, this holds for subprocesses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# JAX on a GPU: arithmetic in float32, where it would take TF32, and memory as it is needed, since
# several workers share the card. Read when JAX starts, like the next.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Eight devices out of one CPU, for the tests of sharding.
_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
# Without a CUDA device, Triton's kernels run in its interpreter. Triton asks when it is imported.
with contextlib.suppress(ImportError):
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        import quick_interpreter

        quick_interpreter.install()


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "float64: works on float64 tensors on purpose, without the guard against them"
    )


def _guarded(request):
    # Dynamo refuses to run under a dispatch mode; test_torch_compile looks into the graphs instead.
    name = request.module.__name__.rpartition(".")[2]
    in_torch_suite = name.startswith("test_torch_") or name == "test_migration"
    return (
        in_torch_suite
        and name != "test_torch_compile"
        and request.node.get_closest_marker("float64") is None
    )


@pytest.fixture(autouse=True)
def no_float64(request):
    """Every operation of the test, backward passes included, that yields float64 raises."""
    if not _guarded(request):
        yield
        return
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                    raise AssertionError(f"{func} made a float64 tensor, which MPS does not have.")
            return out

    with NoFloat64():
        yield


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """XLA's optimisations take a third of the time of JAX's own tests, which are not about them.

    Those of parity, and whatever runs on a machine with a GPU, have them.
    """
    if not request.module.__name__.rpartition(".")[2].startswith("test_jax_"):
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # the option is no part of their keys


@pytest.fixture
def chunks_of(monkeypatch):
    """Makes losses and statistics work on so many rows at a time: many chunks on small inputs."""
    from cggr.torch import eager

    def set_rows(rows, classes, cached_rows=None):
        monkeypatch.setattr(eager, "_CPU_PRODUCT", rows * classes)
        monkeypatch.setattr(eager, "_CPU_CACHE", (cached_rows or rows) * classes)

    return set_rows


@pytest.fixture
def compilations():
    """Collects what JAX compiles for the rest of the test: a list that grows by one each time."""
    import jax

    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def selections(monkeypatch):
    """Every selection that a CGGRModel of PyTorch makes."""
    import cggr.torch.model

    made = []
    select = cggr.torch.model.select_at_ratio

    def spy(*args, **kwargs):
        made.append(select(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(cggr.torch.model, "select_at_ratio", spy)
    return made
