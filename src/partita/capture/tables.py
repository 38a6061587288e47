"""What tracing has to know about ops that their schemas do not say."""

from __future__ import annotations

# Ops that answer with a number instead of a tensor, from metadata alone: never recorded.
METADATA = {
    "prim.device", "aten.size", "aten.sym_size", "aten.sym_stride", "aten.sym_numel", "aten.sym_storage_offset",
    "aten.dim", "aten.stride", "aten.numel", "aten.is_contiguous", "aten.is_same_size", "aten.storage_offset",
    "aten.is_complex", "aten.is_floating_point", "aten.is_signed", "aten.is_nonzero_meta", "aten.is_inference",
    "aten._version", "aten.is_leaf", "aten.output_nr", "aten.result_type", "aten.can_cast", "aten.promote_types",
    "aten.is_conj", "aten.is_neg", "aten.is_pinned", "aten._has_compatible_shallow_copy_type",
    "aten.sym_is_contiguous", "aten.is_non_overlapping_and_dense", "aten.is_strides_like_format",
    "aten.__dispatch_is_coalesced", "aten.get_device", "aten.is_distributed", "aten._fw_primal_meta",
    "aten._nested_tensor_size_meta", "prim.layout", "aten._is_zerotensor", "aten._debug_has_internal_overlap",
    "aten._use_cudnn_ctc_loss", "aten._use_miopen_ctc_loss", "aten._chunk_cat_meta", "aten.is_set_to",
}  # fmt: skip

# Ops whose answer depends on the values of a tensor.
READS = {
    "aten.item", "aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.allclose",
}  # fmt: skip

# Ops that change a running statistic their schema does not declare: op -> (positions of the statistics, of the flag).
STATISTICS = {
    "aten.batch_norm": ((3, 4), 5), "aten.native_batch_norm": ((3, 4), 5), "aten.cudnn_batch_norm": ((3, 4), 5),
    "aten.instance_norm": ((3, 4), 5), "aten._native_batch_norm_legit": ((3, 4), 5),
    "aten.miopen_batch_norm": ((3, 4), 5), "aten._batch_norm_with_update": ((3, 4), None),
}  # fmt: skip

# Ops whose result's shape follows the values of their integer and bool arguments only.
SHAPE_FROM_INTEGERS = {
    "aten._pack_padded_sequence", "aten._pad_packed_sequence", "aten.lstm", "aten.gru", "aten.rnn_tanh",
    "aten.rnn_relu", "aten.repeat_interleave", "aten.tensor_split",
}  # fmt: skip

# Composite ops that hold nothing autocast would treat, and are better kept whole.
AUTOCAST_NEUTRAL = {
    "aten.dropout", "aten.dropout_", "aten.feature_dropout", "aten.feature_dropout_", "aten.alpha_dropout", "aten.to",
    "aten.reshape", "aten.contiguous", "aten.flatten", "aten.chunk", "aten.split", "aten.type_as", "aten.expand_as",
    "aten.view_as", "aten.movedim", "aten.swapaxes", "aten.unflatten", "aten.tensor_split", "aten.narrow", "aten.float",
    "aten.item", "aten.is_nonzero", "aten.embedding_bag", "aten.numpy_T", "aten.mT", "aten.matrix_H", "aten.square",
    "aten.size", "aten.stack", "aten.pad", "aten.max_pool2d", "aten.adaptive_avg_pool2d", "aten.selu", "aten.relu6",
}  # fmt: skip

# Ops whose result's shape follows the number of trues in their masks.
SHAPE_FROM_MASKS = {"aten.index", "aten.masked_select", "aten.index_put", "aten.index_put_"}

# Ops that look at values inside, while their result's shape follows shapes alone.
SHAPE_FIXED = {"aten.ctc_loss", "aten._ctc_loss", "aten.embedding_bag", "aten._embedding_bag"}
