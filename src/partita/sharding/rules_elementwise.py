"""Rules of ops that work element by element, with NumPy's broadcasting."""

from __future__ import annotations

from partita.sharding.call import Call, Refusal, Ruling, labels, whole
from partita.sharding.registry import define, rule_for

define(
    "abs absolute acos arccos acosh arccosh asin arcsin asinh arcsinh atan arctan atanh arctanh angle "
    "bitwise_not ceil celu "
    "clamp clamp_max clamp_min clip conj_physical cos cosh deg2rad digamma elu erf erfc erfinv exp exp2 expm1 "
    "fix floor frac gelu "
    "hardshrink hardsigmoid hardswish hardtanh i0 isfinite isinf isnan isneginf isposinf isreal leaky_relu "
    "lgamma log log10 "
    "log1p log2 log_sigmoid logical_not logit mish mvlgamma nan_to_num rad2deg reciprocal relu relu6 round rsqrt selu "
    "sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt square tan tanh threshold trunc "
    "bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar bitwise_left_shift.Tensor_Scalar "
    "bitwise_right_shift.Tensor_Scalar __and__.Scalar __or__.Scalar __xor__.Scalar eq.Scalar ne.Scalar "
    "not_equal.Scalar "
    "lt.Scalar less.Scalar le.Scalar gt.Scalar greater.Scalar ge.Scalar pow.Tensor_Scalar remainder.Scalar fmod.Scalar "
    "floor_divide.Scalar xlogy.Scalar_Other float_power.Tensor_Scalar",
    "x.. -> x..",
)
define(
    "neg negative positive clone detach alias lift lift_fresh lift_fresh_copy contiguous pin_memory data "
    "_to_copy to.dtype to.dtype_layout to.device to.prim_Device to.prim_dtype real imag _conj conj resolve_conj "
    "resolve_neg "
    "_neg_view detach_copy alias_copy",
    "x.. -> x.. ; linear",
)
define("to.other type_as", "x.., # -> x.. ; linear")
define("mul.Scalar div.Scalar multiply.Scalar divide.Scalar true_divide.Scalar", "x.., _ -> x.. ; linear")
define("add.Scalar sub.Scalar rsub.Scalar subtract.Scalar", "x.., _ -> x..")
define("add.Tensor sub.Tensor subtract.Tensor rsub.Tensor", "x.., x.. -> x.. ; linear")
define("mul.Tensor multiply.Tensor div.Tensor divide.Tensor true_divide.Tensor", "x.., x.. -> x.. ; bilinear")
define(
    "div.Tensor_mode divide.Tensor_mode floor_divide.default pow.Tensor_Tensor float_power.Tensor_Tensor maximum "
    "minimum fmax fmin "
    "max.other min.other atan2 arctan2 hypot remainder.Tensor fmod.Tensor logaddexp logaddexp2 eq.Tensor "
    "ne.Tensor not_equal.Tensor "
    "lt.Tensor less.Tensor le.Tensor less_equal.Tensor gt.Tensor greater.Tensor ge.Tensor greater_equal.Tensor "
    "logical_and logical_or "
    "logical_xor bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor bitwise_left_shift.Tensor "
    "bitwise_right_shift.Tensor "
    "__and__.Tensor __or__.Tensor __xor__.Tensor copysign.Tensor xlogy.Tensor heaviside nextafter expand_as isclose "
    "lerp.Scalar polar complex ldexp.Tensor clamp_max.Tensor clamp_min.Tensor masked_fill.Scalar",
    "x.., x.. -> x..",
)
define("copy_ copy", "x.., x.. -> x..")
define("pow.Scalar remainder.Scalar_Tensor float_power.Scalar xlogy.Scalar_Self polygamma", "_, x.. -> x..")
define("where.ScalarSelf", "x.., _, x.. -> x..")
define("where.self addcmul addcdiv lerp.Tensor masked_fill.Tensor", "x.., x.., x.. -> x..")
define("clamp.Tensor clip.Tensor", "x.., x..?, x..? -> x..")
define("where.ScalarOther", "x.., x.., _ -> x..")
define("where.Scalar", "x.., _, _ -> x..")
define("fill.Scalar zero zero_ fill_.Scalar", "x.. -> x..")
define("fill.Tensor fill_.Tensor", "x.., () -> x..")
define("dropout feature_dropout alpha_dropout feature_alpha_dropout", "x.. -> x..")


@rule_for("prelu")
def prelu(call: Call) -> Ruling:
    """One slope for all, or one a channel (dim 1)."""
    ndim = len(call.shape(0))
    if call.shape(1) in ((1,), ()):
        return f"x.., {'1' if call.shape(1) else '()'} -> x.."
    if ndim < 2:
        return Refusal("a slope for each channel without a batch dim")
    return "b c x.., c -> b c x.."


@rule_for("rrelu")
def rrelu(call: Call) -> Ruling:
    """Deterministic outside training."""
    return Refusal("it draws random slopes") if call.number(3, name="training") else "x.. -> x.."


@rule_for("glu")
def glu(call: Call) -> Ruling:
    """Halves one dim and multiplies the halves."""
    names = labels(len(call.shape(0)))
    dim = {call.number(1, -1, name="dim") % len(names)}
    return f"{whole(names, dim)} -> {whole(names, dim)}"
