"""Adapters from flax modules to `Model`: the boundary behind which no other floor sees flax."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import errors, linen

from fedhyper_jax._threefry import unrolled
from fedhyper_jax.base import Model, Params

if TYPE_CHECKING:  # NNX takes longer to import than the rest of flax, and no model of this package is one
    from flax import nnx

_REMEDY = (
    "a federated model has parameters only, since the server averages nothing else; "
    "use GroupNorm or LayerNorm for BatchNorm"
)

_SWITCHES = {"train": True, "training": True, "is_training": True, "deterministic": False}
"""Usual names of the argument of ``__call__`` that says whether a module trains, and their values if it does."""


def from_linen(module: linen.Module, *, train: linen.Module | None = None) -> Model:
    """A model from a flax linen module that is called as ``module(inputs)``.

    init(key, inputs) = module.init(key, inputs)["params"], without running the forward pass;
    apply(params, inputs) = module.apply({"params": params}, inputs).

    A module that draws random numbers in training, as dropout does, has a switch: an argument ``train``, ``training``,
    ``is_training`` or ``deterministic`` of its ``__call__``; or two modules are given, which differ in a field. Then
    train(params, inputs, key) = module.apply({"params": params}, inputs, train=True, rngs={"params": key}), with
    another key for each round, client and step; evaluation draws nothing.

    Args:
      module: a linen module whose only variables are parameters.
      train: the module in training, with the same parameters, where it is another one, such as
        ``Net(deterministic=False)`` beside ``Net(deterministic=True)``.

    Returns:
      ``Model(init, apply, train)``; params are the module's nested dict of arrays.

    Raises:
      TypeError: ``module`` is a class or no linen module.
      ValueError: from ``init``, if the module has other variables than parameters, as BatchNorm does; from ``apply``,
        if it draws random numbers in evaluation.

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
    for given in (module, *(() if train is None else (train,))):
        if not isinstance(given, linen.Module):
            raise TypeError(f"module must be an instance of flax.linen.Module such as linen.Dense(10), got {given!r}")
    switches = [name for name in inspect.signature(type(module).__call__).parameters if name in _SWITCHES]
    training = {name: _SWITCHES[name] for name in switches}
    evaluating = {name: not value for name, value in training.items()}

    def init(key, inputs) -> Params:
        spec = jax.ShapeDtypeStruct(jnp.shape(inputs), inputs.dtype)
        variables = module.lazy_init(unrolled(key), spec, **evaluating)
        others = sorted(set(variables) - {"params"})
        if others:
            raise ValueError(f"{type(module).__name__} has the variables {', '.join(others)} next to params; {_REMEDY}")
        return variables.get("params", {})

    def apply(params, inputs):
        try:
            return module.apply({"params": params}, inputs, **evaluating)
        except errors.InvalidRngError as error:
            raise ValueError(
                f"{type(module).__name__} draws random numbers in evaluation; give its __call__ an argument 'train' "
                "that switches them off, or two modules: from_linen(Net(deterministic=True), "
                "train=Net(deterministic=False))"
            ) from error

    def apply_in_training(params, inputs, key):
        # flax takes the key named "params" for every name that has none of its own.
        of_training = module if train is None else train
        return of_training.apply({"params": params}, inputs, rngs={"params": key}, **training)

    return Model(init, apply, apply_in_training if switches or train is not None else None)


def from_nnx(module_or_factory: "nnx.Module | Callable[[nnx.Rngs], nnx.Module]") -> Model:
    """A model from a flax NNX module, or better from a factory ``rngs -> module``.

    The module is split once into its static graph and its parameters; apply(params, inputs) merges the two and calls
    the result, so params is a plain nested dict that means, optax and checkpoints take as it is.

    A module that draws random numbers, as dropout does, is called as it was made in training, with numbers that are new
    for each round, client and step, and after its ``eval()`` in evaluation.

    Args:
      module_or_factory: a factory such as ``lambda rngs: nnx.Linear(4, 3, rngs=rngs)``: ``init(key, inputs)`` calls it
        with ``nnx.Rngs(key)``. Or a module that exists (pretrained, say): ``init`` returns the parameters it has now,
        whatever the key.

    Returns:
      ``Model(init, apply, train)``; ``init`` does not read ``inputs``, since NNX modules know their sizes.

    Raises:
      TypeError: the argument is neither, or the factory returns no module.
      ValueError: the module holds other variables than ``nnx.Param`` and states of random numbers, as BatchNorm does.

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
    from flax import nnx

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
    graph, initial, random, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
    others = sorted({type(v).__name__ for v in jax.tree.leaves(rest, is_leaf=lambda v: isinstance(v, nnx.Variable))})
    if others:
        raise ValueError(f"{type(module).__name__} has variables of type {', '.join(others)} next to Param; {_REMEDY}")
    # A copy, for the module may be trained on elsewhere.
    initial = jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(initial))

    def init(key, inputs) -> Params:
        if module is given:
            return initial
        return nnx.to_pure_dict(nnx.state(given(nnx.Rngs(unrolled(key))), nnx.Param))

    streams, structure = jax.tree.flatten(random)

    def with_key(key):
        """The states of the random numbers: keys of the key, counts of 0."""
        return structure.unflatten(
            jax.random.split(jax.random.fold_in(key, index), leaf.shape)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for index, leaf in enumerate(streams)
        )

    evaluating = nnx.clone(module)
    evaluating.eval()
    graph_of_evaluation = nnx.graphdef(evaluating)

    def apply(params, inputs):
        return nnx.merge(graph_of_evaluation, params, with_key(jax.random.key(0)))(inputs)

    def train(params, inputs, key):
        return nnx.merge(graph, params, with_key(key))(inputs)

    return Model(init, apply, train if streams else None)
