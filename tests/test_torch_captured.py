"""CapturedStep: what it takes, replays and leaves. Without a CUDA device, graphs are run again."""

import contextlib
import functools
import re

import models
import pytest
import torch
from token_steps import enable_checkpointing
from torch.utils._python_dispatch import TorchDispatchMode

from cggr.torch import CapturedStep, CGGRModel, captured

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RAMP = {"warmup_steps": 8, "dynamic_threshold": False}


class Rerun:
    """In place of a CUDA graph: runs the step again, and writes to where it wrote at first."""

    def __init__(self, step):
        self.step, self.model = step, step.__self__.model
        state = [*self.model.buffers(), *(p.grad for p in self.model.parameters())]
        before = [None if x is None else x.clone() for x in state]
        self.adds = any(p.grad is not None for p in self.model.parameters())
        self.loss = step()
        self.latest = self.model.scorer.latest
        self.gradients = [p.grad for p in self.model.parameters()]
        for x, value in zip(state, before, strict=True):
            if x is not None:
                x.copy_(value)

    def pool(self):
        return None

    def replay(self):
        for p, gradient in zip(self.model.parameters(), self.gradients, strict=True):
            p.grad = gradient if self.adds else None
        self.loss.copy_(self.step())
        for name, value in self.model.scorer.latest.items():
            if isinstance(value, torch.Tensor):
                self.latest[name].copy_(value)
        for p, gradient in zip(self.model.parameters(), self.gradients, strict=True):
            if p.grad is not None:
                gradient.copy_(p.grad)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """How many graphs there were, each once."""
    made = []
    record = captured._record

    def counted(step, pool, stream):
        if CUDA:
            graph, loss = record(step, pool, stream)
        else:
            graph = Rerun(step)
            loss = graph.loss
        made.append(graph)
        return graph, loss

    monkeypatch.setattr(captured, "_record", counted)
    if not CUDA:
        monkeypatch.setattr(captured, "_cuda_device", lambda model: torch.device("cpu"))
        monkeypatch.setattr(captured, "_stream", lambda device: None)
        monkeypatch.setattr(
            captured, "_warm_up", lambda step, times, stream: [step() for _ in range(times)]
        )
    return made


def build(**options):
    options = {"selection": "importance", "capacity": "static", **RAMP} | options
    return CGGRModel(models.build("llama"), **options).to(DEVICE)


def batch_of(seed):
    ids = models.token_ids(4, 16, seed=seed).to(DEVICE)
    return {"input_ids": ids, "labels": ids.clone()}


