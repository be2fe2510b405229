"""`check`: a user's own model on meshes, compared with the same model on one device."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from usp_jax.checking.alterations import Arrays
from usp_jax.checking.diagnosis import Probe, loss_causes
from usp_jax.checking.program import B, MakeLoss, P, Program, sizes_of, taken_apart
from usp_jax.checking.proportions import Values, gradient_causes, relative_errors
from usp_jax.mesh import make_mesh

# Relative errors of losses and gradients, by the least precise dtype among them.
TOLERANCES = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
USUAL = (
    "The usual causes are positions that restart on each shard (RoPE), labels that are "
    "shifted twice, not at all or within each shard, a mean for each shard instead of "
    "one over all tokens, documents that are ignored, an array that is not in the "
    "order of the layout, and sums over devices that are left out or done twice. No "
    "probe showed one of them. A batch that holds labels, positions and documents as "
    "arrays of their own can show more than one that holds tokens only."
)


@dataclasses.dataclass(frozen=True)
class MeshComparison:
    """The loss and the gradients on one mesh, compared with one device.

    Attributes:
      mesh: the mesh.
      loss: the loss on it.
      expected_loss: the loss on one device.
      loss_error: their difference, over the loss on one device.
      gradient_errors: for each parameter, by its path and in the tree's order, the
        largest difference of its gradient, over the largest value of this gradient, or
        over 1 % of the largest value of all gradients if that is more.
      tolerance: the largest error that is not a fault.
      causes: what probes showed to be wrong; empty if nothing is, or none showed it.
    """

    mesh: Mesh
    loss: float
    expected_loss: float
    loss_error: float
    gradient_errors: tuple[tuple[str, float], ...]
    tolerance: float
    causes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the loss and all gradients are equal within the tolerance."""
        return self.loss_error <= self.tolerance and self.first is None

    @property
    def first(self) -> tuple[str, float] | None:
        """The first parameter whose gradient differs, in the tree's order."""
        off = (item for item in self.gradient_errors if item[1] > self.tolerance)
        return next(off, None)

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter whose gradient differs most."""
        return max(self.gradient_errors, key=lambda item: item[1])

    def __str__(self) -> str:
        sizes = " × ".join(
            f"{name} {size}" for name, size in sizes_of(self.mesh).items()
        )
        worst = "{}: {:.0e}".format(*self.worst)
        if self.ok:
            return (
                f"{sizes}: equal to one device (loss {self.loss:.6g}; error "
                f"{self.loss_error:.0e}, of gradients at most {worst})"
            )
        lines = [
            f"{sizes}: DIFFERS from one device",
            f"  loss {self.loss:.10g}, on one device {self.expected_loss:.10g} (error "
            f"{self.loss_error:.0e}, tolerance {self.tolerance:.0e})",
        ]
        if self.first is not None:
            first = "{}: {:.0e}".format(*self.first)
            lines.append(f"  first gradient that differs {first}; worst {worst}")
        lines += [f"  likely: {cause}" for cause in self.causes] or [f"  {USUAL}"]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The report of `check`; `print` it, or `assert report.ok, report`.

    Attributes:
      meshes: the comparison on each mesh.
    """

    meshes: tuple[MeshComparison, ...]

    @property
    def ok(self) -> bool:
        """Whether all meshes agree with one device."""
        return all(mesh.ok for mesh in self.meshes)

    def __str__(self) -> str:
        return "\n".join(map(str, self.meshes))


