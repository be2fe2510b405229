"""Imports point one way, and the core needs jax, numpy and jaxtyping only.

train -> models, nn, plan -> usp -> ring, ulysses -> kernels -> masking, layout, mesh,
merge. Read from the source with `ast`, so that an import inside a function counts too.
"""

import ast
import functools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE_PACKAGES = {"jax", "numpy", "jaxtyping"}

# A module may import modules of its own row or of a row above. A new module fails the
# test until it has a place here.
LAYERS = (
    {
        "usp_jax._compat",
        "usp_jax.checks",
        "usp_jax.command_line",
        "usp_jax.compiled",
        "usp_jax.placement",
        "usp_jax.plugins",
        "usp_jax.units",
        "usp_jax.varying",
    },
    {
        "usp_jax.context",
        "usp_jax.flags",
        "usp_jax.gathering",
        "usp_jax.layout",
        "usp_jax.masking",
        "usp_jax.merge",
        "usp_jax.mesh",
        "usp_jax.shards",
    },
    {
        "usp_jax.checking",
        "usp_jax.first_order",
        "usp_jax.kernels",
        "usp_jax.reference",
    },
    {"usp_jax.halo", "usp_jax.rolling", "usp_jax.ulysses"},
    {"usp_jax.arguments", "usp_jax.pages"},
    {"usp_jax.ring", "usp_jax.ringwork"},
    {"usp_jax.call", "usp_jax.chunk_assignment"},
    {"usp_jax.balancing", "usp_jax.usp"},
    {"usp_jax.head_groups", "usp_jax.latent", "usp_jax.windowed"},
    {"usp_jax.cache", "usp_jax.options"},
    {"usp_jax.attention", "usp_jax.decode"},
    {"usp_jax.delta", "usp_jax.joint", "usp_jax.latent_attention"},
    {"usp_jax"},
    {"usp_jax.aot", "usp_jax.models", "usp_jax.nn"},
    {"usp_jax.plan"},
    {"train.chat_template", "train.config", "train.files", "train.words"},
    {"train.data", "train.log"},
    {"train.preferences", "train.state", "train.step"},
    {"train.evaluation"},
    {"train"},
)
# Packages that parts outside the core may import in addition to the core's.
EXTRA_PACKAGES = {
    # Imported when one of these kernels runs.
    "usp_jax.kernels.fa2_fa3": {"dew_flash_attn"},
    "usp_jax.kernels.fa4": {"fa4_jax"},
    "usp_jax.nn": {"flax"},
    "usp_jax.models": {"flax"},
    "usp_jax.models.hf": {"flax", "safetensors"},
    # The training step, which the planner compiles.
    "usp_jax.models.optimizer": {"optax"},
    "usp_jax.models.training": {"flax", "optax"},
    # The planner's command line: tables, plots, and the step that the compiler checks.
    "usp_jax.plan": {"flax", "matplotlib", "rich"},
}


@functools.cache
def modules(root: Path) -> dict[str, ast.Module]:
    """The parsed files of usp_jax and train under `root`, by dotted module name."""
    parsed = {}
    for package in ("usp_jax", "train"):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            parsed[name] = ast.parse(path.read_text(), str(path))
    return parsed


def imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """Dotted names that `tree` imports, submodules and not attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{name}:{node.lineno}: write imports absolutely")
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in known else node.module)
    return found


def layer(name: str) -> int:
    """Row of the longest prefix of `name` that LAYERS lists."""
    prefix = name
    while prefix:
        for row, members in enumerate(LAYERS):
            # "usp_jax" is the front door only; its submodules are listed by name.
            if prefix in members and (prefix != "usp_jax" or name == "usp_jax"):
                return row
        prefix = prefix.rpartition(".")[0]
    raise ValueError(f"{name} has no place in LAYERS; add it to tests/test_imports.py")


def direction_faults(root: Path) -> list[str]:
    """Imports that point up, as `a imports b`."""
    trees = modules(root)
    return [
        f"{name} imports {imported}"
        for name, tree in trees.items()
        for imported in sorted(imports(name, tree, set(trees)))
        if imported.partition(".")[0] in ("usp_jax", "train", "tests", "benchmarks")
        and (
            imported.partition(".")[0] in ("tests", "benchmarks")
            or layer(imported) > layer(name)
        )
    ]


def extra_packages(name: str) -> set[str]:
    """Extra packages of the longest prefix of `name` that EXTRA_PACKAGES lists."""
    while name and name not in EXTRA_PACKAGES:
        name = name.rpartition(".")[0]
    return EXTRA_PACKAGES.get(name, set())


def package_faults(root: Path) -> list[str]:
    """Third-party imports that are not allowed in their part of usp_jax."""
    trees = modules(root)
    faults = []
    for name, tree in trees.items():
        if name.partition(".")[0] != "usp_jax":
            continue
        allowed = CORE_PACKAGES | extra_packages(name) | {"usp_jax"}
        for imported in sorted(imports(name, tree, set(trees))):
            top = imported.partition(".")[0]
            if top not in allowed and top not in sys.stdlib_module_names:
                faults.append(f"{name} imports {imported}")
    return faults


def private_jax_faults(root: Path) -> list[str]:
    """Places outside usp_jax/_compat.py that reach into `jax._src`."""
    return [
        f"{name}:{node.lineno}"
        for name, tree in modules(root).items()
        if name != "usp_jax._compat"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "_src")
        or (
            isinstance(node, ast.Import)
            and any(alias.name.startswith("jax._src") for alias in node.names)
        )
        or (
            isinstance(node, ast.ImportFrom)
            and (
                (node.module or "").startswith("jax._src")
                or any(alias.name == "_src" for alias in node.names)
            )
        )
    ]


def import_graph(root: Path) -> dict[str, set[str]]:
    trees = modules(root)
    known = set(trees)
    return {name: imports(name, tree, known) & known for name, tree in trees.items()}


def test_imports_point_one_way() -> None:
    assert direction_faults(ROOT) == []


def test_usp_jax_imports_only_its_dependencies() -> None:
    assert package_faults(ROOT) == []


def test_no_import_cycles() -> None:
    assert len(list(TopologicalSorter(import_graph(ROOT)).static_order())) > 10


def test_private_jax_stays_in_compat() -> None:
    assert private_jax_faults(ROOT) == []


def hidden_modules(root: Path) -> list[str]:
    """Modules whose name their package binds to something else."""
    trees = modules(root)
    names = [
        f"{package}.{name}"
        for package, tree in trees.items()
        for node in tree.body
        for name in bound_names(package, node)
    ]
    return [name for name in names if name in trees]


def bound_names(package: str, node: ast.stmt) -> list[str]:
    """Names that a statement binds to anything but the package's own modules."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom) and node.module != package:
        return [alias.asname or alias.name for alias in node.names]
    return []


def test_no_name_hides_a_module() -> None:
    assert hidden_modules(ROOT) == []


def test_importing_the_core_loads_no_extra_and_starts_no_backend() -> None:
    code = (
        "import sys, usp_jax, usp_jax.plan, jax\n"
        "extras = {'flax', 'optax', 'orbax', 'grain', 'rich', 'matplotlib', 'train'}\n"
        "extras &= set(sys.modules)\n"
        "assert not extras, extras\n"
        "assert 'jax.experimental.pallas' not in sys.modules\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "assert jax.device_count() == 3\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_checks_find_faults(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "usp_jax/ring.py": "def f():\n    from usp_jax import usp\n",
            "usp_jax/usp.py": "import flax.nnx\nfrom usp_jax.ring import f\n",
            "usp_jax/kernels/xla.py": "import jax\njax._src.core\nimport usp_jax\n",
            "usp_jax/nn.py": "import flax, optax\nfrom jax import _src\n",
            "train/state.py": "import optax\nfrom tests import conftest\n",
        },
    )
    assert direction_faults(root) == [
        "usp_jax.kernels.xla imports usp_jax",
        "usp_jax.ring imports usp_jax.usp",
        "train.state imports tests",
    ]
    assert package_faults(root) == [
        "usp_jax.nn imports optax",
        "usp_jax.usp imports flax.nnx",
    ]
    assert private_jax_faults(root) == ["usp_jax.kernels.xla:2", "usp_jax.nn:2"]
    with pytest.raises(CycleError):
        list(TopologicalSorter(import_graph(root)).static_order())


def test_a_hidden_module_is_found(tmp_path: Path) -> None:
    files = {
        "usp_jax/__init__.py": "from usp_jax.balance import balance\n",
        "usp_jax/balance.py": "def balance():\n    pass\n",
        "usp_jax/plan/__init__.py": "from usp_jax.plan import table\nclass best: ...",
        "usp_jax/plan/best.py": "",
        "usp_jax/plan/table.py": "",
    }
    root = write_tree(tmp_path, files)
    assert hidden_modules(root) == ["usp_jax.balance", "usp_jax.plan.best"]


def test_a_module_without_a_place_raises() -> None:
    with pytest.raises(ValueError, match="usp_jax.new has no place in LAYERS"):
        layer("usp_jax.new")


def test_relative_imports_raise(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"usp_jax/ring.py": "from . import mesh\n"})
    with pytest.raises(ValueError, match="usp_jax.ring:1: write imports absolutely"):
        direction_faults(root)