def gradients(module):
    return [p.grad.clone() for p in module.parameters()]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def assert_same_metrics(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        wanted = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
        assert actual[name] == wanted, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    plain, replayed = build(), build()
    enable_checkpointing(replayed.model, reentrant)
    step, batch = CapturedStep(replayed), batch_of(0)
    for _ in range(2):
        loss = plain(**batch)
        loss.backward()
        assert_same([step(**batch)], [loss.detach()])
        assert_same(gradients(replayed), gradients(plain))
        for module in (plain, replayed):
            module.zero_grad()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("options", [{}, {"split": "sequence"}], ids=["token", "sequence"])
def test_a_run_is_that_of_eager_steps(options, micro_batches, graphs):
    eager, replayed = build(**options), build(**options)
    step = CapturedStep(replayed)
    levels = set()
    for number in range(10):  # over the schedule, from everything to the final capacity
        want, got = [], []
        for part in range(micro_batches):
            batch = batch_of(3 * number + part)
            loss = eager(**batch)
            loss.backward()
            want.append(loss.detach())
            got.append(step(**batch))
        levels.add(replayed.scorer.level)
        assert_same(got, want)
        assert_same(gradients(replayed), gradients(eager))
        assert_same_metrics(replayed.get_metrics(), eager.get_metrics())
        for module in (eager, replayed):
            with torch.no_grad():
                for p in module.parameters():
                    p -= 0.01 * p.grad
            module.zero_grad()
            module.step()
    assert len(levels) >= 3
    assert len(graphs) == len(levels) * (1 if micro_batches == 1 else 2)
    assert torch.equal(replayed.scorer.draw_count, eager.scorer.draw_count)


def test_gradients_of_others_are_added_to():
    eager, replayed = build(), build()
    step = CapturedStep(replayed)
    step(**batch_of(0))
    replayed.zero_grad()
    eager.scorer.draw_count += 1
    for module in (eager, replayed):
        module(**batch_of(1)).backward()
    frozen = next(replayed.parameters())
    frozen.grad = next(eager.parameters()).grad = None
    eager(**batch_of(2)).backward()
    step(**batch_of(2))
    assert_same(gradients(replayed), gradients(eager))


def test_the_loss_that_was_returned_stays():
    step = CapturedStep(build())
    first = step(**batch_of(0))
    value = first.item()
    second = step(**batch_of(1))
    assert first.item() == value != second.item()
    assert not first.requires_grad


def test_a_capture_leaves_no_trace():
    module = build()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    mine = torch.ones_like(next(module.parameters()))
    next(module.parameters()).grad = mine
    rng = torch.get_rng_state()
    step = CapturedStep(module)
    with pytest.raises(ZeroDivisionError):
        CapturedStep(module, backward=lambda loss: 1 / 0)(**batch_of(0))
    assert torch.equal(torch.get_rng_state(), rng)
    assert next(module.parameters()).grad is mine
    assert module.get_metrics() == {}
    step(**batch_of(0))
    before["scorer.draw_count"] += 1
    for name, x in module.state_dict().items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("scaled", [False, True])
def test_autocast_and_a_scaler(scaled, graphs):
    dtype = torch.float16 if scaled else torch.bfloat16
    results = []
    for replayed in (False, True):
        module = build()
        scaler = torch.amp.GradScaler(DEVICE, init_scale=64.0, enabled=scaled)
        step = CapturedStep(module, backward=functools.partial(backward, scaler))
        with torch.autocast(DEVICE, dtype=dtype):
            for seed in range(3):
                module.zero_grad()
                if replayed:
                    loss = step(**batch_of(seed))
                else:
                    loss = module(**batch_of(seed))
                    with torch.autocast(DEVICE, enabled=False):
                        backward(scaler, loss)
                with torch.no_grad():  # the next step is to see other weights
                    for p in module.parameters():
                        p -= 0.1 * p.grad / scaler.get_scale()
                torch.clear_autocast_cache()
        results.append([loss.detach(), *gradients(module)])
    assert len(graphs) == 1
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    if CUDA:  # where the step asks for the state of autocast on a CUDA device
        step(**batch_of(9))
        assert len(graphs) == 3  # another precision; gradients are there


def backward(scaler, loss):
    scaler.scale(loss).backward()


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_items_of_all_micro_batches(kind):
    eager, replayed = build(), build()
    step = CapturedStep(replayed)
    for seed in range(3):
        number = 100 + seed
        given = number if kind == "number" else torch.tensor(number, device=DEVICE)
        want = eager(**batch_of(seed), num_items_in_batch=number)
        got = step(**batch_of(seed), num_items_in_batch=given)
        replayed.zero_grad()
        assert got.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"labels": torch.zeros(3, 16, dtype=torch.int64)},
            ValueError,
            r"^labels must be torch.int64 of shape \(4, 16\) as in .*, got .* shape \(3, 16\)\.$",
        ),
        (
            {"labels": torch.zeros(4, 16, dtype=torch.int32)},
            ValueError,
            "^labels must be torch.int64 .* got torch.int32",
        ),
        (
            {"attention_mask": torch.ones(4, 16)},
            ValueError,
            r"^inputs must be those .*, \['input_ids', 'labels'\], got \['attention_mask', .*\]\.$",
        ),
        ({"labels": [[1]]}, TypeError, r"^labels must be a tensor as in the first call, got \[\["),
        ({"labels": None}, ValueError, "^labels is None: without labels there is no loss"),
        (
            {"attention_mask": {"a": torch.ones(4, 16)}},
            ValueError,
            "^inputs must be those of the first call",
        ),
    ],
)
def test_other_inputs_than_at_first_are_refused(change, error, message):
    step = CapturedStep(build())
    batch = batch_of(0)
    want = step(**batch)
    change = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in change.items()}
    with pytest.raises(error, match=message):
        step(**batch | change)
    step.model.zero_grad()
    step.model.scorer.draw_count.zero_()
    assert torch.equal(step(**batch), want)


