"""Mixture of experts: hash and score routing, clamped SwiGLU experts, one shared expert.

Source: `Gate`, `Expert` and `MoE` of the reference inference code; the shared expert is clamped as in its July revision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds4jax.config import Config
from ds4jax.model import paths
from ds4jax.model.layers import Linear, Rngs, constant, parameter, together
from ds4jax.model.tape import Record, ignore
from pallas_kernels.core.dispatch import opt_out
from pallas_kernels.core.limits import MAX_ROWS
from pallas_kernels.experts import meaning, prefill, router
from pallas_kernels.formats import Q8_0, Quantized
from pallas_kernels.formats.stored import Stored
from pallas_kernels.linear.cut import gathered, rows_of
from pallas_kernels.linear.meaning import AS_FLOAT32

# Arithmetic of the experts for few rows. Q8_0 experts keep float32 activations: for a small model, quantising takes a CPU longer
# than the product.
STRICT: dict[str, Any] = {"in_float": (Quantized,), "precision": "highest"}
QUICK: dict[str, Any] = {"in_float": (Q8_0,)}


class Router(nnx.Module):
    """Chooses K experts for each token and weighs them; `hashed` layers look the experts up by token id."""

    def __init__(self, config: Config, hashed: bool, *, rngs: Rngs):
        self.weight = parameter(rngs, config.n_experts, config.dim, scale=config.dim**-0.5)
        if hashed:
            self.tid2eid = constant(rngs, np.zeros((config.vocab_size, config.n_active), np.int32))
        else:
            self.bias = parameter(rngs, config.n_experts)
        self.config, self.hashed = config, hashed

    def __call__(
        self, x_TD: jax.Array, ids_T: jax.Array, record: Record = ignore, *, strict: bool = True, decoding: bool = False,
        kernel: bool = False,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """Expert ids int32 [T, K] and weights float32 [T, K] of rows float32 [T, D]. The bias affects the choice alone.

        Of a chunk of a prompt, the product uses tensor cores on CUDA unless `strict`.

        Args:
            kernel: static; a kernel chooses on CUDA, with the bits of the modules, but without gradients.
        """
        weight_ED = self.weight.get_value().astype(jnp.float32)

        def product(x_TD: jax.Array, precision: jax.lax.PrecisionLike = None) -> jax.Array:
            contract = (((1,), (1,)), ((), ()))
            return jax.lax.dot_general(x_TD, weight_ED, contract, precision=precision, preferred_element_type=jnp.float32)

        if strict or decoding or opt_out():
            logits_TE = product(x_TD)
        else:
            quick = functools.partial(product, precision=AS_FLOAT32)
            logits_TE = jax.lax.platform_dependent(x_TD, cuda=quick, default=product)
        scores_TE = meaning.scores(logits_TE)
        if self.hashed:
            chosen_TK = self.tid2eid.get_value()[ids_T]
            best_TK = meaning.scores_of(scores_TE, chosen_TK)
        else:
            given = scores_TE, self.bias.get_value()
            on_cuda, default = (functools.partial(way, active=self.config.n_active) for way in (router.choose, meaning.choose))
            found = jax.lax.platform_dependent(*given, cuda=on_cuda, default=default) if kernel else default(*given)
            chosen_TK, best_TK = found
        weights_TK = meaning.weigh(best_TK, self.config.route_scale)
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

    def __call__(
        self, x_TD: jax.Array, chosen_TK: jax.Array, weights_TK: jax.Array, *, strict: bool = False, decoding: bool = False
    ) -> jax.Array:
        """Weighted sum of the chosen experts' outputs, [T, D]; the weight is applied before w2.

        If w2 is cut, only the outputs of this device's rows are made, [T, D/P].

        A decode step: each row reads its chosen experts. Strict computes in float32; otherwise weights of fewer than eight bits
        are multiplied by quantised activations. More than eight rows are computed eight at a time. Formats without a kernel, and
        in strict mode all of a model that is not small, take one row at a time: its decoded experts take 0.5 GB in V4-Flash.
        A chunk of a prompt: on CUDA and not strict, rows are grouped by expert and multiplied in bfloat16; on Hopper the weights
        are read as they are stored. Otherwise every expert is computed for all rows.

        Args:
            decoding: static; as in `Rows`.
        """
        stacks, limit = self._stacks(), self.config.swiglu_limit

        def grouped(x_TD: jax.Array, chosen_TK: jax.Array, weights_TK: jax.Array) -> jax.Array:
            if paths.why_not_stored_experts(self.config, stacks, jax.devices()[0].device_kind):
                return prefill.experts(x_TD, chosen_TK, weights_TK, *stacks, limit=limit)
            # Imported where it runs: Mosaic GPU takes most of a second.
            from pallas_kernels.experts import hopper

            return hopper.experts(x_TD, chosen_TK, weights_TK, *stacks, limit=limit)

        def one_by_one(x_TD: jax.Array, chosen_TK: jax.Array, weights_TK: jax.Array) -> jax.Array:
            return meaning.one_by_one(x_TD, chosen_TK, weights_TK, *stacks, limit=limit)

        def gathered(x_TD: jax.Array, chosen_TK: jax.Array, weights_TK: jax.Array) -> jax.Array:
            how = STRICT if strict else QUICK
            return meaning.gathered(x_TD, chosen_TK, weights_TK, *stacks, limit=limit, **how)

        if not decoding:
            if self.why_not_grouped(strict=strict, decoding=decoding):
                return one_by_one(x_TD, chosen_TK, weights_TK)
            y_TD: jax.Array = jax.lax.platform_dependent(x_TD, chosen_TK, weights_TK, cuda=grouped, default=one_by_one)
            return y_TD
        here = [rows_of(stack) for stack in stacks]
        # Single rows in a loop only where memory asks for it: in a loop, XLA sums their products in another order on some CPUs.
        alone = not all(map(meaning.small, here)) if strict else any(isinstance(rows, Stored) for rows in here)
        return _in_groups(gathered, (x_TD, chosen_TK, weights_TK), 1 if alone else MAX_ROWS)

    def why_not_grouped(self, *, strict: bool, decoding: bool) -> str | None:
        """Why the prefill kernels cannot run a call's experts; None when they can."""
        return paths.why_not_grouped_experts(self.config, self._stacks(), decoding=decoding, strict=strict)

    def _stacks(self) -> tuple[Any, ...]:
        return tuple(stack.weight.get_value() for stack in (self.w1, self.w3, self.w2))


