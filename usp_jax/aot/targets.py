"""GPUs as the text of XLA's `stream_executor.GpuTargetConfigProto`.

Uses only fields that every supported jax knows, since unknown fields are refused.
"""

from collections.abc import Mapping

from usp_jax.aot.devices import Gpu

# xla.PrimitiveType of the rates that XLA's cost model asks for.
_S32, _F16, _F32, _F64, _BF16 = 4, 10, 11, 12, 16
_S8, _U8, _F8 = 2, 6, (19, 20)


def target_text(gpu: Gpu) -> str:
    """The target description of a device for the GPU compiler."""
    feature = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    major, minor = gpu.capability
    lanes = {
        _S32: gpu.int32_per_core,
        _F16: gpu.fp32_per_core,
        _F32: gpu.fp32_per_core,
        _F64: gpu.fp64_per_core,
        _BF16: gpu.fp32_per_core,
    }
    matrix = {
        _S8: 2 * gpu.matrix_ops,
        _U8: 2 * gpu.matrix_ops,
        _F16: gpu.matrix_ops,
        # float32 is multiplied as TF32.
        _F32: gpu.matrix_ops // 2,
        _F64: gpu.matrix_ops_fp64,
        _BF16: gpu.matrix_ops,
    }
    if gpu.has_fp8:
        matrix |= dict.fromkeys(_F8, 2 * gpu.matrix_ops)
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  shared_memory_per_core: {gpu.shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fp32_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.hbm_bytes}
  cuda_compute_capability {{
    major: {major}
    minor: {minor}
    feature_extension: {feature}
  }}
  scalar_unit_description {{{_rates(gpu, 1, lanes)}
  }}
  matrix_unit_description {{{_rates(gpu, 4, matrix)}
  }}
  dnn_version: "9.10.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
device_description_str: "{gpu.kind}"
"""


def _rates(gpu: Gpu, units: int, operations: Mapping[int, int]) -> str:
    """Operations per clock of each unit of a core, by type.

    With `units` = 1, each lane is a unit.
    """
    return "".join(
        f"""
    rate_infos {{
      key: {dtype}
      value {{
        clock_rate_ghz: {gpu.clock_ghz}
        units_per_core: {count if units == 1 else units}
        ops_per_clock: {1 if units == 1 else count}
      }}
    }}"""
        for dtype, count in operations.items()
    )
