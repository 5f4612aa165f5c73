"""Classes that are spread over processes: a head's weight, or logits, given as a DTensor.

*Vocabulary parallel*: the processes have the same tokens and some of the classes each. What their
classes add to a token's statistics, six numbers, is gathered from all; every process joins them in
the same order, and so selects the same tokens. One collective scores; the loss needs no other, and
its backward pass sums the gradient of the hidden states: the second.

*Sharded parameters* (FSDP2, or replicated ones): every process has tokens of its own. The weight is
gathered, and its gradient averaged over the processes, as for all other parameters.

Shapes: ``N`` tokens, of which ``R`` rows are selected; ``D`` hidden size, ``V`` classes of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat.torch as xp
import torch
import torch.distributed as dist
from torch import Tensor

from cggr.spec.statistics import VocabularySums, join_vocabulary_sums, statistics_of_sums
from cggr.torch.dispatch import Implementation
from cggr.torch.selected import Scored, SelectedRows

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class VocabularyShard(NamedTuple):
    """The classes that this process has.

    Attributes:
        group: The processes that have all of them together, the same tokens each.
        first: Number of this process's first class.
        n_classes: V.
    """

    group: dist.ProcessGroup
    first: int
    n_classes: int


class LocalHead(NamedTuple):
    """A linear head as plain tensors of this process: all classes, if there is no shard."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    shard: VocabularyShard | None