def _in_groups(function: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], size: int) -> jax.Array:
    """`function` of arrays [T, ..], `size` rows at a time; zeros fill the last group."""
    count = arrays[0].shape[0]
    if 1 < size and count <= size:
        return function(*arrays)

    def grouped(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, [(0, -count % size), *[(0, 0)] * (array.ndim - 1)])
        return padded.reshape(-1, size, *array.shape[1:])

    y: jax.Array = jax.lax.map(lambda group: function(*group), tuple(map(grouped, arrays)))
    return y.reshape(-1, *y.shape[2:])[:count]


class SharedExpert(nnx.Module):
    """The expert that every token uses, without a weight and clamped like the others: float32 [T, D] → [T, D].

    Of a cut w2 only the outputs of this device's rows are made, as by the routed experts.
    """

    def __init__(self, config: Config, *, rngs: Rngs):
        self.w1 = Linear(config.moe_dim, config.dim, rngs=rngs)
        self.w2 = Linear(config.dim, config.moe_dim, rngs=rngs)
        self.w3 = Linear(config.moe_dim, config.dim, rngs=rngs)
        self.limit = config.swiglu_limit

    def __call__(self, x_TD: jax.Array, *, strict: bool, decoding: bool = False) -> jax.Array:
        gate, up = together(x_TD, self.w1, self.w3, strict=strict, decoding=decoding)
        hidden_TF = gathered(meaning.swiglu(gate, up, self.limit), self.w3.weight.get_value())
        return self.w2.part(hidden_TF, strict=strict, decoding=decoding)


class MoE(nnx.Module):
    """Router, routed experts and shared expert of one layer, float32 [T, D] → [T, D]."""

    def __init__(self, config: Config, hashed: bool, *, rngs: Rngs):
        self.gate = Router(config, hashed, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.shared_experts = SharedExpert(config, rngs=rngs)

    def __call__(
        self, x_TD: jax.Array, ids_T: jax.Array, *, strict: bool = False, decoding: bool = False, record: Record = ignore
    ) -> jax.Array:
        how = {"strict": strict, "decoding": decoding}
        kernel = self.experts.why_not_grouped(**how) is None
        chosen_TK, weights_TK = self.gate(x_TD, ids_T, record, kernel=kernel, **how)
        y_TD = self.experts(x_TD, chosen_TK, weights_TK, **how) + self.shared_experts(x_TD, **how)
        return gathered(y_TD, self.shared_experts.w2.weight.get_value())
