"""`python -m usp_jax.aot TOPOLOGY ...`: compiles one attention call and reports on it.

python -m usp_jax.aot v5p:4x4x4 --ring 8 --ulysses 8 --length 1M --backward
python -m usp_jax.aot h100:2x8 --ring 2 --ulysses 8 --length 256K --json
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import usp_jax
from usp_jax import aot
from usp_jax.checks import check_positive_int
from usp_jax.command_line import Parser, alive, needing, readers_may_leave
from usp_jax.flags import Option
from usp_jax.kernels import IMPLEMENTATIONS
from usp_jax.layout import LAYOUTS
from usp_jax.mesh import ROLES
from usp_jax.units import tokens_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the reports. Returns 0 if everything fits, else 1; exits with 2 on errors.

    Args:
      arguments: the command line, by default that of the process.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    # Nothing runs, so leave the accelerators of this machine free.
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    try:
        reports = _reports(args)
    except ImportError as error:
        parser.error(needing("aot", error))
    # RuntimeError: the compiler's, whose first line says what is wrong.
    except (ValueError, RuntimeError) as error:
        parser.error(str(error).strip().partition("\n")[0])
    with readers_may_leave():
        if args.json:
            print(json.dumps({name: x.as_dict() for name, x in reports.items()}))
        else:
            tables = [f"{name}: {x.table()}" for name, x in reports.items()]
            print("\n\n".join(tables))
    return 0 if all(report.fits for report in reports.values()) else 1


def _reports(args: argparse.Namespace) -> dict[str, aot.Report]:
    length = tokens_of("length", args.length)
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    sizes = {role: getattr(args, role) for role in ROLES}
    shape = {"batch": args.batch, "heads": args.heads, "head_size": args.head_size}
    for name, size in {
        **sizes,
        **shape,
        "kv_heads": kv_heads,
        "length": length,
    }.items():
        check_positive_int(name, size)
        if size >= 2**31:
            raise ValueError(f"{name}={size} must be less than 2**31")
    try:
        dtype = jnp.dtype(args.dtype)
    except TypeError:
        raise ValueError(f"dtype={args.dtype!r} is not a dtype") from None
    topology = aot.topology(args.topology)
    mesh = usp_jax.make_mesh(devices=topology.devices, **sizes)
    spec = jax.P(("data", "fsdp"), ("ring", "ulysses"), "tensor")
    sharding = NamedSharding(mesh, spec)

    def struct(heads: int) -> jax.ShapeDtypeStruct:
        shape = (args.batch, length, heads, args.head_size)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def attention(
        query: jax.Array, key: jax.Array, value: jax.Array
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        return usp_jax.usp_attention(
            query,
            key,
            value,
            is_causal=args.causal,
            layout=args.layout,
            mesh=mesh,
            implementation=args.implementation,
        )

    arguments = struct(args.heads), *[struct(kv_heads)] * 2
    options = dict(args.option)
    if args.recommended_flags:
        options = usp_jax.recommended_flags(topology.platform) | options
    with alive(f"compiling for {args.topology}", on_stderr=True):
        return _compiled(args.backward, attention, arguments, options)


def _compiled(
    backward: bool,
    attention: Callable[..., Any],
    arguments: Sequence[jax.ShapeDtypeStruct],
    options: Mapping[str, Option],
) -> dict[str, aot.Report]:
    if backward:
        names = ("forward", "backward")
        reports = aot.compile_vjp(attention, *arguments, compiler_options=options)
        return dict(zip(names, reports, strict=True))
    return {"forward": aot.compile(attention, *arguments, compiler_options=options)}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m usp_jax.aot",
        description="Compiles usp_attention for a machine that is not present. Reports "
        "bytes per device, collectives, and whether work overlaps them.",
        epilog=f"Machines: {', '.join(aot.known())}. 1K is 1024, 1M is 1024K.",
    )
    parser.add_argument(
        "topology",
        help="The machine: chips of a TPU slice, or hosts x GPUs per host, such as "
        "v5p:4x4x4 or h100:2x8.",
    )
    for role in ROLES:
        parser.add_argument(
            f"--{role}",
            type=int,
            default=1,
            metavar="N",
            help=f"Devices along the mesh axis {role}.",
        )
    parser.add_argument(
        "--length", default="64K", help="Tokens in the sequence, such as 64K or 1M."
    )
    parser.add_argument("--batch", type=int, default=1, help="Number of sequences.")
    parser.add_argument("--heads", type=int, default=32, help="Query heads.")
    parser.add_argument(
        "--kv-heads", type=int, help="Key/value heads; by default as many as heads."
    )
    parser.add_argument("--head-size", type=int, default=128, help="Size of a head.")
    parser.add_argument(
        "--dtype", default="bfloat16", help="Dtype of queries, keys and values."
    )
    parser.add_argument(
        "--layout",
        default="zigzag",
        help=f"Order in which tokens are stored: {', '.join(LAYOUTS)}.",
    )
    parser.add_argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Whether a token sees only those before it.",
    )
    parser.add_argument(
        "--implementation",
        help=f"The kernel: {', '.join(IMPLEMENTATIONS)}; by default the platform's.",
    )
    parser.add_argument(
        "--backward", action="store_true", help="Also compile the backward pass."
    )
    parser.add_argument(
        "--recommended-flags",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Compile with usp_jax.recommended_flags.",
    )
    parser.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="A compiler option; may be repeated.",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    return parser


def _option(text: str) -> tuple[str, Option]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not NAME=VALUE")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    return name, int(value) if value.isdecimal() else value


if __name__ == "__main__":
    sys.exit(main())
