"""Rules of ops over given dims: sums and means (divisible), extrema, sorting, scans, softmax (not along their dim)."""

from __future__ import annotations

from partita.graph import Symbol
from partita.sharding.call import Call, Refusal, Ruling, dims_of, labels, term, whole
from partita.sharding.registry import define, rule_for


def _kept(names: list[str], dims: set[int], keepdim: bool) -> str:
    if keepdim:
        return term(["1" if i in dims else n for i, n in enumerate(names)])
    return term([n for i, n in enumerate(names) if i not in dims])


def _reduced(call: Call, dims_at: int = 1, keep_at: int = 2) -> tuple[list[str], set[int], bool]:
    """Names of all dims, the dims that go away (all, where none are listed), and whether they stay as ones."""
    names = labels(len(call.shape(0)))
    listed = call.numbers(dims_at, name="dim")
    dims = dims_of(listed, len(names)) if listed else set(range(len(names)))
    return names, dims, bool(call.number(keep_at, name="keepdim"))


@rule_for("sum.default sum.dim_IntList nansum count_nonzero.default count_nonzero.dim_IntList")
def sums(call: Call) -> Ruling:
    """Divided, a sum is a sum of sums."""
    names, dims, keep = _reduced(call)
    if call.op.target.endswith("default") and "nansum" not in call.op.target:
        dims = set(range(len(names)))
    linear = " ; linear" if call.op.target.startswith("aten.sum") else ""
    return f"{term(names)} -> {_kept(names, dims, keep)}{linear}"


@rule_for("mean.default mean.dim")
def means(call: Call) -> Ruling:
    """Divided, a mean is a sum of weighted means."""
    names, dims, keep = _reduced(call)
    if call.op.target.endswith("default"):
        dims = set(range(len(names)))
    averaged = " ".join(names[d] for d in sorted(dims))
    return f"{term(names)} -> {_kept(names, dims, keep)}" + (f" ; mean {averaged}" if averaged else "") + " ; linear"


@rule_for("amax amin all.dims any.dims logsumexp nanmean aminmax")
def over_dims(call: Call) -> Ruling:
    """Each wants its dims whole."""
    names, dims, keep = _reduced(call)
    if call.op.target.startswith("aten.aminmax"):
        dim = call.arg(99, None, name="dim")
        dims = {dim % len(names)} if isinstance(dim, int) else set(range(len(names)))
        keep = bool(call.number(99, name="keepdim"))
        return f"{whole(names, dims)} -> {_kept(names, dims, keep)}, {_kept(names, dims, keep)}"
    return f"{whole(names, dims)} -> {_kept(names, dims, keep)}"


@rule_for(
    "max.default min.default all.default any.default prod.default median.default nanmedian.default equal "
    "std.default var.default"
)
def over_all(call: Call) -> Ruling:
    """All dims at once."""
    names = labels(len(call.shape(0)))
    return f"{whole(names, set(range(len(names))))} -> ()"


@rule_for("all.dim any.dim prod.dim_int argmax argmin")
def over_one(call: Call) -> Ruling:
    """One dim (argmax and argmin: all of them where none is given)."""
    names, dims, keep = _reduced(call)
    return f"{whole(names, dims)} -> {_kept(names, dims, keep)}"


@rule_for("max.dim min.dim median.dim nanmedian.dim mode")
def over_one_with_indices(call: Call) -> Ruling:
    """Values and where they stand."""
    names = labels(len(call.shape(0)))
    dims = dims_of((call.number(1, -1, name="dim"),), len(names))
    kept = _kept(names, dims, bool(call.number(2, name="keepdim")))
    return f"{whole(names, dims)} -> {kept}, {kept}"


@rule_for("kthvalue")
def kthvalue(call: Call) -> Ruling:
    """As ``over_one_with_indices``, the dim one place later."""
    names = labels(len(call.shape(0)))
    dims = dims_of((call.number(2, -1, name="dim"),), len(names))
    kept = _kept(names, dims, bool(call.number(3, name="keepdim")))
    return f"{whole(names, dims)} -> {kept}, {kept}"


@rule_for("std.dim var.dim std.correction var.correction var_mean.dim std_mean.dim var_mean.correction "
        "std_mean.correction "
          "var_mean.default std_mean.default")  # fmt: skip
def spread(call: Call) -> Ruling:
    """Variances want their dims whole."""
    *_, kind, overload = call.op.target.split(".")
    names = labels(len(call.shape(0)))
    listed = () if overload == "default" else call.numbers(1, name="dim")
    dims = dims_of(listed, len(names)) if listed else set(range(len(names)))
    keep = call.number(3, name="keepdim") if overload == "dim" else call.number(99, name="keepdim")
    out = _kept(names, dims, bool(keep))
    return f"{whole(names, dims)} -> {out}" + (f", {out}" if "mean" in kind else "")


