"""Log-probability and entropy of given tokens under softmax(logits / temperature), one row of
logits a token.

    m = max_j l_j      d_j = (l_j - m) (1 / T)      s = sum_j exp(d_j)      p_j = exp(d_j) / s
    log_prob = d_id - ln s
    entropy  = ln s - (sum_j exp(d_j) d_j) / s      (nats)
    lse      = (m, ln s), in two parts: log-sum-exp of logits / T is m / T + ln s, and adding them
               would lose digits of every p_j where logits are large

    d log_prob / d l_j = (1[j = id] - p_j) / T
    d entropy  / d l_j = -p_j (ln p_j + entropy) / T

1 / T is rounded to fp32 once. A logit of -inf has p = 0 and takes no part in the entropy. Below d =
-87.3, where exp(d) leaves the normal fp32 numbers, a backend may take it for 0.

From (hidden, weight) the logits are hidden @ weight.T, rounded to their dtype, a chunk of rows at a
time: [M, V] never exists. Backward makes each chunk again, overwrites it by its gradient and
multiplies that out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._operator import differentiable, operator
from .backends import compiled, pointer, select, strided
from .numerics import compute_dtype, sum_ref

# Backward reads and writes the fp32 gradient of the weight once a chunk: chunks of some hundred
# rows or more keep that below the time of the matrix products, and 256 MiB hold 800 rows of a
# vocabulary of 152k in bf16.
CHUNK_BYTES = 256 << 20


class TokenLogProb(NamedTuple):
    """Both fp32, in the shape of ids."""

    log_prob: Tensor
    entropy: Tensor


def _tokens_ref(
    logits: Tensor, ids: Tensor, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log_prob, entropy, m, ln s [M] and the poison [M]: NaN where an id lies outside the
    vocabulary, else 1."""
    dtype, v = compute_dtype(logits), logits.shape[1]
    ignored = ids == ignore_index
    outside = ~ignored & ((ids < 0) | (ids >= v))
    poison = torch.ones(ids.shape, dtype=dtype, device=ids.device).masked_fill(outside, torch.nan)
    l_MV = logits.to(dtype).masked_fill(ignored[:, None], 0.0)
    m_M = l_MV.detach().amax(1)
    scale = torch.tensor(1.0 / temperature, dtype=dtype)
    d_MV = (l_MV - m_M[:, None]) * scale
    e_MV = d_MV.exp()
    s_M = sum_ref(e_MV)
    log_s = s_M.log()
    entropy = log_s - sum_ref(e_MV * d_MV.masked_fill(d_MV == -torch.inf, 0.0)) / s_M
    log_prob = d_MV.gather(1, ids.where(~ignored & ~outside, 0)[:, None])[:, 0] - log_s
    log_prob, entropy = (
        (value * poison).masked_fill(ignored, 0.0) for value in (log_prob, entropy)
    )
    return log_prob, entropy, m_M, log_s, poison


def token_log_prob_ref(
    logits: Tensor, ids: Tensor, *, temperature: float = 1.0, ignore_index: int = -100
) -> TokenLogProb:
    """The definition, in plain PyTorch on any device, differentiable; fp64 logits are computed in
    fp64.

    An id outside [0, V) other than ignore_index gives NaN here, as it does on a GPU.
    """
    rows = logits.reshape(-1, logits.shape[-1]).contiguous()
    log_prob, entropy, *_ = _tokens_ref(rows, ids.reshape(-1), temperature, ignore_index)
    return TokenLogProb(log_prob.view(ids.shape), entropy.view(ids.shape))


