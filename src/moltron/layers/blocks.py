"""The parts of a pre-norm Transformer block (stacks.py), the walk through blocks, and the encoder families' head.

Knows nothing of vocabularies or families; sizes come as plain numbers.

T tokens (packed), D width, N heads, H head width, F feed-forward width, V vocabulary
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moltron.layers.positions import Rotary, apply_rotary


class SelfAttention(nn.Module):
    """Multi-head self-attention. Rows of `qkv` are ordered (head, {q, k, v}, H): between heads they can be cut."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, bias: bool):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(hidden_size, 3 * num_heads * head_dim, bias)
        self.out = nn.Linear(num_heads * head_dim, hidden_size, bias)

    def heads(self, x_TD: Tensor) -> Tensor:
        """(T, N, 3, H): q, k and v of every head, not rotated yet."""
        return self.qkv(x_TD).unflatten(-1, (-1, 3, self.head_dim))

    def probabilities(self, x_TD: Tensor, rotary: Rotary) -> Tensor:
        """Softmax weights (N, T, T) in fp32; x_TD is one sequence."""
        q_TNH, k_TNH, _ = self.heads(x_TD).unbind(2)
        if rotary is not None:
            q_TNH, k_TNH = apply_rotary(q_TNH, *rotary), apply_rotary(k_TNH, *rotary)
        scores = torch.einsum("qnh,knh->nqk", q_TNH.float(), k_TNH.float()) * self.head_dim**-0.5
        return scores.softmax(-1)


class FeedForward(nn.Module):
    """activation: "none" is the exact (erf) GELU, "tanh" its approximation, "relu".

    fused: `up` and an activation that cuBLAS knows in one kernel, which a GPU's inference asks for. No gradients.
    """

    fused = False

    def __init__(self, hidden_size: int, ffn_size: int, activation: str, bias: bool = True):
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(hidden_size, ffn_size, bias)
        self.down = nn.Linear(ffn_size, hidden_size, bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.fused and self.activation != "none":
            return self.down(_linear_activation(x_TD, self.up.weight, self.up.bias, self.activation == "tanh"))
        x_TF = self.up(x_TD)
        x_TF = F.relu(x_TF) if self.activation == "relu" else F.gelu(x_TF, approximate=self.activation)
        return self.down(x_TF)


@torch.library.custom_op("moltron::linear_activation", mutates_args=())
def _linear_activation(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, gelu: bool) -> Tensor:
    bias_F = weight_FD.new_zeros(weight_FD.shape[0]) if bias_F is None else bias_F
    return torch._addmm_activation(bias_F, x_TD, weight_FD.t(), use_gelu=gelu)


@_linear_activation.register_fake
def _(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, gelu: bool) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weight_FD.shape[0])


def run_blocks(
    layers: nn.ModuleDict, norm: nn.Module | None, x_TD: Tensor, *inputs: Any, hidden_layers: Collection[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """After all blocks, which get `inputs` too, and the norm; and the layers asked for (see models.batch.Output)."""
    hiddens = {0: x_TD} if 0 in hidden_layers else {}
    for i, block in enumerate(layers.values(), start=1):
        x_TD = block(x_TD, *inputs)
        if i in hidden_layers:
            hiddens[i] = x_TD
    x_TD = x_TD if norm is None else norm(x_TD)
    if len(layers) in hidden_layers:
        hiddens[len(layers)] = x_TD
    return x_TD, hiddens


class MaskedLMHead(nn.Module):
    """dense → GELU → norm → the embedding's own rows as decoder, plus a bias (spec models.md §2).

    vocab_size: V of the logits; the embedding's rows beyond, which pad the vocabulary, are cut off.
    """

    def __init__(self, hidden_size: int, vocab_size: int, padded_vocab: int, layer_norm_eps: float, gelu: str):
        super().__init__()
        self.gelu, self.vocab_size = gelu, vocab_size
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(padded_vocab))

    def forward(self, hidden_MD: Tensor, embedding_VD: Tensor) -> Tensor:
        x_MD = self.norm(F.gelu(self.dense(hidden_MD), approximate=self.gelu))
        return F.linear(x_MD, embedding_VD, self.bias)[:, : self.vocab_size]


def init_by_name(
    model: nn.Module,
    *,
    seed: int,
    std: float,
    depths: Mapping[str, int],
    vocab_size: int,
    assign: Callable[[nn.Parameter, Tensor], None],
) -> None:
    """Normal(0, std), projections into the residual stream std/√(2L), biases 0, norms 1, the vocabulary's padding 0.

    depths: L of each stack, by the prefix of its parameters' names. Each tensor is a function of (seed, name) alone, so
    the same in any layout; drawn where it lies, a GPU's numbers are not a CPU's (15B on the host would take minutes).
    """
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            value = torch.ones(parameter.shape)
        elif name.endswith("bias") or name.startswith("contact_head."):
            value = torch.zeros(parameter.shape)
        else:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "little"))
            scale = std
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                scale /= math.sqrt(2 * next(depth for prefix, depth in depths.items() if name.startswith(prefix)))
            value = torch.empty(parameter.shape, device=parameter.device).normal_(0.0, scale, generator=generator)
            if name in ("embed.weight", "head.weight"):
                value[vocab_size:] = 0
        assign(parameter, value)
