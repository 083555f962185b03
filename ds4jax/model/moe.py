"""Mixture of experts: hash and score routing, clamped SwiGLU experts, one shared expert.

Source: `Gate`, `Expert` and `MoE` of the reference inference code; the shared expert is clamped as in its July revision.
"""

from __future__ import annotations

import os
from typing import TypeGuard

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.config import Config
from ds4jax.model.layers import Linear, Rngs, parameter, together
from ds4jax.model.tape import Record, ignore
from pallas_kernels import grouped_matmul
from pallas_kernels.dispatch import OPT_OUT
from pallas_kernels.formats import Q8_0, Quantized
from pallas_kernels.reference import Weight, as_float32, expert_dot

# Up to this many rows each reads its own experts; above it every expert is read once and serves all rows.
GATHER_ROWS = 8
LEAST_WEIGHT_SUM = 2.0**-14


def swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """silu(min(gate, limit)) · clip(up, ±limit): the gate is clamped from above only."""
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def _chosen(stack: Weight, chosen_TK: jax.Array) -> Weight:
    """Matrices [T, K, ...] of the chosen experts from a stack [E, ...]."""
    return stack.take(chosen_TK) if isinstance(stack, Quantized) else stack[chosen_TK]


def _quantized(weight: Weight, strict: bool) -> TypeGuard[Quantized]:
    """Whether a product quantises its activations.

    Q8_0 experts keep float32 ones: for a small model's matrices a CPU would spend more time on quantising than on the product.
    """
    return isinstance(weight, Quantized) and not isinstance(weight, Q8_0) and not strict


def _gate_or_up(x_TD: jax.Array, weight: Weight, *, strict: bool) -> jax.Array:
    """Each row with its matrices [T, K, F, D]: [T, K, F]."""
    if _quantized(weight, strict):
        return expert_dot(x_TD[:, None], weight)
    precision = "highest" if strict else None
    return jnp.einsum("td,tkfd->tkf", x_TD, as_float32(weight), precision=precision, preferred_element_type=jnp.float32)


def _down(hidden_TKF: jax.Array, weight: Weight, *, strict: bool) -> jax.Array:
    """Each row's hidden values with their matrices [T, K, D, F], summed over the experts: [T, D]."""
    if _quantized(weight, strict):
        return expert_dot(hidden_TKF, weight, add_up=True)
    precision = "highest" if strict else None
    return jnp.einsum("tkf,tkdf->td", hidden_TKF, as_float32(weight), precision=precision, preferred_element_type=jnp.float32)