def token_log_prob_backward_ref(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    ignore_index: int,
    lse: Tensor,
    entropy: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient to logits [M, V] in their dtype: the two formulas of the docstring."""
    scale = torch.tensor(1.0 / temperature, dtype=torch.float32)
    ignored = (ids == ignore_index)[:, None]
    log_p = (logits.float() - lse[:, :1]) * scale - lse[:, 1:]
    p = log_p.exp()
    grad = torch.zeros_like(p)
    if grad_log_prob is not None:
        columns = torch.arange(logits.shape[1], device=ids.device)
        grad = grad_log_prob[:, None] * ((columns == ids[:, None]).float() - p)
    if grad_entropy is not None:
        grad = grad - grad_entropy[:, None] * p * (
            log_p.masked_fill(log_p == -torch.inf, 0.0) + entropy[:, None]
        )
    return (grad * scale).masked_fill(ignored, 0.0).to(logits.dtype)


def _ids_in_range(ids: Tensor, v: int, ignore_index: int) -> None:
    """CPU only, where looking costs nothing; elsewhere an id out of range yields NaN instead of a
    sync."""
    if ids.device.type == "cpu":
        outside = ids[(ids != ignore_index) & ((ids < 0) | (ids >= v))]
        if outside.numel() > 0:
            raise ValueError(
                f"ids must lie in [0, {v - 1}], the vocabulary, or be ignore_index "
                f"({ignore_index}); got {int(outside[0])}"
            )


def _empty_outputs(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log_prob and entropy [M], lse [M, 2], to be written."""
    shapes = ids.shape, ids.shape, (*ids.shape, 2)
    log_prob, entropy, lse = (ids.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return log_prob, entropy, lse


def _run_compiled(
    function: Callable[..., None],
    logits_MV: Tensor,
    ids_M: Tensor,
    *,
    ignore_index: int,
    **arguments: Any,
) -> None:
    """The compiled modules look at the ids of CPU tensors themselves; the message is the one all
    backends have."""
    try:
        function(ignore_index=ignore_index, **arguments)
    except ValueError:
        _ids_in_range(ids_M, logits_MV.shape[1], ignore_index)
        raise


def _forward(
    chosen: str,
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    ignore_index: int,
    log_prob: Tensor,
    entropy: Tensor,
    lse: Tensor,
) -> None:
    """Writes the last three. logits [M, V] addressable; the others contiguous."""
    if chosen == "ref":
        values = _tokens_ref(logits.contiguous(), ids, temperature, ignore_index)
        log_prob.copy_(values[0])
        entropy.copy_(values[1])
        lse.copy_(torch.stack(values[2:4], 1) * values[4][:, None])
    elif chosen == "triton":
        from . import triton_kernels

        triton_kernels.token_log_prob(
            logits, ids, temperature, ignore_index, log_prob, entropy, lse
        )
    else:
        module, where = compiled(chosen, logits)
        _run_compiled(
            module.token_log_prob,
            logits,
            ids,
            logits=strided(logits),
            ids=pointer(ids),
            temperature=temperature,
            ignore_index=ignore_index,
            log_prob=pointer(log_prob),
            entropy=pointer(entropy),
            lse=pointer(lse),
            M=logits.shape[0],
            V=logits.shape[1],
            **where,
        )


def _backward(
    chosen: str,
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    ignore_index: int,
    lse: Tensor,
    entropy: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logits: Tensor,
) -> None:
    """Writes grad_logits, which may be logits itself; contiguity as in _forward."""
    if chosen == "ref":
        rows = (logits, ids, temperature, ignore_index, lse, entropy, grad_log_prob, grad_entropy)
        grad_logits.copy_(token_log_prob_backward_ref(*rows))
    elif chosen == "triton":
        from . import triton_kernels

        triton_kernels.token_log_prob_backward(
            logits,
            ids,
            temperature,
            ignore_index,
            lse,
            entropy,
            grad_log_prob,
            grad_entropy,
            grad_logits,
        )
    else:
        module, where = compiled(chosen, logits)
        _run_compiled(
            module.token_log_prob_backward,
            logits,
            ids,
            logits=strided(logits),
            ids=pointer(ids),
            temperature=temperature,
            ignore_index=ignore_index,
            lse=pointer(lse),
            entropy=pointer(entropy),
            grad_log_prob=pointer(grad_log_prob),
            grad_entropy=pointer(grad_entropy),
            grad_logits=strided(grad_logits),
            M=logits.shape[0],
            V=logits.shape[1],
            **where,
        )


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _fake_token_log_prob(
    logits: Tensor, ids: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(ids)


@operator(
    "token_log_prob",
    "(Tensor logits, Tensor ids, float temperature, int ignore_index, str backend) -> (Tensor, "
    "Tensor, Tensor)",
    fake=_fake_token_log_prob,
)
def _token_log_prob(
    logits: Tensor, ids: Tensor, temperature: float, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [M, V], ids [M] -> log_prob [M], entropy [M], lse [M, 2]; the last carries no
    gradient."""
    chosen = select(backend, logits.device)
    if chosen != "cpu":  # which looks for itself
        _ids_in_range(ids, logits.shape[1], ignore_index)
    outputs = _empty_outputs(ids)
    if ids.numel() > 0:
        _forward(
            chosen,
            _checks.addressable(logits),
            ids.contiguous(),
            temperature,
            ignore_index,
            *outputs,
        )
    return outputs


def _fake_token_log_prob_backward(logits: Tensor, *others: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@operator(
    "token_log_prob_backward",
    "(Tensor logits, Tensor ids, float temperature, int ignore_index, Tensor lse, Tensor entropy, "
    "Tensor? grad_log_prob, Tensor? grad_entropy, str backend) -> Tensor",
    fake=_fake_token_log_prob_backward,
)
def _token_log_prob_backward(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    ignore_index: int,
    lse: Tensor,
    entropy: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    backend: str,
) -> Tensor:
    chosen = select(backend, logits.device)
    if chosen != "cpu":  # which looks for itself
        _ids_in_range(ids, logits.shape[1], ignore_index)
    grad_logits = logits.new_empty(logits.shape)
    if ids.numel() > 0:
        _backward(
            chosen,
            _checks.addressable(logits),
            ids.contiguous(),
            temperature,
            ignore_index,
            lse.contiguous(),
            entropy.contiguous(),
            _contiguous(grad_log_prob),
            _contiguous(grad_entropy),
            grad_logits,
        )
    return grad_logits


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, ids, *ctx.options = inputs
    _, entropy, lse = output
    ctx.save_for_backward(logits, ids, lse, entropy)
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple:
    logits, ids, lse, entropy = ctx.saved_tensors
    temperature, ignore_index, backend = ctx.options
    grad_logits = None
    if 0 in ctx.wanted and not (grad_log_prob is None and grad_entropy is None):
        grad_logits = _token_log_prob_backward(
            logits,
            ids,
            temperature,
            ignore_index,
            lse,
            entropy,
            grad_log_prob,
            grad_entropy,
            backend,
        )
    return grad_logits, None, None, None, None


differentiable("token_log_prob", setup_context=_setup_context, backward=_autograd, results=2)


def _chunk_buffer(hidden: Tensor, weight: Tensor, chunk_rows: int) -> Tensor:
    """The logits of one chunk, [rows, V]; chunk_rows 0 stands for what CHUNK_BYTES hold."""
    rows = chunk_rows or CHUNK_BYTES // (weight.shape[0] * weight.element_size())
    return torch.empty(
        min(max(rows, 1), hidden.shape[0]),
        weight.shape[0],
        dtype=weight.dtype,
        device=weight.device,
    )


def _chunks(hidden: Tensor, weight: Tensor, chunk_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits), in one buffer that the next chunk overwrites. Autocast is kept out by
    the callers."""
    if hidden.shape[0] == 0:
        return
    buffer = _chunk_buffer(hidden, weight, chunk_rows)
    for start in range(0, hidden.shape[0], buffer.shape[0]):
        part = slice(start, min(start + buffer.shape[0], hidden.shape[0]))
        logits = buffer[: part.stop - start]
        torch.mm(hidden[part], weight.t(), out=logits)
        yield part, logits


def _fake_hidden_token_log_prob(
    hidden: Tensor, weight: Tensor, ids: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(ids)


@operator(
    "hidden_token_log_prob",
    "(Tensor hidden, Tensor weight, Tensor ids, float temperature, int ignore_index, int "
    "chunk_rows, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_hidden_token_log_prob,
)
def _hidden_token_log_prob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    ignore_index: int,
    chunk_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [M, H], weight [V, H], ids [M]; outputs as of token_log_prob."""
    chosen = select(backend, hidden.device)
    _ids_in_range(ids, weight.shape[0], ignore_index)
    ids = ids.contiguous()
    outputs = _empty_outputs(ids)
    with torch.autocast(hidden.device.type, enabled=False):
        for part, logits in _chunks(hidden, weight, chunk_rows):
            _forward(
                chosen,
                logits,
                ids[part],
                temperature,
                ignore_index,
                *(out[part] for out in outputs),
            )
    return outputs


def _fake_hidden_token_log_prob_backward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    ignore_index: int,
    lse: Tensor,
    entropy: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
    chunk_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(hidden, weight, want_hidden, want_weight)


@operator(
    "hidden_token_log_prob_backward",
    "(Tensor hidden, Tensor weight, Tensor ids, float temperature, int ignore_index, Tensor lse, "
    "Tensor entropy, Tensor? grad_log_prob, Tensor? grad_entropy, bool want_hidden, bool "
    "want_weight, int chunk_rows, str backend) -> (Tensor, Tensor)",
    fake=_fake_hidden_token_log_prob_backward,
)
def _hidden_token_log_prob_backward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    ignore_index: int,
    lse: Tensor,
    entropy: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
    chunk_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients to hidden and weight, [0] for one that is not wanted: a schema cannot return an
    optional tensor.

    That of the weight is a sum over chunks in fp32, each chunk's product being rounded to the dtype
    of weight first.
    """
    chosen = select(backend, hidden.device)
    _ids_in_range(ids, weight.shape[0], ignore_index)
    ids, lse, entropy = ids.contiguous(), lse.contiguous(), entropy.contiguous()
    grad_log_prob, grad_entropy = _contiguous(grad_log_prob), _contiguous(grad_entropy)
    grad_hidden, grad_weight = _empty_gradients(hidden, weight, want_hidden, want_weight)
    exact = weight.dtype == torch.float32
    total = (
        grad_weight.zero_()
        if exact
        else torch.zeros(grad_weight.shape, dtype=torch.float32, device=weight.device)
    )
    with torch.autocast(hidden.device.type, enabled=False):
        for part, logits in _chunks(hidden, weight, chunk_rows):
            _backward(
                chosen,
                logits,
                ids[part],
                temperature,
                ignore_index,
                lse[part],
                entropy[part],
                None if grad_log_prob is None else grad_log_prob[part],
                None if grad_entropy is None else grad_entropy[part],
                logits,
            )
            if want_hidden:
                torch.mm(logits, weight, out=grad_hidden[part])
            if want_weight:
                # The zero gradient of an ignored row must not meet a NaN of its hidden state.
                counted = hidden[part].masked_fill((ids[part] == ignore_index)[:, None], 0.0)
                if exact:
                    total.addmm_(logits.t(), counted)
                else:
                    total.add_(torch.mm(logits.t(), counted, out=grad_weight))
    if not exact:
        grad_weight.copy_(total)
    return grad_hidden, grad_weight


def _empty_gradients(
    hidden: Tensor, weight: Tensor, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(
            hidden.shape if want_hidden else (0,), dtype=hidden.dtype, device=hidden.device
        ),
        torch.empty(
            weight.shape if want_weight else (0,), dtype=weight.dtype, device=weight.device
        ),
    )


def _setup_hidden_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, ids, *ctx.options = inputs
    _, entropy, lse = output
    ctx.save_for_backward(hidden, weight, ids, lse, entropy)
    ctx.set_materialize_grads(False)


def _hidden_autograd(
    ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple:
    hidden, weight, ids, lse, entropy = ctx.saved_tensors
    temperature, ignore_index, chunk_rows, backend = ctx.options
    want = 0 in ctx.wanted, 1 in ctx.wanted
    grads: list[Tensor | None] = [None, None]
    if any(want) and not (grad_log_prob is None and grad_entropy is None):
        both = _hidden_token_log_prob_backward(
            hidden,
            weight,
            ids,
            temperature,
            ignore_index,
            lse,
            entropy,
            grad_log_prob,
            grad_entropy,
            *want,
            chunk_rows,
            backend,
        )
        grads = [grad if wanted else None for grad, wanted in zip(both, want, strict=True)]
    return *grads, None, None, None, None, None


differentiable(
    "hidden_token_log_prob",
    setup_context=_setup_hidden_context,
    backward=_hidden_autograd,
    results=2,
)


def _check_ids(ids: Tensor, name: str, value: Tensor) -> None:
    _checks.tensor("ids", ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.shape != value.shape[:-1]:
        raise ValueError(
            f"ids must have the shape of {name} without its last dimension, "
            f"{list(value.shape[:-1])}; got {list(ids.shape)}"
        )
    _checks.same_device("ids", ids, name, value)


def token_log_prob(
    logits: Tensor | tuple[Tensor, Tensor],
    ids: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> TokenLogProb:
    """Log-probability of each id under softmax(logits / temperature), and the entropy of that
    distribution in nats.

    Both are differentiable, to logits or to (hidden, weight). Rollout and training call this same
    function, so logits with the same bits give the same log-prob: the on-policy ratio is exactly 1.

    Args:
        logits: [..., V] float32, bfloat16 or float16, -inf allowed; or a pair (hidden [..., H],
            weight [V, H]) of one dtype, for logits = hidden @ weight.T that are never held for more
            than a chunk of rows. Under autocast a hidden state is of the low dtype and the weight
            is not: give weight.to(hidden.dtype).
        ids: [...] int64 on the device of logits.
        temperature: > 0.
        ignore_index: where ids has this value, log_prob and entropy are 0 and so is the gradient;
            the row is not looked at.
        chunk_rows: rows of logits that exist at a time, for (hidden, weight) only; None: as many as
            256 MiB hold.
        backend: None picks one; a name is used or raises RuntimeError.

    Returns:
        log_prob and entropy, fp32 in the shape of ids. From logits a row's result depends on that
        row alone. From (hidden, weight) a matrix product comes first, in the dtype of both whatever
        autocast says, accumulated as torch does (fp32; on a GPU torch.backends.cuda.matmul decides
        about TF32 and reduced-precision sums) and rounded to that dtype: the same call gives the
        same bits, another number of rows in a chunk may differ by its rounding.

    Raises:
        ValueError or TypeError naming the argument. An id outside [0, V) that is not ignore_index
        raises on CPU tensors; on a GPU, where looking would stall the queue, the row's outputs and
        gradient are NaN.
    """
    pair = isinstance(logits, (tuple, list))
    if pair:
        if len(logits) != 2:
            raise ValueError(
                f"logits must be a tensor or a pair (hidden, weight), got {len(logits)} items"
            )
        name, (value, weight) = "hidden", logits
        _checks.tensor("weight", weight)
    else:
        name, value = "logits", logits
    _checks.samples(name, value)
    if pair:
        if weight.dim() != 2 or weight.shape[1] != value.shape[-1]:
            raise ValueError(
                f"weight must have shape [V, {value.shape[-1]}], got {list(weight.shape)}"
            )
        if weight.dtype != value.dtype:
            raise TypeError(
                f"weight must have the dtype of hidden, {value.dtype}; got {weight.dtype}"
            )
        _checks.same_device("weight", weight, "hidden", value)
    elif chunk_rows is not None:
        raise ValueError(f"chunk_rows is for (hidden, weight) only, got {chunk_rows} with logits")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if (weight.shape[0] if pair else value.shape[-1]) == 0:
        raise ValueError(
            f"{'weight' if pair else 'logits'} must have a vocabulary of at least 1, got 0"
        )
    _check_ids(ids, name, value)
    _checks.positive("temperature", temperature)
    options = float(temperature), ignore_index
    rows = value.reshape(ids.numel(), value.shape[-1])
    chosen = _checks.backend_name(backend)
    if pair:
        log_prob, entropy, _ = _hidden_token_log_prob(
            rows, weight, ids.reshape(-1), *options, chunk_rows or 0, chosen
        )
    else:
        log_prob, entropy, _ = _token_log_prob(rows, ids.reshape(-1), *options, chosen)
    return TokenLogProb(log_prob.view(ids.shape), entropy.view(ids.shape))
