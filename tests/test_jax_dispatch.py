"""Which code computes statistics and losses of cggr.jax, and the Triton kernels' side of it.

A stand-in for jax_triton takes arguments as version 0.3.1 or 0.4.1 does, and launches the kernels
in Triton's interpreter, on the CPU. The truth is NumPy's float64.

Shapes: ``R`` rows, ``D`` hidden size, ``V`` classes.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import os
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cggr.jax import (
    RoutingConfig,
    cggr_linear_loss,
    dispatch,
    linear_token_statistics,
    token_statistics,
    triton_calls,
)
from cggr.kernels import chunks

OUTPUTS = tuple(object() for _ in range(2))  # pointers of a launch's results


def call_03(
    launch,
    *args,
    kernel,
    out_shape,
    grid,
    name="",
    custom_call_target_name="triton_kernel_call",
    num_warps=None,
    num_stages=None,
    num_ctas=1,
    compute_capability=None,
    enable_fp_fusion=True,
    input_output_aliases=None,
    zeroed_outputs=(),
    debug=False,
    serialized_metadata=b"",
    **metaparams,
):
    """triton_call of 0.3.1: inputs, then outputs, have the kernel's first places."""
    assert not any(isinstance(x, (bool, int, float)) for x in args)  # 1 would be a constant
    outputs = OUTPUTS[: len(out_shape)]
    named = dict(zip(parameters(kernel), [*args, *outputs], strict=False))
    assert not named.keys() & metaparams.keys()
    return launch(kernel, named | metaparams, out_shape, grid, num_warps, num_stages)


def call_04(
    launch,
    *args,
    kernel,
    out_type=None,
    grid,
    name="",
    num_warps=None,
    num_stages=None,
    num_ctas=None,
    compute_capability=None,
    backend_options=None,
    input_output_aliases=None,
    zeroed_outputs=(),
    debug=False,
    serialized_metadata=b"",
    cost_estimate=None,
    has_side_effect=False,
    **kwargs,
):
    """triton_call of 0.4.1: outputs are the parameters that are no constants and not given."""
    assert "out_shape" not in kwargs  # deprecated
    named = dict(zip(parameters(kernel), args, strict=False)) | kwargs
    is_constant = parameters(kernel)
    missing = [x for x in is_constant if x not in named and not is_constant[x]]
    named |= dict(zip(missing, OUTPUTS[: len(out_type)], strict=True))
    return launch(kernel, named, out_type, grid, num_warps, num_stages)


