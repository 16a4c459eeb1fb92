"""Made-up federations of known heterogeneity: Synthetic(α, β) classification and quadratics with a known optimum."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedhyper_jax import _validate
from fedhyper_jax.base import Batch
from fedhyper_jax.data.dataset import Dataset
from fedhyper_jax.data.federated import FederatedData, pack
from fedhyper_jax.data.partition import check_seed


def synthetic_logistic(
    num_clients: int = 30,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    iid: bool = False,
    num_features: int = 60,
    num_classes: int = 10,
    examples_per_client: int | Sequence[int] | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Synthetic(α, β): each client labels its own inputs with its own softmax model.

    y = argmax(W_kᵀ x + b_k), entries of W_k and b_k ~ N(u_k, 1), u_k ~ N(0, α²); x ~ N(v_k, Σ), Σ_jj = j^{−1.2},
    entries of v_k ~ N(B_k, 1), B_k ~ N(0, β²). So α moves the clients' models apart, β their inputs. **α and β are
    standard deviations here**, as in FedProx' code (``np.random.normal(0, alpha)``), although the paper writes N(0, α);
    for 0 and 1, the values in use, both readings agree. α = β = 0 still gives every client a model and inputs of its
    own; ``iid=True`` shares one W, b and v = 0.

    Args:
      num_clients: M.
      alpha: standard deviation of u_k, ≥ 0.
      beta: standard deviation of B_k, ≥ 0.
      iid: whether all clients share one model and one input law; needs alpha = beta = 0.
      num_features: d.
      num_classes: C.
      examples_per_client: training and test examples of each client together, one number or M of them, each ≥ 2; None
        draws ⌊exp(z)⌋ + 50, z ~ N(4, 2²), as FedProx does.
      test_fraction: share of each client's examples held out, rounded, at least one and never all.
      seed: of everything. Client k's data depends on the seed and k alone, not on the number of clients.

    Returns:
      A `Dataset` with ``train_client_ids`` and ``test_client_ids`` in 0 … M − 1; client k has the same model in both.

    Raises:
      ValueError: alpha or beta negative or not finite, or not 0 with iid; sizes that do not fit.

    Example:
      >>> dataset = synthetic_logistic(3, alpha=0.5, beta=0.5, examples_per_client=20, seed=0)
      >>> dataset.train["x"].shape, np.bincount(dataset.test_client_ids).tolist()
      ((54, 60), [2, 2, 2])

    Reference: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks",
      arXiv 1812.06127, section 5.1; after Caldas et al., "LEAF: A Benchmark for Federated Settings", arXiv 1812.01097.
    """
    _validate.positive_integer(num_clients=num_clients, num_features=num_features, num_classes=num_classes)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (np.isscalar(value) and np.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and ≥ 0, got {value!r}; it is a standard deviation, such as 1.0")
    _validate.fraction(test_fraction=test_fraction)
    check_seed(seed)
    if iid and (alpha or beta):
        raise ValueError(
            f"iid=True shares one model and one input law, got alpha={alpha!r} and beta={beta!r}; set both to 0"
        )
    shared, *streams = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(num_clients + 1))
    sizes = _sizes(examples_per_client, num_clients, 2)
    deviations = np.arange(1, num_features + 1) ** -0.6  # square roots of Σ_jj
    if iid:
        common = _client_law(shared, 0.0, 0.0, num_features, num_classes)[:2]
    parts = {"train": [], "test": []}
    for client, rng in enumerate(streams):
        size = int(rng.lognormal(4.0, 2.0)) + 50 if sizes is None else sizes[client]
        weights, biases, centre = _client_law(rng, alpha, beta, num_features, num_classes)
        if iid:
            weights, biases, centre = *common, np.zeros(num_features)
        x = (centre + deviations * rng.standard_normal((size, num_features))).astype(np.float32)
        y = (x @ weights + biases).argmax(axis=1).astype(np.int32)  # softmax keeps the order
        held_out = min(max(round(test_fraction * size), 1), size - 1)
        parts["test"].append((x[:held_out], y[:held_out], np.full(held_out, client)))
        parts["train"].append((x[held_out:], y[held_out:], np.full(size - held_out, client)))
    train, train_client_ids = _joined(parts["train"])
    test, test_client_ids = _joined(parts["test"])
    return Dataset(
        name="synthetic_logistic",
        train=train,
        test=test,
        num_classes=num_classes,
        input_shape=(num_features,),
        source=f"Synthetic({alpha:g}, {beta:g}){' IID' if iid else ''}, seed {seed}",
        train_client_ids=train_client_ids,
        test_client_ids=test_client_ids,
    )