def is_dtensor(x: Any) -> bool:
    """Whether `x` is a DTensor."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def local_logits(logits: Tensor) -> tuple[Tensor, VocabularyShard | None]:
    """This process's logits, and which classes they are.

    Raises:
        ValueError: They are a DTensor that is spread over more than its classes.
    """
    if not is_dtensor(logits):
        return logits, None
    spread: Any = logits
    sharded = [i for i, place in enumerate(spread.placements) if not place.is_replicate()]
    if not sharded:
        return spread.to_local(), None
    if len(sharded) > 1 or not spread.placements[sharded[0]].is_shard(logits.dim() - 1):
        raise ValueError(
            f"logits that are a DTensor must be sharded over their classes, "
            f"Shard({logits.dim() - 1}) on one mesh dimension, or replicated; got placements "
            f"{spread.placements}."
        )
    shard = _shard(spread.device_mesh, sharded[0], logits.shape[-1])
    return spread.to_local(), shard


def local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_parallel: str | int | None
) -> LocalHead:
    """The head on this process.

    Args:
        hidden: ``(..., D)``; as a DTensor, it is first brought to every process whole.
        weight: ``(V, D)``, a DTensor or not.
        bias: ``(V,)``, spread as `weight` is.
        vocab_parallel: The mesh dimension, by name or number, over whose processes the tokens are
            the same and the classes are not.

    Raises:
        TypeError: `weight` and `bias` are not both DTensors, or neither.
        ValueError: There is no such mesh dimension, or `weight` is not sharded over its classes on
            it, or `bias` is spread otherwise.
    """
    if is_dtensor(hidden):
        hidden = _whole(hidden)
    if not is_dtensor(weight):
        if vocab_parallel is not None:
            raise ValueError(
                f"vocab_parallel={vocab_parallel!r} needs a weight that is a DTensor, such as "
                f"DTensor.from_local(weight, mesh, [Shard(0)]); got a plain tensor."
            )
        if bias is not None and is_dtensor(bias):
            raise TypeError("bias must be a plain tensor, as weight is; got a DTensor.")
        return LocalHead(hidden, weight, bias, None)
    spread: Any = weight
    spread_bias: Any = bias
    if bias is not None:
        if not is_dtensor(bias):
            raise TypeError("bias must be a DTensor, as weight is; got a plain tensor.")
        if (spread_bias.device_mesh, spread_bias.placements) != (
            spread.device_mesh,
            spread.placements,
        ):
            raise ValueError(
                f"bias must be spread as weight is, {spread.placements} on {spread.device_mesh}; "
                f"got {spread_bias.placements} on {spread_bias.device_mesh}."
            )
    shard, kept = None, None
    if vocab_parallel is not None:
        kept = _mesh_dimension(spread.device_mesh, vocab_parallel)
        if not spread.placements[kept].is_shard(0):
            raise ValueError(
                f"weight must be sharded over its classes, Shard(0), on mesh dimension "
                f"vocab_parallel={vocab_parallel!r}; got placements {spread.placements}."
            )
        shard = _shard(spread.device_mesh, kept, weight.shape[0])
    weight = _Gathered.apply(spread, kept, hidden.dtype)
    bias = None if bias is None else _Gathered.apply(spread_bias, kept, hidden.dtype)
    return LocalHead(hidden, weight, bias, shard)


def _whole(hidden: Tensor) -> Tensor:
    from torch.distributed.tensor import Replicate

    spread: Any = hidden
    places = [Replicate()] * spread.device_mesh.ndim
    return spread.redistribute(placements=places).to_local()


def _mesh_dimension(mesh: Any, dimension: str | int) -> int:
    names = mesh.mesh_dim_names or ()
    if isinstance(dimension, str) and dimension in names:
        return names.index(dimension)
    if isinstance(dimension, int) and 0 <= dimension < mesh.ndim:
        return dimension
    raise ValueError(
        f"vocab_parallel must be a dimension of weight's mesh, one of "
        f"{', '.join(map(repr, [*names, *range(mesh.ndim)]))}, got {dimension!r}."
    )


def _shard(mesh: Any, dimension: int, n_classes: int) -> VocabularyShard:
    """Classes are dealt as ``torch.chunk`` does: as many to each, fewer to the last."""
    n_ranks = mesh.size(dimension)
    each = -(-n_classes // n_ranks)
    if each * (n_ranks - 1) >= n_classes:
        raise ValueError(
            f"{n_classes} classes in parts of {each} leave none for the last of {n_ranks} "
            f"processes: shard them over fewer."
        )
    return VocabularyShard(
        mesh.get_group(dimension), mesh.get_local_rank(dimension) * each, n_classes
    )


class _Gathered(torch.autograd.Function):
    """A DTensor on this process, whole but for the mesh dimension `kept`.

    Gathered in `dtype`. On the other mesh dimensions processes have other tokens: the gradient is
    averaged over them, in the DTensor's own dtype.
    """

    @staticmethod
    def forward(ctx: Any, spread: DTensor, kept: int | None, dtype: torch.dtype) -> Tensor:
        from torch.distributed.tensor import Partial, Replicate, Shard

        mesh = spread.device_mesh
        gathered = [i for i in range(mesh.ndim) if i != kept]
        ctx.spread, ctx.n_averaged = (mesh, spread.placements, spread.shape, spread.stride()), 1
        for i in gathered:
            ctx.n_averaged *= mesh.size(i)
        ctx.partial = [Partial() if i in gathered else Shard(0) for i in range(mesh.ndim)]
        ctx.dtype = spread.dtype
        places = [Replicate() if i in gathered else Shard(0) for i in range(mesh.ndim)]
        whole: Any = spread.detach().to(dtype)
        return whole.redistribute(placements=places).to_local()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None, None]:
        from torch.distributed.tensor import DTensor

        mesh, placements, shape, stride = ctx.spread
        mean = grad.to(ctx.dtype) / ctx.n_averaged
        spread = DTensor.from_local(
            mean, mesh, ctx.partial, run_check=False, shape=shape, stride=stride
        )
        return spread.redistribute(placements=placements), None, None


class _SummedGradient(torch.autograd.Function):
    """`x` itself; of its gradient each process has what its classes give, and gets the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def on_shard(operations: Implementation, shard: VocabularyShard | None) -> Implementation:
    """The operations over all classes, where logits and heads are those of this process.

    They take and return what they do for all classes; targets are classes of all.
    """
    if shard is None:
        return operations

    def statistics(
        sums: Callable[[Tensor | None], Tensor], targets: Tensor | None, shape: Any, ignored: int
    ) -> Scored:
        parts_6N = sums(None if targets is None else (targets - shard.first).reshape(-1))
        gathered = [torch.empty_like(parts_6N) for _ in range(dist.get_world_size(shard.group))]
        dist.all_gather(gathered, parts_6N, group=shard.group)
        parts = VocabularySums(*torch.stack(gathered, dim=1).reshape(6, -1, *shape).unbind())
        joined = join_vocabulary_sums(parts, xp=xp)
        found = statistics_of_sums(
            joined, targets, n_classes=shard.n_classes, ignore_index=ignored, xp=xp
        )
        softmax = None
        if found.nll is not None:
            softmax = torch.stack((found.confidence, joined.top, found.nll)).reshape(3, -1)
        return Scored(found, softmax)

    def token_statistics(logits: Tensor, targets: Tensor | None, ignore_index: int) -> Scored:
        def sums(local_N: Tensor | None) -> Tensor:
            return operations.vocabulary_sums(logits, local_N)

        return statistics(sums, targets, logits.shape[:-1], ignore_index)

    def linear_token_statistics(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor | None,
        ignore_index: int,
        logit_scale: float,
        softcap: float | None,
    ) -> Scored:
        def sums(local_N: Tensor | None) -> Tensor:
            head = (weight, bias, local_N, logit_scale, softcap)
            return operations.linear_vocabulary_sums(hidden, *head)

        return statistics(sums, targets, hidden.shape[:-1], ignore_index)

    def of_rows(
        rows: SelectedRows, n_local: int, ignore_index: int, scored: Scored
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax, targets as classes of this process or -1, and weights of the rows."""
        softmax_3R = scored.softmax
        assert softmax_3R is not None
        if rows.index_R is not None:
            softmax_3R = softmax_3R.index_select(1, rows.index_R)
        local_R = rows.label_R - shard.first
        is_here_R = (local_R >= 0) & (local_R < n_local)
        weight_R = (rows.label_R != ignore_index).to(softmax_3R.dtype)
        if rows.weight_R is not None:
            weight_R = weight_R * rows.weight_R
        return softmax_3R, torch.where(is_here_R, local_R, -1), weight_R

    def cross_entropy_sum(
        logits_NV: Tensor, rows: SelectedRows, ignore_index: int, scored: Scored | None
    ) -> Tensor:
        if scored is None:
            scored = token_statistics(logits_NV, rows.label_R, ignore_index)
        selected = of_rows(rows, logits_NV.shape[-1], ignore_index, scored)
        total = operations.part_cross_entropy_sum(rows.take(logits_NV), *selected)
        return total + rows.fault

    def linear_cross_entropy_sum(
        hidden_ND: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: SelectedRows,
        ignore_index: int,
        logit_scale: float,
        softcap: float | None,
        scored: Scored | None,
    ) -> Tensor:
        head = (logit_scale, softcap)
        if scored is None:
            scored = linear_token_statistics(
                hidden_ND, weight, bias, rows.label_R, ignore_index, *head
            )
        selected = of_rows(rows, weight.shape[0], ignore_index, scored)
        hidden_RD = _SummedGradient.apply(rows.take(hidden_ND), shard.group)
        total = operations.part_linear_cross_entropy_sum(hidden_RD, weight, bias, *selected, *head)
        return total + rows.fault

    return operations._replace(
        token_statistics=token_statistics,
        linear_token_statistics=linear_token_statistics,
        cross_entropy_sum=cross_entropy_sum,
        linear_cross_entropy_sum=linear_cross_entropy_sum,
    )