def test_constants_are_those_of_the_first_call():
    # The sequence split passes them on to the model.
    step = CapturedStep(build(split="sequence"))
    step(**batch_of(0), use_cache=False)
    step(**batch_of(0), use_cache=False)
    message = "^use_cache must be False as in the first call, got True"
    with pytest.raises(ValueError, match=message):
        step(**batch_of(0), use_cache=True)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"extra": {"a": torch.ones(4)}},
            TypeError,
            r"^extra must be a tensor or a constant, got a dict of them\.$",
        ),
        (
            {"num_items_in_batch": 9.0},
            TypeError,
            r"^num_items_in_batch must be an integer or a tensor, got 9\.0\.$",
        ),
        (
            {"inputs_embeds": torch.ones(4, 16, 32, requires_grad=True)},
            ValueError,
            r"^inputs_embeds must not require a gradient, which it would not get: detach it\.$",
        ),
    ],
)
def test_inputs_that_no_graph_can_take(given, error, message):
    step = CapturedStep(build())
    with pytest.raises(error, match=message):
        step(**batch_of(0), **given)
    assert step(**batch_of(0)).isfinite()


def test_the_shapes_stay_over_the_levels():
    step = CapturedStep(build())
    step(**batch_of(0))
    step.model.set_step(8)
    with pytest.raises(ValueError, match=r"must be torch.int64 of shape \(4, 16\) as in the first"):
        step(**{name: x[:2] for name, x in batch_of(0).items()})
    step(**batch_of(0))


def test_what_autocast_converted_is_not_found_by_a_graph(monkeypatch):
    # A graph that found it would read the weights of its warm-up for ever.
    module = build()
    step = CapturedStep(module)
    record, casts = captured._record, []
    weight = module.model.model.layers[1].mlp.up_proj.weight

    def watched(run, pool, stream):
        seen = set()
        with Casts(weight, seen):
            result = record(run, pool, stream)
        casts.append(len(seen))
        return result

    monkeypatch.setattr(captured, "_record", watched)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        step(**batch_of(0))
        step(**batch_of(1))
    assert casts == [2, 2]  # in either pass, of either graph


class Casts(TorchDispatchMode):
    """Notes casts of a weight: those with a gradient, and those without."""

    def __init__(self, weight, seen):
        super().__init__()
        self.weight, self.seen = weight, seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() == self.weight.data_ptr():
            self.seen.add(torch.is_grad_enabled())
        return func(*args, **(kwargs or {}))


def test_hooks_of_gradients_are_refused():
    module = build()
    name, parameter = next(iter(module.named_parameters()))
    parameter.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=f"^{re.escape(name)} has a hook after its gradient"):
        CapturedStep(module)


def test_a_first_call_that_failed_is_forgotten():
    step = CapturedStep(build())
    with contextlib.suppress(ValueError):
        step(**batch_of(0) | {"labels": torch.zeros(3, 16, dtype=torch.int64, device=DEVICE)})
    assert step(**batch_of(0)).isfinite()


def test_inputs_of_the_host():
    step = CapturedStep(build())
    losses = [step(**{name: x.cpu() for name, x in batch_of(seed).items()}) for seed in (0, 1)]
    other = CapturedStep(build())
    assert_same(losses, [other(**batch_of(seed)) for seed in (0, 1)])


def test_what_cannot_be_captured():
    with pytest.raises(TypeError, match=r"^model must be a CGGRModel, got Linear\.$"):
        CapturedStep(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^the capacity of model must be 'static' .* 'exact'\.$"):
        CapturedStep(build(capacity="exact"))
    with pytest.raises(ValueError, match=r"^warm_up must be at least 1, got 0\.$"):
        CapturedStep(build(), warm_up=0)
    step = CapturedStep(build())
    step.model.eval()
    with pytest.raises(ValueError, match=r"^model is in eval mode, .*\.$"):
        step(**batch_of(0))


def test_a_model_of_another_device(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"must be on one CUDA device .* got cpu\.$"):
        CapturedStep(build().cpu())