class Router(nnx.Module):
    """Chooses K experts a token and weighs them; `hashed` layers take the choice from a table of token ids."""

    def __init__(self, config: Config, hashed: bool, *, rngs: Rngs):
        self.weight = parameter(rngs, config.n_experts, config.dim, scale=config.dim**-0.5)
        if hashed:
            self.tid2eid = nnx.Param(jnp.zeros((config.vocab_size, config.n_active), jnp.int32))
        else:
            self.bias = parameter(rngs, config.n_experts)
        self.config, self.hashed = config, hashed

    def __call__(self, x_TD: jax.Array, ids_T: jax.Array, record: Record = ignore) -> tuple[jax.Array, jax.Array]:
        """Expert ids int32 [T, K] and weights float32 [T, K]; the bias decides the choice and never the weight."""
        weight_ED = self.weight.get_value().astype(jnp.float32)
        logits = jax.lax.dot_general(x_TD, weight_ED, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scores_TE = jnp.sqrt(jax.nn.softplus(logits))
        if self.hashed:
            chosen_TK = self.tid2eid.get_value()[ids_T]
        else:
            _, chosen_TK = jax.lax.top_k(scores_TE + self.bias.get_value(), self.config.n_active)
        weights_TK = jnp.take_along_axis(scores_TE, chosen_TK, axis=1)
        total = jnp.maximum(jnp.sum(weights_TK, axis=1, keepdims=True), LEAST_WEIGHT_SUM)
        weights_TK = weights_TK / total * self.config.route_scale
        for name, value in (("scores", scores_TE), ("chosen", chosen_TK), ("weights", weights_TK)):
            record(name, value)
        return chosen_TK, weights_TK


class Stack(nnx.Module):
    """One matrix of every expert: weight [E, N, K]."""

    def __init__(self, config: Config, n_out: int, n_in: int, *, rngs: Rngs):
        self.weight = parameter(rngs, config.n_experts, n_out, n_in, scale=n_in**-0.5)


class Experts(nnx.Module):
    """The routed experts of one layer: gate w1, up w3 [E, F, D] and down w2 [E, D, F]."""

    def __init__(self, config: Config, *, rngs: Rngs):
        self.w1 = Stack(config, config.moe_dim, config.dim, rngs=rngs)
        self.w2 = Stack(config, config.dim, config.moe_dim, rngs=rngs)
        self.w3 = Stack(config, config.moe_dim, config.dim, rngs=rngs)
        self.config = config

    def __call__(self, x_TD: jax.Array, chosen_TK: jax.Array, weights_TK: jax.Array, *, strict: bool = False) -> jax.Array:
        """Weighted sum of the chosen experts' outputs, [T, D]; the weight is applied before w2.

        Few rows read the experts that each has chosen. Strict takes one row at a time in float32, so that the library meets the
        same shapes whatever the number of rows; else weights of fewer than eight bits meet quantised activations. Of many rows,
        those of one expert are multiplied together in bfloat16 on CUDA, when not strict; elsewhere each expert serves every row.
        """
        if x_TD.shape[0] > GATHER_ROWS:
            if strict or self.why_not_grouped():
                return self._one_by_one(x_TD, chosen_TK, weights_TK)
            y_TD: jax.Array = jax.lax.platform_dependent(
                x_TD, chosen_TK, weights_TK, cuda=self._grouped, default=self._one_by_one
            )
            return y_TD
        if not strict:
            return self._gathered(x_TD, chosen_TK, weights_TK, strict=False)
        rows = (x_TD[:, None], chosen_TK[:, None], weights_TK[:, None])
        return jax.lax.map(lambda row: self._gathered(*row, strict=True), rows)[:, 0]

    def _gathered(self, x_TD: jax.Array, chosen_TK: jax.Array, weights_TK: jax.Array, *, strict: bool) -> jax.Array:
        w1, w2, w3 = (_chosen(stack.weight.get_value(), chosen_TK) for stack in (self.w1, self.w2, self.w3))
        gate_TKF, up_TKF = (_gate_or_up(x_TD, weight, strict=strict) for weight in (w1, w3))
        return _down(swiglu(gate_TKF, up_TKF, self.config.swiglu_limit) * weights_TK[..., None], w2, strict=strict)

    def why_not_grouped(self) -> str | None:
        """Why many rows cannot be grouped by expert, in a few words; None when they can. The environment is read here."""
        if os.environ.get(OPT_OUT) == "1":
            return f"{OPT_OUT}=1"
        stacks = [stack.weight.get_value() for stack in (self.w1, self.w2, self.w3)]
        if not all(isinstance(stack, Quantized) for stack in stacks):
            return "float experts"
        return None if grouped_matmul.fits(self.config.dim, self.config.moe_dim) else "a width does not fit"

    def _grouped(self, x_TD: jax.Array, chosen_TK: jax.Array, weights_TK: jax.Array) -> jax.Array:
        w1, w2, w3 = (stack.weight.get_value() for stack in (self.w1, self.w2, self.w3))
        return grouped_matmul.experts(x_TD, chosen_TK, weights_TK, w1, w3, w2, limit=self.config.swiglu_limit)

    def _one_by_one(self, x_TD: jax.Array, chosen_TK: jax.Array, weights_TK: jax.Array) -> jax.Array:
        query = jnp.arange(x_TD.shape[0], dtype=jnp.int32)[:, None]
        share_TE = jnp.zeros((x_TD.shape[0], self.config.n_experts), jnp.float32).at[query, chosen_TK].add(weights_TK)

        def add_expert(y_TD: jax.Array, expert: tuple) -> tuple[jax.Array, None]:
            w1, w2, w3, share_T = expert
            gate = jnp.einsum("td,fd->tf", x_TD, as_float32(w1), preferred_element_type=jnp.float32)
            up = jnp.einsum("td,fd->tf", x_TD, as_float32(w3), preferred_element_type=jnp.float32)
            hidden = swiglu(gate, up, self.config.swiglu_limit) * share_T[:, None]
            return y_TD + jnp.einsum("tf,df->td", hidden, as_float32(w2), preferred_element_type=jnp.float32), None

        stacks = (self.w1.weight.get_value(), self.w2.weight.get_value(), self.w3.weight.get_value(), share_TE.T)
        return jax.lax.scan(add_expert, jnp.zeros_like(x_TD), stacks)[0]


class SharedExpert(nnx.Module):
    """The expert that every token uses, unweighted and clamped like the others."""

    def __init__(self, config: Config, *, rngs: Rngs):
        self.w1 = Linear(config.moe_dim, config.dim, rngs=rngs)
        self.w2 = Linear(config.dim, config.moe_dim, rngs=rngs)
        self.w3 = Linear(config.moe_dim, config.dim, rngs=rngs)
        self.limit = config.swiglu_limit

    def __call__(self, x_TD: jax.Array, *, strict: bool) -> jax.Array:
        gate, up = together(x_TD, self.w1, self.w3, strict=strict)
        return self.w2(swiglu(gate, up, self.limit), strict=strict)


class MoE(nnx.Module):
    """Router, routed experts and shared expert of one layer, float32 [T, D] → [T, D]."""

    def __init__(self, config: Config, hashed: bool, *, rngs: Rngs):
        self.gate = Router(config, hashed, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.shared_experts = SharedExpert(config, rngs=rngs)

    def __call__(self, x_TD: jax.Array, ids_T: jax.Array, *, strict: bool = False, record: Record = ignore) -> jax.Array:
        chosen_TK, weights_TK = self.gate(x_TD, ids_T, record)
        return self.experts(x_TD, chosen_TK, weights_TK, strict=strict) + self.shared_experts(x_TD, strict=strict)