def _client_law(
    rng: np.random.Generator, alpha: float, beta: float, num_features: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W_k, b_k and v_k; W_k and b_k share u_k, as in FedProx' code."""
    u, b = rng.normal(0.0, alpha), rng.normal(0.0, beta)
    weights = rng.normal(u, 1.0, (num_features, num_classes))
    biases = rng.normal(u, 1.0, num_classes)
    return weights, biases, rng.normal(b, 1.0, num_features)


def _joined(clients: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    x, y, owner = (np.concatenate(column) for column in zip(*clients, strict=True))
    return {"x": x, "y": y}, owner


def _sizes(examples_per_client: Any, num_clients: int, smallest: int) -> list[int] | None:
    """One size a client, from one number or a sequence of them."""
    if examples_per_client is None:
        return None
    sizes = np.asarray(examples_per_client)
    if sizes.shape not in ((), (num_clients,)) or sizes.dtype.kind not in "iu" or (sizes < smallest).any():
        raise ValueError(
            f"examples_per_client must be one integer ≥ {smallest} or {num_clients} of them, "
            f"got {examples_per_client!r}; give e.g. 100"
        )
    return np.broadcast_to(sizes, num_clients).tolist()


def quadratic_loss(params: Float[Array, " dimension"], batch: Batch) -> Float[Array, " batch"]:
    """Half the squared residual of each example, ½ (x_iᵀ w − y_i)².

    Args:
      params: w, shape (dimension,).
      batch: ``"x"`` (batch, dimension) rows, ``"y"`` (batch,) targets.

    Returns:
      (batch,) losses.

    Example:
      >>> quadratic_loss(jnp.array([1.0, 2.0]), {"x": jnp.eye(2), "y": jnp.zeros(2)})
      Array([0.5, 2. ], dtype=float32)
    """
    return 0.5 * (batch["x"] @ params - batch["y"]) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QuadraticProblem:
    """A federation of quadratics and all that theory asks about it; made by `quadratic_clients`.

    Attributes:
      data: the same problem as examples, for the ordinary training machinery with ``loss_fn``.
      loss_fn: `quadratic_loss`; its mean over client m's examples is F_m(w) + noise²/2.
      optimum: w*, (dimension,) float64, where Σ p_m ∇F_m vanishes.
      smoothness: L, the largest eigenvalue of every A_m and of Σ p_m A_m.
      strong_convexity: μ, the smallest, likewise.
      dissimilarity: ζ² = Σ p_m ‖∇F_m(w*)‖².
      hessians: A_m, (clients, dimension, dimension) float64.
      centers: c_m, (clients, dimension) float64, the optimum of each client.
      weights: p_m = n_m / N, (clients,) float64.
      noise: standard deviation of the residuals at c_m.
    """

    data: FederatedData
    loss_fn: Callable[[Array, Batch], Array]
    optimum: np.ndarray
    smoothness: float
    strong_convexity: float
    dissimilarity: float
    hessians: np.ndarray
    centers: np.ndarray
    weights: np.ndarray
    noise: float

    def __repr__(self) -> str:
        return (
            f"<QuadraticProblem: {len(self.weights)} clients in {len(self.optimum)} dimensions, L={self.smoothness:g}, "
            f"μ={self.strong_convexity:g}, ζ²={self.dissimilarity:g}, noise={self.noise:g}>"
        )

    @property
    def initial_params(self) -> Float[Array, " dimension"]:
        """The start w = 0."""
        return jnp.zeros(len(self.optimum))

    @property
    def optimal_value(self) -> float:
        """F(w*) = Σ p_m ½ (w* − c_m)ᵀ A_m (w* − c_m)."""
        offset = self.optimum - self.centers
        return float(0.5 * np.einsum("m,mi,mij,mj", self.weights, offset, self.hessians, offset))

    def suboptimality(self, params: Float[Array, " dimension"]) -> Float[Array, ""]:
        """F(w) − F(w*) = ½ (w − w*)ᵀ (Σ p_m A_m) (w − w*), without cancellation near the optimum."""
        offset = jnp.asarray(params) - jnp.asarray(self.optimum)
        return 0.5 * offset @ (jnp.asarray(np.einsum("m,mij", self.weights, self.hessians)) @ offset)

    def objective(self, params: Float[Array, " dimension"]) -> Float[Array, ""]:
        """F(w) = Σ p_m F_m(w)."""
        return self.suboptimality(params) + self.optimal_value


def quadratic_clients(
    num_clients: int = 10,
    *,
    dimension: int = 10,
    smoothness: float = 10.0,
    strong_convexity: float = 1.0,
    dissimilarity: float = 1.0,
    examples_per_client: int | Sequence[int] | None = None,
    noise: float = 0.0,
    shared_hessian: bool = False,
    seed: int = 0,
) -> QuadraticProblem:
    """Quadratic clients whose optimum, smoothness, strong convexity and dissimilarity are exactly those asked for.

    F_m(w) = ½ (w − c_m)ᵀ A_m (w − c_m). All A_m share the eigenvectors of their extreme eigenvalues μ and L and differ
    in between (spectrum in [μ, L]), so Σ p_m A_m has exactly the extremes μ and L too. w* ~ N(0, I); gradients g_m at
    w* are drawn, centred to Σ p_m g_m = 0 and scaled to Σ p_m ‖g_m‖² = ζ², and c_m = w* − A_m^{−1} g_m.

    As examples: rows X_m = √n_m U_m A_m^{1/2} with U_m random orthonormal columns, hence X_mᵀX_m / n_m = A_m, and
    targets X_m c_m + e_m with U_mᵀ e_m = 0, ‖e_m‖² = n_m noise². So full-batch gradients of `quadratic_loss` are those
    of F_m, and minibatches are noisy.

    Args:
      num_clients: M.
      dimension: d.
      smoothness: L ≥ μ.
      strong_convexity: μ > 0; equal to L where d = 1.
      dissimilarity: ζ² ≥ 0, a squared norm; 0 gives every client the same optimum. With one client it must be 0.
      examples_per_client: n_m ≥ d, one number or M of them (≥ d + 1 with noise); None is 2d.
      noise: standard deviation of the residuals at c_m, ≥ 0; 0 lets a client's gradient noise vanish at c_m.
      shared_hessian: whether all clients have one A.
      seed: of all draws.

    Returns:
      A `QuadraticProblem`.

    Raises:
      ValueError: L < μ, μ ≤ 0, ζ² < 0, or combinations that cannot exist.

    Example:
      >>> problem = quadratic_clients(4, dimension=3, smoothness=5.0, strong_convexity=0.5, dissimilarity=2.0, seed=0)
      >>> problem
      <QuadraticProblem: 4 clients in 3 dimensions, L=5, μ=0.5, ζ²=2, noise=0>
      >>> bool(problem.suboptimality(problem.optimum) == 0)
      True

    Reference: the dissimilarity is that of Koloskova, Loizou, Boreiri, Jaggi, Stich, "A Unified Theory of Decentralized
      SGD with Changing Topology and Local Updates", arXiv 2003.10422.
    """
    check_seed(seed)
    _check_quadratic(num_clients, dimension, smoothness, strong_convexity, dissimilarity=dissimilarity, noise=noise)
    smallest = dimension + (noise > 0)
    sizes = _sizes(2 * dimension if examples_per_client is None else examples_per_client, num_clients, smallest)
    weights = np.array(sizes) / sum(sizes)
    rng = np.random.default_rng(seed)

    roots = _roots(rng, 1 if shared_hessian else num_clients, dimension, strong_convexity, smoothness)
    factors = roots * num_clients if shared_hessian else roots  # A_m^{1/2}
    hessians = np.stack([factor @ factor for factor in factors])

    optimum = rng.standard_normal(dimension)
    gradients = np.zeros((num_clients, dimension))
    if dissimilarity > 0:
        gradients = rng.standard_normal((num_clients, dimension))
        gradients -= weights @ gradients
        gradients *= np.sqrt(dissimilarity / (weights @ (gradients**2).sum(axis=1)))
    centers = optimum - np.linalg.solve(hessians, gradients[..., None])[..., 0]

    examples = [_least_squares(rng, *client, noise) for client in zip(sizes, factors, centers, strict=True)]
    rows, targets = zip(*examples, strict=True)
    client_rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return QuadraticProblem(
        data=pack({"x": np.concatenate(rows), "y": np.concatenate(targets)}, client_rows),
        loss_fn=quadratic_loss,
        optimum=optimum,
        smoothness=float(smoothness),
        strong_convexity=float(strong_convexity),
        dissimilarity=float(dissimilarity),
        hessians=hessians,
        centers=centers,
        weights=weights,
        noise=float(noise),
    )


def _check_quadratic(num_clients, dimension, smoothness, strong_convexity, *, dissimilarity, noise) -> None:
    """Raises ValueError for what cannot be, or not together."""
    _validate.positive_integer(num_clients=num_clients, dimension=dimension)
    _validate.positive(smoothness=smoothness, strong_convexity=strong_convexity)
    for name, value in (("dissimilarity", dissimilarity), ("noise", noise)):
        if not (np.isscalar(value) and np.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and ≥ 0, got {value!r}; 0 leaves it out")
    if smoothness < strong_convexity or (dimension == 1 and smoothness != strong_convexity):
        raise ValueError(
            f"smoothness must be ≥ strong_convexity, and equal to it in one dimension, got {smoothness!r} and "
            f"{strong_convexity!r} in {dimension}; raise smoothness or dimension"
        )
    if num_clients == 1 and dissimilarity > 0:
        raise ValueError(f"dissimilarity must be 0 with one client, got {dissimilarity!r}; use more clients")


def _roots(rng: np.random.Generator, number: int, dimension: int, low: float, high: float) -> list[np.ndarray]:
    """Square roots of matrices that share the eigenvectors of their extreme eigenvalues, and differ in between."""
    basis, roots = _orthonormal(rng, dimension, dimension), []
    for _ in range(number):
        spectrum, vectors = _spectrum(rng, dimension, low, high), basis
        if dimension > 2:  # rotate between the extreme eigenvectors
            inner = basis[:, 1:-1] @ _orthonormal(rng, dimension - 2, dimension - 2)
            vectors = np.concatenate([basis[:, :1], inner, basis[:, -1:]], axis=1)
        roots.append((vectors * np.sqrt(spectrum)) @ vectors.T)
    return roots


def _least_squares(rng: np.random.Generator, size: int, root: np.ndarray, center: np.ndarray, noise: float):
    """Rows and targets whose mean of half squares has the Hessian ``root`` squared and its minimum at ``center``."""
    dimension = len(center)
    columns = _orthonormal(rng, size, dimension + (noise > 0))
    x = np.sqrt(size) * columns[:, :dimension] @ root
    residual = noise * np.sqrt(size) * columns[:, -1] if noise > 0 else 0.0
    return x, x @ center + residual


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) with orthonormal columns, uniform over such matrices up to signs."""
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def _spectrum(rng: np.random.Generator, dimension: int, low: float, high: float) -> np.ndarray:
    """Eigenvalues ascending: both ends exactly, log-uniform between."""
    inner = np.sort(np.exp(rng.uniform(np.log(low), np.log(high), max(dimension - 2, 0))))
    return np.concatenate([[low], inner, [high]])[-dimension:]
