"""Computing in a narrower type than parameters are kept in."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fedhyper_jax.base import Model


def compute_in(model: Model, dtype: DTypeLike) -> Model:
    """The same model, whose layers compute in another type; parameters, gradients and outputs keep theirs.

    apply(w, x) = cast(f(cast(w), cast(x))), where the inner casts go to ``dtype`` and the outer one back to the type of
    w. So losses, rates, pseudo-gradients and inner products stay float32, and only products inside the model are
    narrower; gradients are those of the narrow computation, cast to the type of w.

    Args:
      model: any model with float parameters.
      dtype: a floating-point type, e.g. ``jnp.bfloat16``.

    Returns:
      ``Model(init, apply)`` with the same parameters.

    Raises:
      ValueError: ``dtype`` is no floating-point type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fedhyper_jax.models import compute_in, mlp
      >>> model = compute_in(mlp(10), jnp.bfloat16)
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64)))
      >>> gradient = jax.jit(jax.grad(lambda w: model.apply(w, jnp.ones((2, 64))).sum()))(params)
      >>> print(params["dense_0"]["kernel"].dtype, gradient["dense_0"]["kernel"].dtype)
      float32 float32

    Reference: Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740 (without loss scaling, which bfloat16's
      range makes unnecessary).
    """
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype must be a floating-point type such as 'bfloat16', got {dtype!r}") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating-point type such as 'bfloat16', got {dtype.name!r}")

    def narrow(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def in_dtype(function):
        def call(params, inputs, *key):
            outputs = function(jax.tree.map(narrow, params), narrow(inputs), *key)
            return outputs.astype(jnp.result_type(*jax.tree.leaves(params)))

        return call

    return Model(model.init, in_dtype(model.apply), model.train and in_dtype(model.train))