@rule_for(
    "norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dtype norm.ScalarOpt_dim_dtype linalg_vector_norm frobenius_norm.dim"
)
def norms(call: Call) -> Ruling:
    """Vector norms over the listed dims, or all."""
    *_, kind, overload = call.op.target.split(".")
    names = labels(len(call.shape(0)))
    at = 1 if kind == "frobenius_norm" else 2
    listed = () if overload in ("Scalar", "ScalarOpt_dtype") else call.numbers(at, name="dim")
    dims = dims_of(listed, len(names)) if listed else set(range(len(names)))
    keep = False if overload in ("Scalar", "ScalarOpt_dtype") else bool(call.number(at + 1, name="keepdim"))
    return f"{whole(names, dims)} -> {_kept(names, dims, keep)}"


def _along(call: Call, at: int, default: int = -1, *, results: int = 1) -> str:
    names = labels(len(call.shape(0)))
    dims = dims_of((call.number(at, default, name="dim"),), len(names)) if names else set()
    return f"{whole(names, dims)} -> {', '.join([whole(names, dims)] * results)}"


@rule_for("softmax.int log_softmax.int _softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp")
def along(call: Call) -> Ruling:
    """One dim whole, the shape kept."""
    return _along(call, 1)


@rule_for("cummax cummin")
def scans(call: Call) -> Ruling:
    """Values and where they stand."""
    return _along(call, 1, results=2)


@rule_for("sort.default sort.stable topk argsort.default argsort.stable")
def sorting(call: Call) -> Ruling:
    """Values and indices along one dim; ``topk`` keeps k of them."""
    *_, kind, overload = call.op.target.split(".")
    if kind == "topk":
        return _along(call, 2, results=2)
    at = 2 if overload == "stable" and kind == "sort" else 1
    if overload == "stable":
        names = labels(len(call.shape(0)))
        value = call.arg(99, -1, name="dim") if kind == "argsort" else call.arg(at, -1, name="dim")
        dims = dims_of((value if isinstance(value, int) else -1,), len(names))
        return f"{whole(names, dims)} -> {', '.join([whole(names, dims)] * (2 if kind == 'sort' else 1))}"
    return _along(call, at, results=2 if kind == "sort" else 1)


@rule_for("renorm")
def renorm(call: Call) -> Ruling:
    """Every slice along one dim has its own norm."""
    names = labels(len(call.shape(0)))
    kept = call.number(2) % len(names)
    others = set(range(len(names))) - {kept}
    return f"{whole(names, others)} -> {whole(names, others)}"


@rule_for("trace")
def trace(call: Call) -> Ruling:
    """A diagonal needs both dims."""
    return "[i] [j] -> ()"


@rule_for("cosine_similarity")
def cosine_similarity(call: Call) -> Ruling:
    """One dim whole, the others broadcast."""
    a, b = len(call.shape(0)), len(call.shape(1))
    if a != b:
        return Refusal("its arguments have different numbers of dims")
    names = labels(a)
    dims = dims_of((call.number(2, 1, name="dim"),), a)
    sides = []
    for i in range(2):
        full = call.shape(1 - i)
        ones = [
            "1" if size == 1 and full[d] != 1 and d not in dims else f"[{n}]" if d in dims else n
            for d, (n, size) in enumerate(zip(names, call.shape(i), strict=True))
        ]
        sides.append(term(ones))
    return f"{sides[0]}, {sides[1]} -> {_kept(names, dims, False)}"


define("pairwise_distance", "x.. [d], x.. [d] -> x..")
define("dist", "[x..], [x..] -> ()")


@rule_for("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft")
def fft(call: Call) -> Ruling:
    """One dim whole."""
    return _along(call, 2)


@rule_for("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn")
def fftn(call: Call) -> Ruling:
    """The listed dims whole (two-dimensional forms: the last two; n-dimensional: all)."""
    names = labels(len(call.shape(0)))
    listed = call.numbers(2, name="dim")
    missing = {len(names) - 2, len(names) - 1} if call.op.target.split(".")[1].endswith("2") else set(range(len(names)))
    dims = dims_of(listed, len(names)) if listed else missing
    return f"{whole(names, dims)} -> {whole(names, dims)}"


@rule_for("fft_fftshift fft_ifftshift")
def fftshift(call: Call) -> Ruling:
    """The listed dims whole, or all."""
    names, dims, _ = _reduced(call)
    return f"{whole(names, dims)} -> {whole(names, dims)}"


@rule_for("stft.default stft.center")
def stft(call: Call) -> Ruling:
    """Each signal alone; the window is shared."""
    batched = "b " if len(call.shape(0)) == 2 else ""
    rest = "[f] [n] [p]" if len(call.out()) - bool(batched) == 3 else "[f] [n]"
    window = ", [w]" if len(call.operands()) == 2 else ""
    return f"{batched}[t]{window} -> {batched}{rest}"


@rule_for("searchsorted.Tensor")
def searchsorted(call: Call) -> Ruling:
    """Sorted rows and the values looked up in them agree in all but the last dim."""
    if len(call.operands()) != 2 or isinstance(call.arg(0), Symbol):
        return Refusal("it takes a sorter")
    rows = "[s]" if len(call.shape(0)) == 1 else "x.. [s]"
    return f"{rows}, x.. v -> x.. v" if len(call.shape(0)) > 1 else f"{rows}, x.. -> x.."


define("bucketize.Tensor", "x.., [n] -> x..")
define("isin.Tensor_Tensor", "x.., [y..] -> x..")
define("isin.Tensor_Scalar", "x.. -> x..")
