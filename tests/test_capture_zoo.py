"""Every model of the zoo, captured: on fresh inputs the graph's numbers are the model's, bit for bit."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
from capture_reference import check
from places import zoo_dir

NAMES = [
    "gpt2", "llama", "qwen3_moe", "gemma2", "mamba", "bert", "albert", "t5", "whisper", "wav2vec2_ctc", "hubert",
    "vit", "swin", "convnext", "resnet_hf", "segformer", "detr", "clip", "llava", "patchtst", "decision_transformer",
    "diff_unet2d_cond", "diff_sd3", "timm_efficientnet_b0", "timm_densenet121", "hm_cnn3", "hm_lstm_lm",
    "hm_packed_gru", "hm_rnncell_loop", "hm_unet", "hm_shared_module", "hm_bn_resnet", "hm_nn_transformer",
    "hm_mlp_tied_autoencoder", "hm_moe_nonzero", "hm_early_exit", "hm_dlrm", "hm_multitask_dict", "hm_checkpointed",
    "hm_custom_autograd", "hm_weightnorm_spectral", "hm_stateful_ema", "hm_tree_recursion", "hm_siamese_triplet",
    "hm_hypernetwork", "hm_variable_len_list",
]  # fmt: skip
LIVE = {"hm_moe_nonzero", "hm_early_exit"}  # the model's own forward branches on what it computes


@pytest.fixture(scope="session")
def zoo() -> Any:
    sys.path.insert(0, str(zoo_dir()))
    module = importlib.import_module("zoo")
    for library in ("transformers", "timm", "diffusers"):
        pytest.importorskip(library)
    return module.ZOO


@pytest.mark.zoo
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_graph_of_a_real_model_has_the_models_bits_on_fresh_inputs(zoo: Any, name: str, train: bool) -> None:
    captured = check(zoo[name].build, train=train, steps=1)
    assert bool(captured.live) == (name in LIVE), captured.live
