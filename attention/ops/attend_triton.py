"""`attend` by the Triton kernels: whether they can, the plan of a call, the launches.

Legend of shapes: B examples, H query heads, G key heads, r = H / G, Nq queries, Nk keys, D and Dv head widths.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attention.kernels import attend as kernels
from attention.kernels.configs import Config, Kernel, Kind, architecture, find_config
from attention.kernels.plan import Plan
from attention.lifetimes import Lifetimes
from attention.ops.attend_operands import Gradients, Operands, empty_heads_last, heads_last, row_terms

WIDEST = 256  # head
FARTHEST = 2**23  # elements from row to row: inside a tile the kernels count in 32 bits
REMEMBERED = 4  # plans of the same births: with other deaths, times, or contents
TYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2_E = math.log2(math.e)


def why_not(q: Tensor, v: Tensor) -> str | None:
    """What keeps the kernels from taking these queries and values; None: nothing."""
    widest = max(q.shape[-1], v.shape[-1])
    if q.dtype not in TYPES:
        return f"the Triton kernels take float32, bfloat16 or float16, got {q.dtype}"
    if widest > WIDEST:
        return f"the Triton kernels take heads up to {WIDEST} wide, got {widest}"
    if not q.is_cuda and not interpreted():
        return (
            f"the Triton kernels run on CUDA devices, got {q.device} "
            "(with TRITON_INTERPRET=1 in the environment from the start they run on a CPU, slowly)"
        )
    return None


def interpreted() -> bool:
    """Whether the kernels were imported to run in Triton's interpreter."""
    return not isinstance(kernels.attend_forward, triton.runtime.JITFunction)


