"""Adapters from flax modules to `Model(init, apply)`: the boundary behind which no other floor sees flax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen, nnx

from fedhyper_jax import _random
from fedhyper_jax.base import Model, Params

_REMEDY = (
    "a federated model has parameters only, since the server averages nothing else; "
    "use GroupNorm or LayerNorm for BatchNorm, and leave Dropout out"
)


def from_linen(module: linen.Module) -> Model:
    """A model from a flax linen module that is called as ``module(inputs)``.

    init(key, inputs) = module.init(key, inputs)["params"], without running the forward pass;
    apply(params, inputs) = module.apply({"params": params}, inputs).

    Args:
      module: a linen module whose only variables are parameters; switches (such as ``deterministic``) are its fields.

    Returns:
      ``Model(init, apply)``; params are the module's nested dict of arrays.

    Raises:
      TypeError: ``module`` is a class or no linen module.
      ValueError: from ``init``, if the module has other variables than parameters, as BatchNorm does.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> from fedhyper_jax.models import from_linen
      >>> model = from_linen(linen.Dense(3))
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4)))
      >>> print(model.apply(params, jnp.ones((2, 4))).shape)
      (2, 3)

    Reference:
      Flax, https://flax.readthedocs.io.
    """
    if not isinstance(module, linen.Module):
        raise TypeError(f"module must be an instance of flax.linen.Module such as linen.Dense(10), got {module!r}")

    def init(key, inputs) -> Params:
        variables = module.lazy_init(_random.unrolled(key), jax.ShapeDtypeStruct(jnp.shape(inputs), inputs.dtype))
        others = sorted(set(variables) - {"params"})
        if others:
            raise ValueError(f"{type(module).__name__} has the variables {', '.join(others)} next to params; {_REMEDY}")
        return variables.get("params", {})

    def apply(params, inputs):
        return module.apply({"params": params}, inputs)

    return Model(init, apply)


def from_nnx(module_or_factory: nnx.Module | Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """A model from a flax NNX module, or better from a factory ``rngs -> module``.

    The module is split once into its static graph and its parameters; apply(params, inputs) merges the two and calls
    the result, so params is a plain nested dict that means, optax and checkpoints take as it is.

    Args:
      module_or_factory: a factory such as ``lambda rngs: nnx.Linear(4, 3, rngs=rngs)``: ``init(key, inputs)`` calls it
        with ``nnx.Rngs(key)``. Or a module that exists (pretrained, say): ``init`` returns the parameters it has now,
        whatever the key.

    Returns:
      ``Model(init, apply)``; ``init`` does not read ``inputs``, since NNX modules know their sizes.

    Raises:
      TypeError: the argument is neither, or the factory returns no module.
      ValueError: the module holds other variables than ``nnx.Param``, as BatchNorm and Dropout do.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from fedhyper_jax.models import from_nnx
      >>> model = from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4)))
      >>> print(model.apply(params, jnp.ones((2, 4))).shape)
      (2, 3)

    Reference:
      Flax, https://flax.readthedocs.io.
    """
    given = module_or_factory
    if isinstance(given, nnx.Module):
        module = given
    elif callable(given) and not (isinstance(given, type) and issubclass(given, nnx.Module)):
        # Shapes only: the graph is needed before there is a key.
        module = nnx.eval_shape(lambda: given(nnx.Rngs(0)))
    else:
        raise TypeError(
            f"module_or_factory must be an nnx.Module or a function of nnx.Rngs that makes one, got {given!r}; "
            "e.g. lambda rngs: nnx.Linear(4, 3, rngs=rngs)"
        )
    if not isinstance(module, nnx.Module):
        raise TypeError(f"the factory must return an nnx.Module, got {module!r}")
    graph, initial, rest = nnx.split(module, nnx.Param, ...)
    others = sorted({type(v).__name__ for v in jax.tree.leaves(rest, is_leaf=lambda v: isinstance(v, nnx.Variable))})
    if others:
        raise ValueError(f"{type(module).__name__} has variables of type {', '.join(others)} next to Param; {_REMEDY}")
    # A copy, for the module may be trained on elsewhere.
    initial = jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(initial))

    def init(key, inputs) -> Params:
        if module is given:
            return initial
        return nnx.to_pure_dict(nnx.state(given(nnx.Rngs(_random.unrolled(key))), nnx.Param))

    def apply(params, inputs):
        return nnx.merge(graph, params)(inputs)

    return Model(init, apply)