def check(
    make_loss: MakeLoss[P, B],
    params: P,
    batch: B,
    meshes: Sequence[Mesh] | None = None,
    *,
    tolerance: float | None = None,
) -> Comparison:
    """Compares a model's loss and gradients on meshes with those on one device.

    For a model of your own, with its own way of splitting the sequence. The functions
    are compiled and run, with matrix products in full precision. If a loss differs,
    some hundred more runs on small changes of the batch look for the cause.

    A mistake can only show if the model and the batch are sensitive to it: use several
    documents in a row, some padding, and parameters that are not tiny. Float64
    (`jax_enable_x64`) shows the smallest mistakes.

    Args:
      make_loss: returns the loss, a function of (params, batch), for a mesh, or for one
        device if it is given None. Each loss permutes the same batch as it needs. It
        runs inside `jax.jit`, and under `jax.set_mesh` of its mesh.
      params: any pytree. Its floating arrays are differentiated.
      batch: any pytree with arrays in natural order. Causes are easiest to find if
        tokens, labels, segment ids and positions, [B, T], are arrays of their own, and
        T is a multiple of twice the number of devices, and six times it or more.
      meshes: the meshes to compare. None takes (ring, ulysses) over all devices: 1 × n,
        n × 1, and the most even split of n both ways round.
      tolerance: largest relative error of the loss and of each gradient. None takes
        1e-8 in float64 and 1e-4 in float32, of the loss and the gradients; a model that
        computes in 16 bits needs 3e-2.

    Returns:
      The report: for each mesh, the errors, the first parameter whose gradient differs
        and the likely causes.

    Raises:
      ValueError: there is one device only or several processes, `meshes` is empty,
        `jax.set_mesh` is active, the loss is no finite real scalar, or no parameter is
        floating.

    Example:
      ```python
      def make_loss(mesh):
          def loss(params, batch):
              if mesh is not None:
                  to_stored = lambda x: usp_jax.to_layout(x, "zigzag", mesh)
                  batch = jax.tree.map(to_stored, batch)
              return my_loss(params, batch, mesh)
          return loss

      report = usp_jax.check(make_loss, params, batch)
      assert report.ok, report
      ```
    """
    if jax.process_count() > 1:
        raise ValueError("check runs in one process: use fake CPU devices")
    if not (ambient := jax.sharding.get_abstract_mesh()).empty:
        raise ValueError(
            f"check runs on one device, too: call it outside jax.set_mesh({ambient})"
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"{tolerance=} must be a positive number, or None")
    meshes = _default_meshes() if meshes is None else tuple(meshes)
    if not meshes or not all(isinstance(mesh, Mesh) for mesh in meshes):
        raise ValueError(f"meshes={meshes} must be one or more jax.sharding.Mesh")
    arrays, rebuilt = taken_apart(batch)
    one = Program(make_loss, None, params, rebuilt)
    expected = one.values(arrays)
    if not math.isfinite(expected.loss):
        raise ValueError(f"the loss on one device is {expected.loss}: nothing to check")
    if tolerance is None:
        tolerance = max(TOLERANCES.get(name, 1e-8) for name in expected.dtypes)
    found = []
    for mesh in meshes:
        program = Program(make_loss, mesh, params, rebuilt)
        found.append(_compared(one, program, arrays, expected, tolerance))
    return Comparison(tuple(found))


def _default_meshes() -> tuple[Mesh, ...]:
    """Meshes of all devices: ring only, Ulysses only, and the most even split."""
    devices = jax.device_count()
    if devices == 1:
        raise ValueError(
            "there is one device, which check compares with meshes of several: call "
            "jax.config.update('jax_num_cpu_devices', 8) before the first use of jax"
        )
    low = max(n for n in range(1, math.isqrt(devices) + 1) if devices % n == 0)
    rings = dict.fromkeys((1, low, devices // low, devices))
    return tuple(make_mesh(ring=ring, ulysses=devices // ring) for ring in rings)


def _compared(
    one: "Program",
    program: "Program",
    arrays: Arrays,
    expected: Values,
    tolerance: float,
) -> MeshComparison:
    assert program.mesh is not None
    actual = program.values(arrays)
    size = abs(expected.loss) or 1.0
    error = abs(actual.loss - expected.loss) / size
    comparison = MeshComparison(
        program.mesh,
        actual.loss,
        expected.loss,
        error if math.isfinite(error) else math.inf,
        relative_errors(expected, actual),
        tolerance,
    )
    if comparison.ok or not math.isfinite(actual.loss):
        return comparison
    causes = gradient_causes(expected, actual, sizes_of(program.mesh), tolerance)
    if not causes and comparison.loss_error > tolerance:
        # Rounding is about a tenth of what is tolerated.
        noise = tolerance * size / 10
        devices = program.mesh.size
        probe = Probe(one.loss, program.loss, arrays, noise, devices)
        causes = loss_causes(probe)
    return dataclasses.replace(comparison, causes=causes)
