"""Every rule against the op itself: run on parts of the batch as the rule says and joined, it gives the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batch_reference import graph_of, run_parts, run_whole

from partita.sharding.batch import layouts
from partita.sharding.registry import built_in

torch.set_num_threads(1)
Make = Callable[[int], tuple[Any, ...]]
CASES: list[tuple[str, Make, Callable[[int], dict[str, Any]] | None, str]] = []


def case(names: str, make: Make, keywords: Callable[[int], dict[str, Any]] | None = None, phase: str = "split") -> None:
    CASES.extend((name, make, keywords, phase) for name in names.split())


def r(*shape: int) -> torch.Tensor:
    return torch.rand(shape) * 0.8 + 0.1


def n(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def i(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape)


def c(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.complex64)


def perm(b: int, k: int) -> torch.Tensor:
    return torch.stack([torch.randperm(k) for _ in range(b)])


# elementwise
case("abs absolute acos arccos asin arcsin asinh arcsinh atan arctan atanh arctanh angle ceil celu conj_physical "
        "cos cosh deg2rad "
     "digamma elu erf erfc erfinv exp exp2 expm1 fix floor frac gelu hardshrink hardsigmoid hardswish hardtanh "
        "i0 isfinite isinf "
     "isnan isneginf isposinf isreal leaky_relu lgamma log log10 log1p log2 log_sigmoid logical_not logit mish "
        "nan_to_num rad2deg "
     "reciprocal relu relu6 round rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink "
        "sqrt square tan tanh "
     "trunc neg negative positive clone detach alias lift lift_fresh lift_fresh_copy contiguous _to_copy real "
        "conj resolve_conj "
     "resolve_neg detach_copy alias_copy _neg_view zeros_like ones_like", lambda b: (r(b, 3),))  # fmt: skip
case("acosh arccosh", lambda b: (r(b, 3) + 1,))
case("imag _conj", lambda b: (c(b, 3),))
case("bitwise_not", lambda b: (i(9, b, 3),))
case("mvlgamma", lambda b: (r(b, 3) + 3, 2))
case("polygamma", lambda b: (2, r(b, 3)))
case("threshold", lambda b: (n(b, 3), 0.1, 5.0))
case("clamp clip", lambda b: (n(b, 3), -0.5, 0.5))
case("clamp_max clamp_min add.Scalar sub.Scalar rsub.Scalar subtract.Scalar mul.Scalar div.Scalar "
        "multiply.Scalar divide.Scalar "
     "true_divide.Scalar eq.Scalar ne.Scalar not_equal.Scalar lt.Scalar less.Scalar le.Scalar gt.Scalar "
        "greater.Scalar ge.Scalar "
     "pow.Tensor_Scalar remainder.Scalar fmod.Scalar floor_divide.Scalar xlogy.Scalar_Other "
        "float_power.Tensor_Scalar fill.Scalar "
     "fill_.Scalar", lambda b: (r(b, 3), 0.5))  # fmt: skip
case("bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar bitwise_left_shift.Tensor_Scalar "
        "bitwise_right_shift.Tensor_Scalar "
     "__and__.Scalar __or__.Scalar __xor__.Scalar", lambda b: (i(9, b, 3), 2))  # fmt: skip
case("pow.Scalar remainder.Scalar_Tensor float_power.Scalar xlogy.Scalar_Self", lambda b: (2.0, r(b, 3)))
case("pin_memory", lambda b: (r(b, 3),), phase="skip")
case("data", lambda b: (r(b, 3),))
case("to.dtype", lambda b: (r(b, 3), torch.float64))
case("to.dtype_layout", lambda b: (r(b, 3),), lambda b: {"dtype": torch.float64})
case("to.device to.prim_Device to.prim_dtype", lambda b: (r(b, 3),), phase="skip")
case("to.other type_as", lambda b: (r(b, 3), r(4).double()))
case("to.other type_as", lambda b: (i(5, b, 3), r(b, 4)))
case("full_like", lambda b: (r(b, 3), 2.5))
case("empty_like", lambda b: (r(b, 3),), phase="skip")
BINARY = (
    "add.Tensor sub.Tensor subtract.Tensor rsub.Tensor mul.Tensor multiply.Tensor div.Tensor divide.Tensor "
    "true_divide.Tensor "
    "floor_divide.default pow.Tensor_Tensor float_power.Tensor_Tensor maximum minimum fmax fmin max.other "
    "min.other atan2 arctan2 "
    "hypot remainder.Tensor fmod.Tensor logaddexp logaddexp2 eq.Tensor ne.Tensor not_equal.Tensor lt.Tensor "
    "less.Tensor le.Tensor "
    "less_equal.Tensor gt.Tensor greater.Tensor ge.Tensor greater_equal.Tensor logical_and logical_or "
    "logical_xor copysign.Tensor "
    "xlogy.Tensor heaviside nextafter isclose polar complex ldexp.Tensor clamp_max.Tensor clamp_min.Tensor"
)
case(BINARY, lambda b: (r(b, 3), r(b, 3)))
case(BINARY, lambda b: (r(2, b, 3), r(3)))
case(BINARY, lambda b: (r(4, 1), r(b, 1, 3)))
case("mul.Tensor add.Tensor", lambda b: (r(b, 3), r(3, b).t()))
case("div.Tensor_mode divide.Tensor_mode", lambda b: (r(b, 3), r(b, 1)), lambda b: {"rounding_mode": "floor"})
case("bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor bitwise_left_shift.Tensor "
        "bitwise_right_shift.Tensor __and__.Tensor "
     "__or__.Tensor __xor__.Tensor", lambda b: (i(9, b, 3), i(3, b, 3)))  # fmt: skip
case("expand_as", lambda b: (r(1, 3), r(b, 3)))
case("lerp.Scalar", lambda b: (r(b, 3), r(b, 1), 0.3))
case("masked_fill.Scalar", lambda b: (r(b, 3), r(b, 1) > 0.5, 9.0))
case("masked_fill.Tensor", lambda b: (r(b, 3), r(3) > 0.5, torch.tensor(2.0)))
case("copy copy_", lambda b: (r(b, 3), r(3)), phase="whole_if_inplace")
case("fill.Tensor fill_.Tensor", lambda b: (r(b, 3), torch.tensor(3.0)))
case("zero zero_", lambda b: (r(b, 3),))
case("where.self", lambda b: (r(b, 1) > 0.5, r(b, 3), r(3)))
case("where.ScalarOther", lambda b: (r(b, 3) > 0.5, r(b, 3), 1.0))
case("where.ScalarSelf", lambda b: (r(b, 3) > 0.5, 1.0, r(b, 3)))
case("where.Scalar", lambda b: (r(b, 3) > 0.5, 1.0, 2.0))
case("addcmul addcdiv lerp.Tensor", lambda b: (r(b, 3), r(b, 1), r(3)))
case("clamp.Tensor clip.Tensor", lambda b: (n(b, 3), None, r(3)))
case("dropout feature_dropout alpha_dropout feature_alpha_dropout", lambda b: (r(b, 3), 0.5, False))
case("prelu", lambda b: (n(b, 3, 2), r(3)))
case("prelu", lambda b: (n(b, 3, 2), r(1)))
case("rrelu", lambda b: (n(b, 3),))
case("glu", lambda b: (n(b, 4), 1))
case("glu", lambda b: (n(b * 2, 4), 0), phase="whole")
# factories
case("zeros ones", lambda b: ([b, 3],), phase="once")
case("full", lambda b: ([b, 3], 2.0), phase="once")
case("empty", lambda b: ([b, 3],), phase="once")
case("arange", lambda b: (b,), phase="once")
case("new_zeros new_ones", lambda b: (r(b, 3), [b, 2]))
case("new_zeros", lambda b: (r(b, 3), [2 * b]))
case("new_full", lambda b: (r(b, 3), [4, b], 2.0))
case("new_empty", lambda b: (r(b, 3), [b]), phase="skip")
# products
case("linear", lambda b: (n(b, 4, 3), n(5, 3), n(5)))
case("linear", lambda b: (n(b, 3), n(5, 3)))
case("linear", lambda b: (n(4, b), n(5, b)), phase="any")
case("linear", lambda b: (n(4, b), n(5, b), n(5)), phase="whole")
case("mm", lambda b: (n(b, 3), n(3, 4)))
case("mm", lambda b: (n(3, b), n(b, 4)))
case("mm", lambda b: (n(b, 3), n(3, b)), phase="whole")
case("bmm", lambda b: (n(2 * b, 4, 3), n(2 * b, 3, 2)))
case("mv", lambda b: (n(b, 3), n(3)))
case("mv", lambda b: (n(3, b), n(b)))
case("dot vdot inner.default", lambda b: (n(b), n(b)), phase="any")
case("outer ger", lambda b: (n(b), n(3)))
case("cdist", lambda b: (n(b, 4, 3), n(b, 2, 3)))
case("bilinear", lambda b: (n(b, 3), n(b, 4), n(2, 3, 4), n(2)))
case("matmul", lambda b: (n(b, 3), n(3)))
case("matmul", lambda b: (n(b, 4, 3), n(3, 2)))
case("matmul", lambda b: (n(b, 2, 4, 3), n(2, 3, 5)))
case("matmul", lambda b: (n(4), n(b, 4, 3)))
case("matmul", lambda b: (n(b), n(b, 3)))
case("addmm", lambda b: (n(4), n(b, 3), n(3, 4)))
case("addmm", lambda b: (n(2, 4), n(2, b), n(b, 4)), phase="whole")
case("addmm", lambda b: (n(1, 4), n(b, 3), n(3, 4)))
case("addmv", lambda b: (n(b), n(b, 3), n(3)))
case("addr", lambda b: (n(b, 3), n(b), n(3)))
case("baddbmm", lambda b: (n(b, 4, 2), n(b, 4, 3), n(b, 3, 2)))
case("baddbmm", lambda b: (n(1, 4, 2), n(b, 4, 3), n(b, 3, 2)))
case("addbmm", lambda b: (n(b, 2), n(3, b, 3), n(3, 3, 2)))
case("einsum", lambda b: ("bik,bkj->bij", [n(b, 4, 3), n(b, 3, 2)]))
case("einsum", lambda b: ("...qd,...kd->...qk", [n(b, 2, 4, 3), n(b, 2, 5, 3)]))
case("einsum", lambda b: ("bi,bj", [n(b, 3), n(b, 2)]))
case("einsum", lambda b: ("bi,ci->bc", [n(b, 3), n(b, 3)]), phase="whole")
case("tensordot", lambda b: (n(b, 3, 4), n(3, 4, 2), [1, 2], [0, 1]))
case("conv1d", lambda b: (n(b, 4, 9), n(6, 4, 3), n(6)))
case("conv2d", lambda b: (n(b, 4, 6, 6), n(6, 2, 3, 3), n(6), [1, 1], [1, 1], [1, 1], 2))
case("conv2d", lambda b: (n(1, 4 * b, 6, 6), n(3 * b, 4, 3, 3), None, [1, 1], [0, 0], [1, 1], b))
case("conv3d", lambda b: (n(b, 2, 5, 5, 5), n(3, 2, 2, 2, 2)))
case("conv_transpose1d", lambda b: (n(b, 4, 9), n(4, 6, 3), n(6)))
case("conv_transpose2d", lambda b: (n(b, 4, 5, 5), n(4, 3, 3, 3), n(6), [2, 2], [0, 0], [0, 0], 2))
case("conv_transpose3d", lambda b: (n(b, 2, 3, 3, 3), n(2, 3, 2, 2, 2)))
case("convolution", lambda b: (n(b, 4, 6, 6), n(6, 4, 3, 3), n(6), [1, 1], [1, 1], [1, 1], False, [0, 0], 1))
case(
    "_convolution",
    lambda b: (n(b, 4, 6, 6), n(6, 4, 3, 3), n(6), [1, 1], [1, 1], [1, 1], False, [0, 0], 1, False, False, True, True),
)
# reductions and scans
for _dims in ([0], [1], [-1], [0, 2]):
    case("sum.dim_IntList mean.dim count_nonzero.dim_IntList", lambda b, d=_dims: (n(b, 3, 2), d))
    case(
        "amax amin logsumexp std.dim var.dim all.dims any.dims nanmean" if 0 not in _dims else "",
        lambda b, d=_dims: (n(b, 3, 2), d),
    )
case("amax logsumexp var.dim nanmean", lambda b: (n(b, 3), [0]), phase="whole")
case("sum.dim_IntList mean.dim amax", lambda b: (n(2, b, 3), [2], True))
case("sum.default mean.default nansum count_nonzero.default", lambda b: (n(b, 3),))
case("aminmax", lambda b: (n(b, 3),), lambda b: {"dim": 1})
case("max.default min.default prod.default median.default nanmedian.default all.default any.default std.default "
        "var.default "
     "var_mean.default std_mean.default", lambda b: (n(b, 3),), phase="whole")  # fmt: skip
case("equal", lambda b: (n(b, 3), n(b, 3)), phase="skip")
case(
    "all.dim any.dim argmax argmin max.dim min.dim median.dim nanmedian.dim mode prod.dim_int",
    lambda b: (n(b, 3, 2), 1),
)
case("max.dim argmax all.dim", lambda b: (n(b, 3, 2), 0), phase="whole")
case("argmax", lambda b: (n(b, 3),), phase="whole")
case("kthvalue", lambda b: (n(b, 3), 2, 1))
case(
    "std.correction var.correction var_mean.correction std_mean.correction",
    lambda b: (n(b, 3), [1]),
    lambda b: {"correction": 0},
)
case("var_mean.dim std_mean.dim", lambda b: (n(b, 3, 2), [1, 2]))
case("norm.Scalar", lambda b: (n(b, 3), 2), phase="whole")
case("norm.ScalarOpt_dim linalg_vector_norm", lambda b: (n(b, 3), 2, [1]))
case("norm.ScalarOpt_dtype", lambda b: (n(b, 3), 2), lambda b: {"dtype": torch.float64}, phase="whole")
case("norm.ScalarOpt_dim_dtype", lambda b: (n(b, 3), 2, [1], True), lambda b: {"dtype": torch.float64})
case("frobenius_norm.dim", lambda b: (n(b, 3), [1]))
case("softmax.int log_softmax.int _safe_softmax cumsum cumprod logcumsumexp cummax cummin", lambda b: (n(3, b, 4), -1))
case("_softmax _log_softmax", lambda b: (n(b, 4), 1, False))
case("softmax.int cumsum", lambda b: (n(b, 4), 0), phase="whole")
case("sort.default argsort.default", lambda b: (n(b, 3),))
case("sort.stable", lambda b: (n(b, 3),), lambda b: {"stable": True})
case("argsort.stable", lambda b: (n(b, 3),), lambda b: {"stable": True, "dim": 1})
case("topk", lambda b: (n(b, 5), 2))
case("topk", lambda b: (n(b, 5), 2, 0), phase="whole")
case("renorm", lambda b: (n(b, 3), 2, 0, 1.0))
case("trace", lambda b: (n(b, b),), phase="whole")
case("cosine_similarity", lambda b: (n(b, 3), n(b, 3)))
case("cosine_similarity", lambda b: (n(b, 1, 3), n(1, 4, 3), -1))
case("pairwise_distance", lambda b: (n(b, 3), n(b, 3)))
case("dist", lambda b: (n(b, 3), n(b, 3)), phase="whole")
case("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2", lambda b: (n(b, 4, 4),))
case("fft_irfft2", lambda b: (c(b, 4, 4),))
case("fft_fftn fft_ifftn fft_rfftn fft_irfftn", lambda b: (n(b, 4, 4), None, [1, 2]))
case("fft_fftn", lambda b: (n(b, 4, 4),), phase="whole")
case("fft_fftshift fft_ifftshift", lambda b: (n(b, 4), [1]))
case("stft.default", lambda b: (n(b, 64), 16, 8, 16, r(16), False, True, True))
case("stft.center", lambda b: (n(b, 64), 16, 8, 16, r(16), True, "reflect", False, True, True))
case("searchsorted.Tensor", lambda b: (torch.sort(n(b, 6)).values, n(b, 2)))
case("searchsorted.Tensor", lambda b: (torch.sort(n(6)).values, n(b, 2)))
case("bucketize.Tensor", lambda b: (n(b, 3), torch.sort(n(4)).values))
case("isin.Tensor_Tensor", lambda b: (i(9, b, 3), i(9, 4)))
case("isin.Tensor_Scalar", lambda b: (i(9, b, 3), 4))
# shapes
case("view.default reshape _unsafe_view view_copy.default", lambda b: (n(b, 4, 6), [b * 4, 6]))
case("view.default reshape", lambda b: (n(b * 4, 6), [b, 4, 2, 3]))
case("view.default", lambda b: (n(b, 4, 6), [b, -1]))
case("reshape", lambda b: (n(4, b, 6), [4, -1]))
case("reshape", lambda b: (n(4, b, 6), [b * 4, 6]), phase="whole")
case("reshape", lambda b: (n(b * 4, 6), [4, b, 6]), phase="whole")
case("reshape", lambda b: (n(2 * b, 3), [3 * b, 2]))
case("_reshape_alias", lambda b: (n(b, 6), [b, 2, 3], [6, 3, 1]))
case("flatten", lambda b: (n(b, 4, 6), 0, 1))
case("unflatten.int", lambda b: (n(b * 4, 6), 0, [b, 4]))
case("view_as reshape_as", lambda b: (n(b, 6), n(b, 2, 3)))
case("permute permute_copy", lambda b: (n(b, 4, 6), [2, 0, 1]))
case("transpose.int swapaxes swapdims transpose_copy.int", lambda b: (n(b, 4, 6), 0, -1))
case("t t_copy numpy_T mT mH adjoint matrix_H", lambda b: (n(b, 4),))
case("mT", lambda b: (n(b, 4, 3),))
case("movedim.intlist moveaxis.intlist", lambda b: (n(b, 4, 6), [0, 1], [2, 0]))
case("movedim.int moveaxis.int", lambda b: (n(b, 4, 6), 0, 2))
case("unsqueeze unsqueeze_copy", lambda b: (n(b, 4), -1))
case("unsqueeze", lambda b: (n(b, 4), 0))
case("squeeze.default", lambda b: (n(b, 1, 3),))
case("squeeze.dim squeeze_copy.dim", lambda b: (n(b, 1, 3), 1))
case("squeeze.dim", lambda b: (n(b, 1, 3), 0))
case("squeeze.dims", lambda b: (n(b, 1, 3), [0, 1]))
case("expand broadcast_to expand_copy", lambda b: (n(1, 3), [b, 3]))
case("expand", lambda b: (n(b, 1, 3), [-1, 4, -1]))
case("expand", lambda b: (n(b, 3), [2, b, 3]))
case("expand", lambda b: (n(3), [b, 3]))
case("repeat tile", lambda b: (n(b, 3), [1, 2]))
case("repeat", lambda b: (n(1, 3), [b, 1]))
case("repeat", lambda b: (n(2, 3), [b, 1, 2]))
case("repeat", lambda b: (n(2, 3), [b, 1]))
case("repeat", lambda b: (n(b, 3), [2, 1]), phase="whole")
case("repeat", lambda b: (n(b, 3), [1, 1, 2]))
case("repeat", lambda b: (n(b, 3), [2, 1, 1]))
case("repeat_interleave.self_int", lambda b: (n(b, 3), 2, 0))
case("repeat_interleave.self_int", lambda b: (n(b, 3), 2, 1))
case("repeat_interleave.self_int", lambda b: (n(b, 3), 2, 0), lambda b: {"output_size": 2 * b})
case("cat concat concatenate", lambda b: ([n(b, 3), n(b, 2)], 1))
case("cat", lambda b: ([n(b, 3), n(b, 3)], 0), phase="whole")
case("cat", lambda b: ([n(0), n(b, 3, 2)], -2))
case("stack", lambda b: ([n(b, 3), n(b, 3)], 1))
case("stack", lambda b: ([n(b, 3), n(b, 3)],))
case("split.Tensor unsafe_split.Tensor", lambda b: (n(b, 5), 2, 1))
case("split.sizes split_with_sizes unsafe_split_with_sizes", lambda b: (n(b, 5), [2, 3], 1))
case("chunk unsafe_chunk tensor_split.sections", lambda b: (n(b, 5), 2, 1))
case("tensor_split.indices", lambda b: (n(b, 5), [2], 1))
case("chunk", lambda b: (n(2 * b, 5), 2), phase="whole")
case("unbind.int unbind_copy.int", lambda b: (n(b, 3), 1))
case("slice.Tensor slice_copy.Tensor", lambda b: (n(b, 5), 1, 1, 4, 2))
case("slice.Tensor", lambda b: (n(b, 5), 0, 0, 1 << 62))
case("slice.Tensor", lambda b: (n(b, 5), 0, 0, b))
case("slice.Tensor", lambda b: (n(b, 5), 0, 1, None), phase="whole")
case("narrow narrow_copy", lambda b: (n(b, 5), 1, 1, 2))
case("narrow", lambda b: (n(b, 5), 0, 0, b))
case("select.int select_copy.int", lambda b: (n(b, 5), 1, -1))
case("select.int", lambda b: (n(b, 5), 0, 0), phase="whole")
case("slice_scatter", lambda b: (n(b, 5), n(b, 2), 1, 1, 3))
case("select_scatter", lambda b: (n(b, 5), n(b), 1, 2))
case("diagonal_scatter", lambda b: (n(b, 3, 3), n(b, 3), 0, 1, 2), phase="whole")
case("diagonal diagonal_copy", lambda b: (n(b, 3, 3), 0, 1, 2))
case("diag_embed", lambda b: (n(b, 3),))
case("flip", lambda b: (n(b, 3), [1]))
case("flip", lambda b: (n(b, 3), [0]), phase="whole")
case("roll", lambda b: (n(b, 3, 2), [1, 1], [1, 2]))
case("roll", lambda b: (n(b, 3), [1]), phase="whole")
case("rot90", lambda b: (n(b, 3, 2), 1, [1, 2]))
case("fliplr", lambda b: (n(b, 3),))
case("flipud", lambda b: (n(3, b),))
case("unfold", lambda b: (n(b, 6), 1, 3, 2))
case("constant_pad_nd pad", lambda b: (n(b, 3, 4), [1, 2]))
case("constant_pad_nd", lambda b: (n(b, 3), [0, 0, 1, 0]), phase="whole")
case("reflection_pad1d replication_pad1d", lambda b: (n(b, 3, 4), [1, 2]))
case("reflection_pad2d replication_pad2d", lambda b: (n(b, 3, 4, 4), [1, 2, 1, 1]))
case("reflection_pad3d replication_pad3d", lambda b: (n(b, 3, 4, 4, 4), [1, 2, 1, 1, 0, 1]))
case("tril triu", lambda b: (n(b, 4, 4),))
case("tril", lambda b: (n(b, 4),), phase="whole")
case("meshgrid", lambda b: ([n(b), n(3)],))
case("meshgrid.indexing", lambda b: ([n(b), n(3)],), lambda b: {"indexing": "xy"})
case("broadcast_tensors", lambda b: ([n(b, 1), n(1, 3)],))
case("broadcast_tensors", lambda b: ([n(b, 3), n(b, 1)],))
case("atleast_1d.default atleast_2d.default atleast_3d.default", lambda b: (n(b, 3),))
case("ravel", lambda b: (n(b, 3),))
case("view_as_complex view_as_complex_copy", lambda b: (n(b, 3, 2),))
case("view_as_real view_as_real_copy", lambda b: (c(b, 3),))
case("pixel_shuffle", lambda b: (n(b, 4, 3, 3), 2))
case("pixel_unshuffle", lambda b: (n(b, 1, 4, 4), 2))
case("im2col", lambda b: (n(b, 2, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1]))
case("col2im", lambda b: (n(b, 8, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]))
case("channel_shuffle native_channel_shuffle", lambda b: (n(b, 4, 3, 3), 2))
case("cross linalg_cross", lambda b: (n(b, 3), n(b, 3)), lambda b: {"dim": -1})
# indexing
case("one_hot", lambda b: (i(4, b, 3), 4))
case("take", lambda b: (n(7), i(7, b, 3)))
case("embedding", lambda b: (n(9, 4), i(9, b, 3)))
case("embedding", lambda b: (n(9, 4), i(9, b, 3), -1, True), phase="whole")
case("index_select", lambda b: (n(b, 5), 1, i(5, 3)))
case("index_select", lambda b: (n(7, 5), 0, i(7, b)))
case("index_select", lambda b: (n(b, 5), 0, i(3, 3)), phase="whole")
case("gather", lambda b: (n(b, 5), 1, i(5, b, 2)))
case("gather", lambda b: (n(b, 5), 0, i(3, b, 5)), phase="whole")
case("take_along_dim", lambda b: (n(b, 5), i(5, b, 2), 1))
case("scatter.src scatter_add", lambda b: (n(b, 5), 1, perm(b, 5)[:, :3], n(b, 3)))
case("scatter.value", lambda b: (n(b, 5), 1, i(5, b, 2), 1.5))
case("scatter.reduce", lambda b: (n(b, 5), 1, i(5, b, 2), n(b, 2)), lambda b: {"reduce": "add"})
case("scatter.value_reduce", lambda b: (n(b, 5), 1, i(5, b, 2), 2.0), lambda b: {"reduce": "multiply"})
case("scatter_reduce.two", lambda b: (n(b, 5), 1, i(5, b, 2), n(b, 2), "amax"))
case("scatter_add", lambda b: (n(4, 3), 0, i(4, b, 3), n(b, 3)), phase="whole")
case("index_add index_copy", lambda b: (n(b, 5), 1, perm(1, 5)[0, :3], n(b, 3)))
case("index_add", lambda b: (n(4, 3), 0, i(4, b), n(b, 3)), phase="whole")
case("index_fill.int_Scalar", lambda b: (n(b, 5), 1, i(5, 2), 3.0))
case("masked_scatter", lambda b: (n(b, 5), n(b, 5) > 0, n(b, 5)), phase="whole")
case("masked_select nonzero", lambda b: (n(b),), phase="skip")
case("index.Tensor _unsafe_index.Tensor", lambda b: (n(b, 5, 3), [None, i(5, 4)]))
case("index.Tensor", lambda b: (n(9, 5), [i(9, b, 2)]))
case("index.Tensor", lambda b: (n(9, 5, 3), [i(9, b, 1), None, i(3, 4)]))
case("index.Tensor", lambda b: (n(2, b, 5, 3), [None, None, i(5, 4), i(3, 4)]))
case("index.Tensor", lambda b: (n(b, 5), [i(3, 3)]), phase="whole")
case("index.Tensor", lambda b: (n(b, 5), [torch.arange(b), i(5, b)]), phase="whole")
case("index_put", lambda b: (n(b, 5), [None, perm(1, 5)[0, :3]], n(b, 3)))
case("index_put", lambda b: (n(b, 5), [None, i(5, 3)], torch.tensor(2.0)))
case("index_put", lambda b: (n(4, 5), [i(4, b)], n(b, 5)), phase="whole")
# layers
for _mask in (None, (4, 6), (1, 1, 4, 6)):
    case(
        "scaled_dot_product_attention",
        lambda b, m=_mask: (n(b, 2, 4, 3), n(b, 2, 6, 3), n(b, 2, 6, 5), n(*m) if m else None),
    )
case("scaled_dot_product_attention", lambda b: (n(b, 2, 4, 3), n(b, 2, 4, 3), n(b, 2, 4, 3), None, 0.0, True))
case("scaled_dot_product_attention", lambda b: (n(b, 2, 4, 3), n(b, 2, 4, 3), n(b, 2, 4, 3), n(b, 1, 1, 4)))
case(
    "scaled_dot_product_attention",
    lambda b: (n(b, 4, 4, 3), n(b, 2, 4, 3), n(b, 2, 4, 3), n(b, 1, 4, 4)),
    lambda b: {"enable_gqa": True},
)
case("layer_norm", lambda b: (n(b, 4, 3), [4, 3], n(4, 3), n(4, 3)))
case("layer_norm rms_norm", lambda b: (n(b, 4, 3), [3], n(3)))
case("native_layer_norm", lambda b: (n(b, 3), [3], n(3), n(3), 1e-5))
case("group_norm", lambda b: (n(b, 4, 5), 2, n(4), n(4)))
case("instance_norm", lambda b: (n(b, 4, 5), n(4), n(4), None, None, True, 0.1, 1e-5, False))
case("instance_norm", lambda b: (n(b, 4, 5), None, None, n(4), r(4), True, 0.1, 1e-5, False), phase="whole")
case("batch_norm", lambda b: (n(b, 4, 5), n(4), n(4), n(4), r(4), False, 0.1, 1e-5, False))
case("batch_norm", lambda b: (n(b, 4, 5), n(4), n(4), n(4), r(4), True, 0.1, 1e-5, False), phase="whole")
case("batch_norm", lambda b: (n(1, 4 * b, 5), n(4 * b), n(4 * b), None, None, True, 0.1, 1e-5, False))
case("_native_batch_norm_legit_no_training", lambda b: (n(b, 4, 5), n(4), n(4), n(4), r(4), 0.1, 1e-5))
for _n in (1, 2, 3):
    _sp = [6] * _n
    case(f"max_pool{_n}d max_pool{_n}d_with_indices avg_pool{_n}d", lambda b, s=_sp: (n(b, 2, *s), [2] * len(s)))
    case(f"adaptive_avg_pool{_n}d adaptive_max_pool{_n}d" + (f" _adaptive_avg_pool{_n}d" if _n > 1 else ""),
         lambda b, s=_sp: (n(b, 2, *s), [4] * len(s)))  # fmt: skip
    case(f"upsample_nearest{_n}d _upsample_nearest_exact{_n}d", lambda b, s=_sp: (n(b, 2, *s), [8] * len(s)))
case("max_pool2d", lambda b: (n(2, b, 6, 6), [2, 2]))
case("upsample_linear1d", lambda b: (n(b, 2, 6), [8], False))
case("upsample_trilinear3d", lambda b: (n(b, 2, 3, 3, 3), [4, 4, 4], False))
case(
    "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    lambda b: (n(b, 2, 6, 6), [8, 8], False),
)
case("upsample_bilinear2d.vec", lambda b: (n(b, 2, 6, 6), None, False, [2.0, 2.0]))
case("grid_sampler grid_sampler_2d", lambda b: (n(b, 2, 4, 4), n(b, 3, 3, 2), 0, 0, False))
case("grid_sampler_3d", lambda b: (n(b, 2, 4, 4, 4), n(b, 3, 3, 3, 3), 0, 0, False))
case("affine_grid_generator", lambda b: (n(b, 2, 3), [b, 3, 4, 4], False))


def _rnn(gates: int, states: int, first: bool) -> Make:
    def make(b: int) -> tuple[Any, ...]:
        x = n(b, 6, 3) if first else n(6, b, 3)
        hx = [n(1, b, 4) for _ in range(states)]
        weights = [n(4 * gates, 3), n(4 * gates, 4), n(4 * gates), n(4 * gates)]
        return (x, hx if states == 2 else hx[0], weights, True, 1, 0.0, False, False, first)

    return make


for _first in (True, False):
    case("lstm.input", _rnn(4, 2, _first))
    case("gru.input", _rnn(3, 1, _first))
    case("rnn_tanh.input rnn_relu.input", _rnn(1, 1, _first))
case("lstm_cell", lambda b: (n(b, 3), [n(b, 4), n(b, 4)], n(16, 3), n(16, 4), n(16), n(16)))
case("gru_cell", lambda b: (n(b, 3), n(b, 4), n(12, 3), n(12, 4), n(12), n(12)))
case("rnn_tanh_cell rnn_relu_cell", lambda b: (n(b, 3), n(b, 4), n(4, 3), n(4, 4), n(4), n(4)))
# losses
for _red in (0, 1, 2):
    case("mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss kl_div", lambda b, k=_red: (r(b, 3), r(b, 3), k))
    case("binary_cross_entropy", lambda b, k=_red: (r(b, 3), r(b, 3), r(3), k))
    case("binary_cross_entropy_with_logits", lambda b, k=_red: (n(b, 3), r(b, 3), None, r(3), k))
    case("poisson_nll_loss", lambda b, k=_red: (n(b, 3), r(b, 3), True, False, 1e-8, k))
    case("hinge_embedding_loss", lambda b, k=_red: (n(b, 3), n(b, 3).sign(), 1.0, k))
    case("margin_ranking_loss", lambda b, k=_red: (n(b), n(b), n(b).sign(), 0.5, k))
    case("triplet_margin_loss", lambda b, k=_red: (n(b, 3), n(b, 3), n(b, 3), 1.0, 2.0, 1e-6, False, k))
    case("cosine_embedding_loss", lambda b, k=_red: (n(b, 3), n(b, 3), n(b).sign(), 0.1, k))
    case("multi_margin_loss", lambda b, k=_red: (n(b, 3), i(3, b), 1, 1.0, r(3), k))
    case("multilabel_margin_loss", lambda b, k=_red: (n(b, 3), perm(b, 3), k))
    case("cross_entropy_loss", lambda b, k=_red: (n(b, 3), i(3, b), r(3), k, 1, 0.1))
    case("cross_entropy_loss", lambda b, k=_red: (n(b, 3, 4), i(3, b, 4), None, k))
    case("cross_entropy_loss", lambda b, k=_red: (n(b, 3), r(b, 3), r(3), k))
    case("nll_loss nll_loss_nd", lambda b, k=_red: (n(b, 3), i(3, b), r(3), k, 2))
    case("nll_loss2d", lambda b, k=_red: (n(b, 3, 2, 2), i(3, b, 2, 2), None, k))
    case(
        "ctc_loss.Tensor",
        lambda b, k=_red: (n(9, b, 4).log_softmax(-1), i(3, b, 3) + 1, torch.full((b,), 9), i(3, b) + 1, 0, k),
    )
case("ctc_loss.IntList", lambda b: (n(9, 4, 4).log_softmax(-1), i(3, 4, 3) + 1, [9] * 4, [2] * 4), phase="skip")


def _target(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 2:
        return f"aten.{name}"
    packet = getattr(torch.ops.aten, name)
    known = packet.overloads()
    return (
        f"aten.{name}.{next((o for o in ('default', 'self', 'Tensor', 'using_ints', 'dim') if o in known), known[0])}"
    )


@pytest.mark.parametrize("name,make,keywords,phase", CASES, ids=[f"{k}-{entry[0]}" for k, entry in enumerate(CASES)])
def test_an_op_run_on_parts_as_its_rule_says_equals_the_op_run_whole(
    name: str, make: Make, keywords: Callable[[int], dict[str, Any]] | None, phase: str
) -> None:
    if phase == "skip":
        return
    graph, leaves = graph_of(_target(name), make, keywords)
    found = layouts(graph)
    if phase in ("split", "whole", "once"):
        assert found.phase["op"] == phase, [c.reason for c in found.couplings]
    expected = run_whole(graph, {k: v.clone() for k, v in leaves.items()}, 5)
    for parts in ((5,), (2, 3), (1, 3, 1)):
        if found.phase["op"] != "split":
            continue
        got = run_parts(graph, found, {k: v.clone() for k, v in leaves.items()}, parts)
        for out in graph.outputs:
            a, b = got[out], expected[out]
            if isinstance(a, list):
                continue
            assert a.shape == b.shape and a.dtype == b.dtype, (parts, a.shape, b.shape)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_every_rule_has_an_example() -> None:
    shown = {name.partition(".")[0] for name, *_ in CASES} | {name for name, *_ in CASES}
    missing = [name for name in built_in() if name.removeprefix("aten.") not in shown]
    assert not missing, f"rules without an example in this file: {missing}"
