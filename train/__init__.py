"""The training program, run from the checkout: `python -m train PRESET`."""

import importlib.util
import sys

# While `python -m train...` imports this package, so that a missing package is one line
# and not a traceback. When another program imports it, nothing is checked.
if sys.argv[:1] == ["-m"]:
    _NEEDED = ("jax", "flax", "grain", "optax", "orbax", "rich", "safetensors", "tyro")
    _missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if _missing:
        print(
            f"error: {', '.join(_missing)} not installed: run pip install '.[train]' "
            "in the checkout",
            file=sys.stderr,
        )
        sys.exit(2)
