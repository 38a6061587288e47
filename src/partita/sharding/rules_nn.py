"""Rules of layers: attention, normalisation, pooling, resampling, recurrent cells and sequences."""

from __future__ import annotations

from partita.graph import Ref, Size
from partita.sharding.call import Call, Refusal, Ruling, labels, term, whole
from partita.sharding.registry import define, rule_for


@rule_for("scaled_dot_product_attention")
def attention(call: Call) -> Ruling:
    """Batch and heads run along; queries too, without the causal mask."""
    grouped = bool(call.number(99, name="enable_gqa"))
    query = "[s]" if call.number(5, name="is_causal") else "s"
    masked = isinstance(call.arg(3, None, name="attn_mask"), Ref)
    mask_dims = len(call.shape(3)) if masked else 0
    if grouped:
        mask = (
            ", " + " ".join(_ones(call, ["x..", "[h]", "[s]", "[t]"][-mask_dims:] if mask_dims < 4 else []))
            if masked
            else ""
        )
        if masked and mask_dims >= 4:
            mask = ", x.. [m] [s] [t]"
        return f"x.. [h] {query} [d], x.. [g] [t] [d], x.. [g] [t] [e]{mask} -> x.. [h] {query} [e]"
    mask = ""
    if masked:
        row = "1" if call.shape(3)[-2] == 1 and call.shape(0)[-2] != 1 else query
        mask = f", x.. {row} [t]" if mask_dims >= 2 else ", [t]"
    return f"x.. {query} [d], x.. [t] [d], x.. [t] [e]{mask} -> x.. {query} [e]"


def _ones(call: Call, names: list[str]) -> list[str]:
    return [n for n in names if n != "x.."]


@rule_for("layer_norm rms_norm native_layer_norm")
def layer_norm(call: Call) -> Ruling:
    """The normalised dims whole."""
    names = labels(len(call.shape(0)))
    count = len(call.numbers(1))
    dims = set(range(len(names) - count, len(names)))
    affine = term([f"[{n}]" for i, n in enumerate(names) if i in dims])
    side = whole(names, dims)
    out = side
    if call.op.target.startswith("aten.native"):
        kept = term([n if i not in dims else "1" for i, n in enumerate(names)])
        out = f"{side}, {kept}, {kept}"
    return f"{side}{f', {affine}' * (len(call.operands()) - 1)} -> {out}"


@rule_for("group_norm")
def group_norm(call: Call) -> Ruling:
    """Each sample alone; channels and space whole."""
    if len(call.shape(0)) < 2:
        return Refusal("an input without batch and channels")
    return f"b [c] [s..]{', [c]' * (len(call.operands()) - 1)} -> b [c] [s..]"


@rule_for("instance_norm")
def instance_norm(call: Call) -> Ruling:
    """Each sample and channel alone; running statistics are means over the batch."""
    if isinstance(call.arg(3), Ref) and call.number(5, name="use_input_stats"):
        return Refusal("its running statistics are means over the whole batch")
    return f"b c [s..]{', c' * (len(call.operands()) - 1)} -> b c [s..]"


@rule_for("batch_norm")
def batch_norm(call: Call) -> Ruling:
    """In training the statistics couple the batch; each channel alone. Otherwise element by element."""
    if len(call.shape(0)) < 2:
        return Refusal("an input without batch and channels")
    others = ", c" * (len(call.operands()) - 1)
    if call.number(5, name="training") and call.batch_norm == "exact":
        if isinstance(call.shape(0)[0], Size):
            return Refusal(
                "its statistics are over the whole batch (batch_norm='per_microbatch' allows each part its own)"
            )
        return f"[b] c [s..]{others} -> [b] c [s..]"
    return f"b c s..{others} -> b c s.."


@rule_for("_native_batch_norm_legit_no_training")
def batch_norm_eval(call: Call) -> Ruling:
    """Element by element, with two empty results."""
    return f"b c s..{', c' * (len(call.operands()) - 1)} -> b c s.., [e], [f]"


_POOLS = (
    "max_pool{}d max_pool{}d_with_indices avg_pool{}d adaptive_avg_pool{}d adaptive_max_pool{}d _adaptive_avg_pool{}d"
)
_PAIRS = ("with_indices", "adaptive_max")


def _pools() -> None:
    for n in (1, 2, 3):
        before = " ".join(f"[s{i}]" for i in range(n))
        after = " ".join(f"[o{i}]" for i in range(n))
        for name in _POOLS.format(*[n] * 6).split():
            if name in ("_adaptive_avg_pool1d",):
                continue
            results = f"x.. {after}, x.. {after}" if any(part in name for part in _PAIRS) else f"x.. {after}"
            define(name, f"x.. {before} -> {results}")
        for kind in {1: "upsample_linear upsample_nearest", 2: "upsample_bilinear upsample_nearest upsample_bicubic",
                     3: "upsample_trilinear upsample_nearest"}[n].split():  # fmt: skip
            define(f"{kind}{n}d", f"x.. {before} -> x.. {after}")
        define(f"_upsample_nearest_exact{n}d", f"x.. {before} -> x.. {after}")
    for kind in ("bilinear", "bicubic"):
        define(f"_upsample_{kind}2d_aa", "x.. [h] [w] -> x.. [i] [j]")


_pools()
define("grid_sampler grid_sampler_2d", "b c [h] [w], b [i] [j] [xy] -> b c [i] [j]")
define("grid_sampler_3d", "b c [d] [h] [w], b [i] [j] [k] [xyz] -> b c [i] [j] [k]")
define("affine_grid_generator", "b [i] [j] -> b [h..]".replace(" [h..]", " [h] [w] [xy]"))


@rule_for("lstm.input gru.input rnn_tanh.input rnn_relu.input")
def recurrent(call: Call) -> Ruling:
    """Each sequence alone; steps, layers and hidden units whole. Dropout between layers draws random numbers."""
    cells = call.op.target.startswith("aten.lstm")
    dropout = call.arg(5)
    if call.number(6) and isinstance(dropout, int | float) and dropout and call.number(4, 1) > 1:
        return Refusal("it draws dropout between its layers")
    batched = len(call.shape(0)) == 3
    if not batched:
        return Refusal("its input has no batch dim")
    order = "b [t]" if call.number(8) else "[t] b"
    states = 2 if cells else 1
    weights = len(call.operands()) - 1 - states
    given = call.operands()
    spoken = ", ".join(whole(labels(len(t.shape)), set(range(len(t.shape)))).replace("d", f"w{i}x")
                       for i, t in enumerate(given[1 + states :]))  # fmt: skip
    first = ", ".join(["[l] b [h]", "[l] b [m]"][:states])
    return f"{order} [i], {first}{', ' + spoken if weights else ''} -> {order} [o], {first}"


@rule_for("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def cell(call: Call) -> Ruling:
    """One step of each sequence; hidden units whole."""
    if len(call.shape(0)) != 2:
        return Refusal("its input has no batch dim")
    states = 2 if call.op.target.startswith("aten.lstm") else 1
    rest = call.operands()[1 + states :]
    weights = "".join(f", [g{i}] [k{i}]" if len(t.shape) == 2 else f", [g{i}]" for i, t in enumerate(rest))
    return f"b [i]{', b [h]' * states}{weights} -> {', '.join(['b [h]'] * states)}"