class JaxTriton(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a jax_triton of a version that calls ``launch(kernel, named, outputs, grid, ...)``."""

    def __init__(self, version, launch):
        self.version, self.launch = version, launch

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "jax_triton" else None

    def exec_module(self, module):
        module.__version_info__ = tuple(map(int, self.version.split(".")))
        if self.version == "0.3.1":
            os.environ["TRITON_CACHE_DIR"] = ""
            module.triton_call = functools.partial(call_03, self.launch)
        else:
            os.environ.pop("TRITON_CACHE_DIR", None)
            module.triton_call = functools.partial(call_04, self.launch)


VERSIONS = ("0.3.1", "0.4.1")
CAPPED = (-0.7, 5.0)  # logit_scale and softcap


def parameters(kernel):
    """Whether each parameter of a kernel, by name, is a constant."""
    from triton import language as tl

    annotations = inspect.signature(kernel.fn).parameters.items()
    return {name: parameter.annotation is tl.constexpr for name, parameter in annotations}


@pytest.fixture
def without_jax_triton(monkeypatch):
    """No jax_triton has been imported, nor will what is compiled with another one be used again."""
    monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
    monkeypatch.delenv("CGGR_IMPLEMENTATION", raising=False)
    jax.clear_caches()
    yield
    sys.modules.pop("jax_triton", None)
    jax.clear_caches()


@pytest.fixture
def installed(without_jax_triton, monkeypatch):
    """Installs a stand-in, by version and launch."""
    pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

    def install(version, launch):
        monkeypatch.setattr(sys, "meta_path", [JaxTriton(version, launch), *sys.meta_path])

    return install


@pytest.fixture
def recorded(installed):
    """Installs a jax_triton whose launches are kept in the list returned, and give zeros."""

    def install(version):
        launches = []

        def launch(kernel, named, outputs, grid, num_warps, num_stages):
            assert named.keys() == parameters(kernel).keys()
            launches.append((kernel, named, outputs, grid, num_warps, num_stages))
            return [jnp.zeros(output.shape, output.dtype) for output in outputs]

        installed(version, launch)
        return launches

    return install


@pytest.fixture
def interpreted(installed, request, monkeypatch):
    """CGGR_IMPLEMENTATION=triton, with a jax_triton that runs the kernels in the interpreter."""
    pytest.importorskip("torch", reason="PyTorch is not installed", exc_type=ImportError)
    kernels_on = pytest.importorskip("kernels_on", exc_type=ImportError)
    if not kernels_on.INTERPRETED:
        pytest.skip("the kernels are compiled for the CUDA device here: see test_jax_cuda")
    from cggr.kernels.arithmetic import Launch

    one_at_a_time = threading.Lock()  # devices call from threads of their own

    def launch(kernel, named, outputs, grid, num_warps, num_stages):
        is_constant = parameters(kernel)
        assert named.keys() == is_constant.keys()
        constants = {name: value for name, value in named.items() if is_constant[name]}
        arguments = [named[name] for name in is_constant if not is_constant[name]]
        places = [i for i, x in enumerate(arguments) if isinstance(x, jax.Array)]

        def run(*arrays):
            with one_at_a_time:
                for place, array in zip(places, arrays, strict=True):
                    arguments[place] = to_torch(np.array(array))
                results = [to_torch(np.full(x.shape, np.nan, x.dtype)) for x in outputs]
                pointers = {id(x): result for x, result in zip(OUTPUTS, results, strict=False)}
                with_results = [pointers.get(id(x), x) for x in arguments]
                how = Launch(grid, constants, num_warps, num_stages)
                kernels_on.run(kernel, how, *with_results)
                return [from_torch(result) for result in results]

        return jax.pure_callback(run, list(outputs), *(arguments[place] for place in places))

    installed(getattr(request, "param", "0.3.1"), launch)
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "triton")
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def two_devices():
    devices = jax.devices("cpu")
    if len(devices) < 2:
        pytest.skip("JAX was started with one CPU device")
    return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:2])


EITHER_VERSION = pytest.mark.parametrize("interpreted", VERSIONS, indirect=True)


def to_torch(array):
    import torch

    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_torch(tensor):
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


# The truth


def true_loss(logits, label, row_weight):
    """``Σ w nll`` and its gradient in float64; rows of weight 0 are left out."""
    x, u = np.asarray(logits, np.float64), np.asarray(row_weight, np.float64)
    gradient, kept = np.zeros_like(x), u != 0
    x, u = x[kept], u[kept, None]
    one_hot = np.asarray(label)[kept, None] == np.arange(x.shape[1])
    log_p = x - x.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    gradient[kept] = u * (np.exp(log_p) - one_hot)
    return -(u * log_p)[one_hot].sum(), gradient


def true_head(hidden, weight, bias, scale=1.0, softcap=None):
    """Logits in float64, and their slope in the head's output, which is rounded to its dtype."""
    z = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T
    z += 0 if bias is None else np.asarray(bias, np.float64)
    x = scale * z.astype(hidden.dtype).astype(np.float64)
    if softcap is None:
        return x, scale
    x = softcap * np.tanh(x / softcap)
    return x, scale * (1 - (x / softcap) ** 2)


def true_linear_loss(hidden, weight, bias, label, row_weight, *head):
    """The same of a linear head, with its gradients to hidden, weight and bias."""
    hidden = jnp.where(row_weight[:, None] == 0, 0, hidden)
    x, slope = true_head(hidden, weight, bias, *head)
    value, gradient = true_loss(x, label, row_weight)
    gradient *= slope
    h, w = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
    return value, (gradient @ w, gradient.T @ h, gradient.sum(0))


def assert_near(got, want, tolerance):
    """Within `tolerance` of the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def rows(dtype, n_rows=7, width=24, classes=700, seed=0):
    """Hidden, weight, bias, labels and weights of rows, of which the second counts for nothing.

    Hidden, weight and bias are multiples of 1/32, so few that sums of their products are exact in
    float32 and in any order. Then it is decided how a logit, of standard deviation 2.2, is rounded.
    """
    rng = np.random.default_rng(seed)
    shapes = ((n_rows, width), (classes, width), (classes,))
    scale = (2.2 / width**0.5) ** 0.5
    values = (np.round(rng.normal(0, 32 * scale, shape)) / 32 for shape in shapes)
    hidden, weight, bias = (jnp.asarray(x, dtype) for x in values)
    label = jnp.asarray(rng.integers(0, classes, n_rows), jnp.int32)
    row_weight = jnp.asarray(rng.uniform(0.5, 2, n_rows), jnp.float32).at[1].set(0)
    return hidden, weight, bias, label, row_weight


def assert_statistics(found, logits, targets, tolerance=1e-5):
    expected = truth.statistics(np.asarray(logits, np.float64), targets)
    for name, value in found._asdict().items():
        if expected[name] is None:
            assert value is None
            continue
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected[name], tolerance, tolerance, err_msg=name)


# Which one computes


def test_without_a_gpu_xla_is_the_default_and_nothing_is_imported(recorded):
    if jax.default_backend() == "gpu":
        pytest.skip("JAX has a GPU here")
    launches = recorded("0.4.1")
    token_statistics(jnp.zeros((3, 4)), jnp.zeros(3, jnp.int32))
    assert "jax_triton" not in sys.modules
    assert not launches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_kernels_are_the_default_on_a_gpu(recorded, monkeypatch, dtype):
    launches = recorded("0.4.1")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.make_jaxpr(token_statistics)(jnp.zeros((3, 4), dtype))
    assert [kernel.__name__ for kernel, *_ in launches] == ["token_statistics_kernel"]
    del launches[:]
    with jax.enable_x64(True):
        jax.make_jaxpr(token_statistics)(jnp.zeros((3, 4), "float64"))
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "xla")
    jax.make_jaxpr(token_statistics)(jnp.zeros((3, 4), dtype))
    assert not launches


def test_several_gpus_launch_inside_shard_map_only(recorded, monkeypatch):
    launches = recorded("0.4.1")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    on = two_devices()
    jax.make_jaxpr(token_statistics)(jnp.zeros((4, 5)))
    assert not launches
    local = jax.shard_map(token_statistics, mesh=on, in_specs=P("data"), out_specs=P("data"))
    jax.make_jaxpr(local)(jnp.zeros((4, 5)))
    assert [named["V"] for _, named, *_ in launches] == [5]


def test_without_jax_triton_xla_is_the_default_on_a_gpu(without_jax_triton, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    logits = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    assert_statistics(token_statistics(logits), logits, None)


def test_what_is_compiled_for_the_cpu_is_xla_beside_a_gpu_too(recorded, monkeypatch):
    arrays = jax.device_put(rows("float32"), jax.devices("cpu")[0])

    def everything(hidden, weight, bias, label, row_weight):
        def total(hidden, weight, bias):
            head = (label, row_weight, 0.5, 3.0)
            linear = dispatch.linear_weighted_nll_sum(hidden, weight, bias, *head)
            logits = hidden @ weight.T
            statistics = token_statistics(logits, label)
            others = linear_token_statistics(hidden, weight, bias=bias)
            return linear + dispatch.weighted_nll_sum(logits, label, row_weight), (
                statistics,
                others,
            )

        gradient = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
        return gradient(hidden, weight, bias)

    monkeypatch.setenv("CGGR_IMPLEMENTATION", "xla")
    expected = [everything(*arrays), jax.jit(everything)(*arrays)]
    launches = recorded("0.3.1")  # which give zeros
    jax.clear_caches()
    monkeypatch.delenv("CGGR_IMPLEMENTATION")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    compiled = jax.jit(everything)(*arrays)
    jax.tree.map(np.testing.assert_array_equal, compiled, expected[1])
    # Without jit the operations are compiled one by one, here as four programs.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, 2e-6, 2e-6), everything(*arrays), expected[0]
    )
    assert launches


# What is refused


def test_another_name_is_refused(monkeypatch):
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "eager")
    message = "^CGGR_IMPLEMENTATION must be one of 'xla', 'triton' in cggr.jax, got 'eager'.$"
    with pytest.raises(ValueError, match=message):
        cggr_linear_loss(*rows("float32")[:2], np.zeros(7, int), RoutingConfig(), step=0)


@pytest.mark.parametrize("function", [token_statistics, lambda x: linear_token_statistics(x, x)])
def test_the_kernels_refuse_float64(function, monkeypatch):
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "triton")
    message = (
        "^CGGR_IMPLEMENTATION='triton' needs float32, bfloat16 or float16, got float64: "
        "CGGR_IMPLEMENTATION=xla computes it.$"
    )
    with jax.enable_x64(True), pytest.raises(TypeError, match=message):
        function(jnp.zeros((3, 4), jnp.float64))


def test_without_jax_triton_the_kernels_say_how_to_get_it(without_jax_triton, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "triton")
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    message = r'pip install "cggr\[jax-cuda\]", or set CGGR_IMPLEMENTATION=xla .*\(.*jax_triton'
    with pytest.raises(ImportError, match=message):
        token_statistics(jnp.zeros((3, 4)))


# The adapter


@pytest.mark.parametrize("kept", [None, "", "/var/cache/triton"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_cache_directory_survives_the_import(recorded, monkeypatch, version, kept):
    recorded(version)
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "triton")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    if kept is not None:
        monkeypatch.setenv("TRITON_CACHE_DIR", kept)
    token_statistics(jnp.zeros((3, 4)))
    assert "jax_triton" in sys.modules
    assert os.environ.get("TRITON_CACHE_DIR") == kept


@pytest.mark.parametrize("version", VERSIONS)
def test_launches_are_those_of_the_kernels_own_tables(recorded, monkeypatch, version):
    from cggr.kernels import linear_token_statistics as linear
    from cggr.kernels import selected_cross_entropy as gradients
    from cggr.kernels import token_statistics as statistics

    launches = recorded(version)
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "triton")
    hidden, weight, bias, label, row_weight = rows("bfloat16", 300)
    n_rows, (n_classes, width) = len(hidden), weight.shape
    logits = hidden @ weight.T

    token_statistics(logits.reshape(2, 150, n_classes), ignore_index=7)
    want = statistics.token_statistics_launch(
        n_rows, n_classes, n_classes, 2, has_target=False, ignore_index=7
    )
    out = ((6, n_rows), jnp.float32)
    expected = [(statistics.token_statistics_kernel, want, {}, out)]

    jax.grad(dispatch.weighted_nll_sum)(logits, label, row_weight)
    want = statistics.token_statistics_launch(
        n_rows, n_classes, n_classes, 2, has_target=True, ignore_index=-100
    )
    expected.append((statistics.token_statistics_kernel, want, {}, out))
    want = gradients.cross_entropy_gradient_launch(n_rows, n_classes, n_classes, 2)
    kernel = gradients.cross_entropy_gradient_kernel
    expected.append((kernel, want, {}, (logits.shape, jnp.bfloat16)))

    options = {"bias": bias, "logit_scale": 0.5, "softcap": 30.0, "ignore_index": -1}
    linear_token_statistics(hidden, weight, label, **options)
    sums, join, splits, split_classes = linear.linear_token_statistics_launch(
        n_rows,
        n_classes,
        width,
        has_target=True,
        has_bias=True,
        ignore_index=-1,
        logit_scale=0.5,
        softcap=30.0,
    )
    assert splits > 1
    sizes = {"n_rows": n_rows, "split_classes": split_classes}
    shape = ((splits, 6, n_rows), jnp.float32)
    expected.append((linear.linear_sums_kernel, sums, sizes, shape))
    sizes = {"n_rows": n_rows, "n_splits": splits}
    expected.append((linear.join_sums_kernel, join, sizes, out))

    found = []
    for kernel, named, (output,), *how in launches:
        assert list(named.values()).count(OUTPUTS[0]) == 1
        numbers = {name: x for name, x in named.items() if isinstance(x, (bool, int, float))}
        found.append((kernel, numbers, *how, (output.shape, output.dtype)))
    del found[1]  # under jit, what has a gradient is traced once without it
    for launch, (kernel, want, sizes, output) in zip(found, expected, strict=True):
        how = (want.grid, want.num_warps, want.num_stages)
        assert launch == (kernel, want.constants | sizes, *how, output)


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "10.0", "12.0"])
def test_the_fused_kernel_runs_where_it_fits(recorded, monkeypatch, capability):
    launches = recorded("0.4.1")
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "triton")

    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "devices", lambda *_: [Device()])

    def fused(dtype, width):
        del launches[:]
        hidden = jax.ShapeDtypeStruct((4, width), dtype)
        jax.eval_shape(linear_token_statistics, hidden, hidden)
        return launches[0][0].__name__ == "linear_sums_kernel"

    assert fused("bfloat16", 1024) == (capability in ("9.0", "10.0"))
    assert not fused("float32", 1024)
    assert not fused("float16", 1025)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows_launch_nothing(recorded, monkeypatch, shape):
    launches = recorded("0.4.1")
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "triton")
    assert token_statistics(jnp.zeros(shape)).entropy.shape == shape[:-1]
    weight = jnp.ones((300, 5))
    label, none = jnp.zeros(0, jnp.int32), jnp.zeros(0)

    def total(hidden, weight):
        logits_sum = dispatch.weighted_nll_sum(hidden, label, none)
        arguments = (hidden, weight, None, label, none, 1.0, None)
        return logits_sum + dispatch.linear_weighted_nll_sum(*arguments)

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(jnp.zeros((0, 5)), weight)
    assert value == 0
    np.testing.assert_array_equal(gradients[1], np.zeros((300, 5)))
    assert not launches


# The numbers, in the interpreter, which rounds to float16, and to bfloat16 truncates


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 2), (9, 31), (2, 3, 1025)])
def test_statistics(interpreted, shape, dtype):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, shape).reshape(-1, shape[-1])
    logits[0, :] = 1.0
    logits[1:2, 0] = -np.inf
    logits[3:4, 1] = np.nan
    logits = jnp.asarray(logits.reshape(shape), dtype)
    targets = rng.integers(0, shape[-1], shape[:-1])
    if targets.size > 5:
        targets.flat[4], targets.flat[5] = -100, shape[-1]
    on_device = jax.jit(lambda x, y: token_statistics(x, y))  # where no target can be looked at
    assert_statistics(on_device(logits, targets), logits, targets)
    assert_statistics(token_statistics(logits), logits, None)


@EITHER_VERSION
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_of_logits(interpreted, dtype):
    hidden, weight, _, label, row_weight = rows(dtype, classes=70)
    logits = (hidden @ weight.T).at[1].set(jnp.nan)
    expected, gradient = true_loss(logits, label, row_weight)
    for run in (lambda f: f, jax.jit):
        function = run(jax.value_and_grad(dispatch.weighted_nll_sum))
        value, found = function(logits, label, row_weight)
        np.testing.assert_allclose(value, expected, rtol=3e-6)
        assert found.dtype == logits.dtype
        assert_near(found, gradient, 1e-5 if dtype == "float32" else 8e-3)
        np.testing.assert_array_equal(found[1], 0)


@EITHER_VERSION
@pytest.mark.parametrize(
    ("dtype", "with_bias", "head"),
    [("float32", True, (1.0, None)), ("float16", False, (1.0, None)), ("float16", True, CAPPED)],
)
def test_statistics_of_a_linear_head(interpreted, monkeypatch, dtype, with_bias, head):
    # float32 in chunks of four rows, of which the last begins inside the one before it.
    n_rows, classes = (9, 20) if dtype == "float32" else (5, 700)
    monkeypatch.setattr(chunks, "PRODUCT_TILE", 4)
    monkeypatch.setattr(chunks, "MAX_LOGITS", 4 * classes)
    hidden, weight, bias, label, _ = rows(dtype, n_rows, classes=classes)
    label, bias = label.at[0].set(-100), bias if with_bias else None
    scale, softcap = head
    found = linear_token_statistics(
        hidden, weight, label, bias=bias, logit_scale=scale, softcap=softcap
    )
    x, _ = true_head(hidden, weight, bias, *head)
    assert_statistics(found, x, np.asarray(label), 2e-5)


@pytest.mark.parametrize("head", [(1.0, None), CAPPED])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loss_of_a_linear_head(interpreted, monkeypatch, dtype, with_bias, head):
    # Chunks of 256 classes, and a last one of 188.
    hidden, weight, bias, label, row_weight = rows(dtype)
    monkeypatch.setattr(triton_calls, "_MAX_LOGITS_BACKWARD", 256 * len(hidden))
    hidden = hidden.at[1].set(jnp.nan)
    shift = bias if with_bias else jnp.zeros_like(bias)
    expected, gradients = true_linear_loss(hidden, weight, shift, label, row_weight, *head)

    @jax.jit
    @jax.value_and_grad
    def run(arrays):
        hidden, weight, bias = arrays
        return dispatch.linear_weighted_nll_sum(hidden, weight, bias, label, row_weight, *head)

    value, found = run((hidden, weight, bias if with_bias else None))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(found, gradients, strict=True):
        if got is None:
            assert not with_bias
            continue
        assert got.dtype == hidden.dtype
        assert_near(got, want, 1e-5 if dtype == "float32" else 2e-3)
    np.testing.assert_array_equal(found[0][1], 0)


def test_a_label_that_is_no_class_is_loud_where_it_counts(interpreted):
    hidden, weight, _, label, row_weight = rows("float32", 4, classes=70)

    @jax.jit
    def run(label):
        linear = functools.partial(
            dispatch.linear_weighted_nll_sum,
            weight_VD=weight,
            bias_V=None,
            label_R=label,
            weight_R=row_weight,
            logit_scale=1.0,
            softcap=None,
        )
        logits = functools.partial(dispatch.weighted_nll_sum, label_R=label, weight_R=row_weight)
        return jax.value_and_grad(logits)(hidden @ weight.T), jax.value_and_grad(linear)(hidden)

    for wrong in (-1, -100, 70, 2**31 - 1):
        silent = label.at[1].set(wrong)  # of weight 0
        for value, gradient in run(silent):
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()
        for value, gradient in run(silent.at[3].set(wrong)):
            assert np.isnan(value)
            assert np.isnan(gradient[3]).all()
            assert np.isfinite(gradient[:3]).all()


def test_vmap_is_a_loop(interpreted):
    cases = [rows("float16", 3, classes=40, seed=seed) for seed in range(2)]

    def run(hidden, weight, bias, label, row_weight):
        def total(hidden, weight, bias):
            linear = (hidden, weight, bias, label, row_weight, *CAPPED)
            logits = (hidden @ weight.T, label, row_weight)
            sums = dispatch.linear_weighted_nll_sum(*linear), dispatch.weighted_nll_sum(*logits)
            return sum(sums), linear_token_statistics(hidden, weight, label)

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(hidden, weight, bias)

    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *cases)
    found, single = jax.jit(jax.vmap(run))(*stacked), jax.jit(run)
    for i, case in enumerate(cases):
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(single(*case)), strict=True):
            # The products are batched, and may be added up in another order.
            assert_near(got[i], want, 2e-3)


@pytest.mark.parametrize(("dtype", "checked"), [("float32", True), ("float16", False)])
def test_inside_shard_map(interpreted, monkeypatch, dtype, checked):
    # The weights are the same on both devices: their gradient is the sum over them.
    hidden, weight, bias, label, row_weight = rows(dtype, 6, classes=300)
    monkeypatch.setattr(triton_calls, "_MAX_LOGITS_BACKWARD", 256)

    @functools.partial(
        jax.shard_map,
        mesh=two_devices(),
        in_specs=(P("data"), P(), P(), P("data"), P("data")),
        out_specs=(P(), P("data")),
        check_vma=checked,
    )
    def local(hidden, weight, bias, label, row_weight):
        arrays = (hidden, weight, bias, label, row_weight)
        total = dispatch.linear_weighted_nll_sum(*arrays, *CAPPED)
        total += dispatch.weighted_nll_sum(hidden @ weight.T, label, row_weight)
        statistics = (
            token_statistics(hidden @ weight.T, label),
            linear_token_statistics(hidden, weight, label, bias=bias),
        )
        return jax.lax.psum(total, "data"), statistics

    def run():
        # Another function each time: what was traced for one implementation is not for the other.
        function = jax.value_and_grad(lambda *arrays: local(*arrays), (0, 1, 2), has_aux=True)
        return jax.jit(function)(hidden, weight, bias, label, row_weight)

    found = run()
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "xla")
    expected = run()
    tolerance = 1e-5 if dtype == "float32" else 5e-3  # XLA rounds logits after the soft-cap
    jax.tree.map(lambda got, want: assert_near(got, want, tolerance), found, expected)
