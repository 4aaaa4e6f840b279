"""Activation checkpointing: what the forward pass does not keep, the backward pass computes again (1604.06174).

`full` keeps only the input of a module. `selective` also keeps what is dear to compute and small to hold: products
with weights, attention, and what came over the network; norms, activations and modulation are computed again.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Names and not operators: which of them exist depends on the build of torch and on what was imported.
KEPT = frozenset({
    "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.convolution",
    "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_fused_attention_overrideable", "torch_attn._varlen_attn",
    "flash_attn._flash_attn_forward", "flash_attn._flash_attn_varlen_forward",
    "_c10d_functional.all_reduce", "_c10d_functional.all_gather_into_tensor",
    "_c10d_functional.reduce_scatter_tensor", "_c10d_functional.all_to_all_single", "_c10d_functional.wait_tensor",
})  # fmt: skip


def recompute(module: nn.Module, kept: Literal["full", "selective"] = "full") -> None:
    """Let the backward pass run `module` again; `kept` names how much of its forward pass it is spared.

    The forward of this one instance is replaced: a wrapper module would rename the parameters, whose names key
    the initial values and the checkpoints. Nothing inside is random, so no generator's state is kept.
    """
    forward = module.forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kept == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    module.forward = recomputed


def _keeps(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(operator.overloadpacket) if isinstance(operator, torch._ops.OpOverload) else str(operator)
    return CheckpointPolicy.MUST_SAVE if name in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