def attend_forward(x: Operands, life: Lifetimes, time: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attend`, as `attend_torch.attend_forward`."""
    out = empty_heads_last(x.q, x.v.shape[-1])
    lse = torch.empty(x.q.shape[:3], dtype=torch.float32, device=x.q.device)
    if lse.numel() == 0 or x.k.shape[2] == 0:
        return out.zero_(), heads_last(lse.fill_(-torch.inf))
    call = _Call(x, life, time)
    target = call.writable(out)
    call.over_queries(kernels.attend_forward, "forward", Out=target, Lse=lse, scale2=x.scale * LOG2_E, **_o(target))
    return _written(out, target), heads_last(lse)


def attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    x: Operands,
    life: Lifetimes,
    time: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wants_bias: bool = True,
    fixed: int = 0,
) -> Gradients:
    """Gradients of `attend` in all its operands, as `attend_torch.attend_backward`."""
    if lse.numel() == 0 or x.k.shape[2] == 0:
        grads = Gradients.empty(x, wants_bias, fixed)
        for grad in grads.given:
            grad.zero_()
        return grads
    grads = Gradients.empty(x, wants_bias)
    call = _Call(x, life, time)
    delta, lse = row_terms(dout, dlse, out, lse, x.wide)
    dout = call.readable(dout)
    rows = {"Dout": dout, "Lse": lse.contiguous(), "Delta": delta.contiguous(), "scale": x.scale, **_o(dout)}
    dtau = None if x.tau is None else torch.empty_like(delta, memory_format=torch.contiguous_format)
    dq, dk, dv = (call.writable(t) for t in (grads.q, grads.k, grads.v))
    call.over_queries(
        kernels.attend_query_gradient,
        "query_gradient",
        Dq=dq,
        Dtau=call.or_dummy(dtau),
        **rows,
        **_strides("d", "bhn", dq),
    )
    dbias, du = call.over_keys(rows, dk, dv)
    for mine, theirs in ((grads.q, dq), (grads.k, dk), (grads.v, dv)):
        _written(mine, theirs)
    wanted = heads_last(grads.k[..., : x.k.shape[-1] - fixed])  # the kernels know no columns without gradient
    return Gradients(grads.q, wanted, grads.v, dbias if wants_bias else None, du, dtau)


class _Call:
    """One call: its operands as the kernels read them, its plan, its launches."""

    def __init__(self, x: Operands, life: Lifetimes, time: Tensor | None) -> None:
        self.x = x
        (self.batch, self.heads, self.num_queries, self.dim), (self.kv_heads, self.num_keys) = x.q.shape, x.k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.plan = find_plan(life, time, self.kv_heads, self.num_queries, self.num_keys, x.q.device)
        self.q, self.k, self.v = map(self.readable, (x.q, x.k, x.v))
        self.birth, self.death, self.order = map(self._of_keys, (self.plan.birth, self.plan.death, self.plan.order))
        self.time = self.plan.time.expand(self.batch, self.heads, -1)
        largest = torch.finfo(torch.float32).max
        self.bias = None if x.bias is None else self._sorted(x.bias).contiguous()
        # tau = -inf opens the gate whatever u, and inf - inf is no number.
        self.u = None if x.u is None else self._sorted(x.u).clamp(-largest, largest).contiguous()
        self.tau = None if x.tau is None else x.tau.contiguous()

    def readable(self, t: Tensor) -> Tensor:
        """With dense rows; in the interpreter, whose products of bfloat16 are wrong, as float32."""
        if t.dtype == torch.bfloat16 and interpreted():
            t = t.float()
        return t if t.stride(-1) == 1 and t.stride(-2) <= FARTHEST else t.contiguous()

    def writable(self, t: Tensor) -> Tensor:
        """`t`, or where the interpreter cannot write its type, a float32 place for it."""
        return t.float() if t.dtype == torch.bfloat16 and interpreted() else t

    def or_dummy(self, t: Tensor | None) -> Tensor:
        """What stands for an operand that is not there."""
        return self.birth if t is None else t

    def over_queries(self, kernel: Any, name: Kernel, **arguments: Any) -> None:
        """Launch the kernel on every tile of queries of every head."""
        config = self._config(name)
        runs = self.plan.query_runs(config.queries, config.keys)
        tiles = runs.shape[3]
        runs = runs.expand(self.batch, self.kv_heads, self.group, *runs.shape[3:])
        k, v = self._sorted(self.k), self._sorted(self.v)
        self._launch(
            kernel,
            tiles * self.batch * self.heads,
            config,
            **self._common(k, v, runs),
            **arguments,
            tiles=tiles,
            heads=self.heads,
            generations=self.plan.generations,
        )

    def over_keys(self, rows: dict[str, Any], dk: Tensor, dv: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Fill dk and dv, and return those of bias and u [B, G, Nk]."""
        config = self._config("key_gradient")
        work = self.plan.key_tiles(config.queries, config.keys, batch=self.batch, heads=self.heads)
        shape = (self.batch, self.kv_heads)
        runs = work.runs.expand(*shape, self.group, -1, -1)
        tiles, items = (t.expand(*shape, -1, -1) for t in (work.tiles, work.items))
        dbias, du = (None if t is None else self._float(*shape, self.num_keys) for t in (self.bias, self.u))
        partials = (math.prod(shape) * work.partials, config.keys)
        targets = {
            "Order": self.order,
            "Tiles": tiles,
            "PartialK": self._float(*partials, _padded(self.dim)),
            "PartialV": self._float(*partials, _padded(self.v.shape[-1])),
            "PartialBias": self._float(*partials),
            "PartialU": self._float(*partials),
            "Dk": dk,
            "Dv": dv,
            "Dbias": self.or_dummy(dbias),
            "Du": self.or_dummy(du),
            "kv_heads": self.kv_heads,
            "num_keys": self.num_keys,
            "partials": work.partials,
            "tiles": tiles.shape[2],
            **_strides("c", "bg", tiles),
            **_strides("dk", "bgn", dk),
            **_strides("dv", "bgn", dv),
        }
        common = self._common(self.k, self.v, runs)
        self._launch(
            kernels.attend_key_gradient,
            items.shape[2] * math.prod(shape),
            config,
            **common,
            **rows,
            **targets,
            **_strides("i", "bg", items),
            Items=items,
            items=items.shape[2],
        )
        if work.partials:
            names = ("stride_lb", "stride_lg", "KEYS", "DIM", "D", "VDIM", "DV", "HAS_BIAS", "HAS_GATE")
            common |= self._sides(config)
            kernels.attend_sum_segments[(tiles.shape[2] * math.prod(shape),)](
                **targets, **{name: common[name] for name in names}, num_warps=16
            )
        return dbias, du

    def _common(self, k: Tensor, v: Tensor, runs: Tensor) -> dict[str, Any]:
        """Arguments that the three kernels share."""
        bias, u = self.or_dummy(self.bias), self.or_dummy(self.u)
        return {
            "Q": self.q,
            "K": k,
            "V": v,
            "Birth": self.birth,
            "Death": self.death,
            "Time": self.time,
            "Runs": runs,
            "Bias": bias,
            "U": u,
            "Tau": self.or_dummy(self.tau),
            "group": self.group,
            "num_queries": self.num_queries,
            "DIM": self.dim,
            "D": _padded(self.dim),
            "VDIM": v.shape[-1],
            "DV": _padded(v.shape[-1]),
            "HAS_BIAS": self.bias is not None,
            "HAS_GATE": self.u is not None,
            **_strides("q", "bhn", self.q),
            **_strides("k", "bgn", k),
            **_strides("v", "bgn", v),
            **_strides("l", "bg", self.birth),
            **_strides("t", "bh", self.time),
            **_strides("r", "bgr", runs),
            **_strides("b", "bg", bias),
            **_strides("u", "bg", u),
        }

    def _config(self, name: Kernel) -> Config:
        kind: Kind = "single" if self.q.dtype == torch.float32 else "half"
        width = max(_padded(self.dim), _padded(self.v.shape[-1]))
        return find_config(name, kind, width, gated=self.u is not None, on=architecture(self.q.device))

    def _sides(self, config: Config) -> dict[str, Any]:
        return {"QUERIES": config.queries, "KEYS": config.keys}

    def _launch(self, kernel: Any, programs: int, config: Config, **arguments: Any) -> None:
        with torch.cuda.device_of(self.q):
            kernel[(programs,)](
                **arguments,
                **self._sides(config),
                IEEE=self.q.dtype == torch.float32,
                TWO_LOOPS=config.two_loops,
                num_warps=config.warps,
                num_stages=config.stages,
                enable_fp_fusion=True,  # Triton 3.10 changes its default
            )

    def _of_keys(self, t: Tensor) -> Tensor:
        return t.expand(self.batch, self.kv_heads, -1)

    def _sorted(self, t: Tensor) -> Tensor:
        """[B, G, Nk, ...] in the plan's order."""
        if not self.plan.sorted:
            return t
        order = self.order.long()
        return t.gather(2, order if t.dim() == 3 else order[..., None].expand(-1, -1, -1, t.shape[3]))

    def _float(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)


def find_plan(
    life: Lifetimes, time: Tensor | None, kv_heads: int, num_queries: int, num_keys: int, device: torch.device
) -> Plan:
    """The plan of these lifetimes: the one made before, while the very same tensors live unchanged."""
    given = (life.birth, life.death, life.generation, time)
    tensors = [t for t in given if t is not None]
    if any(t.is_inference() for t in tensors):  # nothing tells whether they changed
        return _new_plan(life, time, kv_heads, num_queries, num_keys, device)
    key = (kv_heads, num_queries, num_keys, *(-1 if t is None else t._version for t in given))
    known = _plans.setdefault(life.birth, [])
    for known_key, references, plan in known:
        if known_key == key and all(r() is t for r, t in zip(references, tensors, strict=True)):
            return plan
    plan = _new_plan(life, time, kv_heads, num_queries, num_keys, device)
    known.insert(0, (key, [weakref.ref(t) for t in tensors], plan))
    del known[REMEMBERED:]
    return plan


def _new_plan(
    life: Lifetimes, time: Tensor | None, kv_heads: int, num_queries: int, num_keys: int, device: torch.device
) -> Plan:
    if time is None:
        time = torch.arange(num_queries, dtype=torch.int32, device=device)
    return Plan(life, time, kv_heads=kv_heads, num_keys=num_keys)


# By the identity of the births, and for as long as they live.
_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _strides(name: str, axes: str, t: Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": t.stride(number) for number, axis in enumerate(axes)}


def _o(t: Tensor) -> dict[str, int]:
    return _strides("o", "bhn", t)


def _written(target: Tensor, source: Tensor) -> Tensor:
    return target if source is target else target.copy_(source)
