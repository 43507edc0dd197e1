"""What a GPU would run of a training step, seen on a machine without one.

  bash launch/install.sh cuda
  python tests/gpu_program.py --config configs/frame_folders.py:reference,256 \\
    --dtype bfloat16 --batch_sizes 1,16

Compiles for an H100 by its data sheet: kernels are not chosen by the stop
watch, so nothing here is a time, but which kernels there are, what they read
and write, and the memory are the compiler's own words. Convolutions with
large kernels are gradients that cuDNN was handed the wrong way round.
Not a test: pytest passes it by.
"""

import collections
import contextlib
import math
import os
import pathlib
import re
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))  # configs

import jax
from absl import flags
from jax.experimental import topologies

from hatjax import benchmark, config_flag, parallel, runs
from hatjax.nets import lowerings

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 device_address_bits: 64
  cuda_compute_capability { major: 9 }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Without a card neither kernels nor, in some programs, Triton's products can
# be tried out.
OPTIONS = {'xla_gpu_autotune_level': 0, 'xla_gpu_enable_triton_gemm': False}
SIZES = {'pred': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 'f32': 4, 's32': 4,
         'u32': 4, 's64': 8, 'u64': 8, 'f64': 8}
NOT_KERNELS = ('parameter', 'get-tuple-element', 'tuple', 'bitcast', 'constant')
LARGE = 7  # side of a convolution's kernel


def bytes_of(shape):
  """Bytes of an HLO shape or tuple; but for workspaces, which are s8."""
  return sum(
    SIZES[kind] * math.prod(int(n) for n in dims.split(',') if n)
    for kind, dims in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shape)
    if kind in SIZES
  )


def kernels(text):
  """(kind, bytes read and written, side of a convolution's kernel or 0)."""
  entry = text[text.index('\nENTRY') :].split('\n}')[0]
  shapes = {}
  for line in entry.splitlines():
    found = re.match(
      r'\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)', line
    )
    if not found:
      continue
    name, shapes[name], operation, operands = found.groups()
    if operation in NOT_KERNELS:
      continue
    target = re.search(r'custom_call_target="__([^"]*)"', line)
    kind = re.search(r'kind=k(\w+)', line)
    if target or kind:
      operation = target[1] if target else f'{operation}, {kind[1].lower()}'
    used = re.findall(r'%([\w.-]+)', operands)
    moved = sum(bytes_of(shapes.get(n, '')) for n in (name, *used))
    window = re.search(r'size=([\dx]+)', line)
    side = max(map(int, window[1].split('x'))) if target and window else 0
    yield operation, moved, side


def show(text, memory):
  """Prints a table of a compiled program."""
  rows = list(kernels(text))
  table, large = collections.defaultdict(lambda: [0, 0]), 0
  for kind, moved, side in rows:
    table[kind][0] += 1
    table[kind][1] += moved
    large += side > LARGE
  needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  print(f'{len(rows)} kernels; {sum(r[1] for r in rows) / 1e9:.2f} GB read and '
        f'written; {large} convolutions with kernels over {LARGE} wide; '
        f'{needed / 2**30:.2f} GiB of memory')
  for kind, (count, moved) in sorted(table.items(), key=lambda r: -r[1][1]):
    print(f'  {count:5d} {moved / 1e9:8.2f} GB  {kind}')


def main():
  config = benchmark._define()
  config_flag.parse(sys.argv)
  config = config.value.to_dict()
  value = lambda name: flags.FLAGS[name].value
  options = benchmark.Options(
    batch_sizes=benchmark._batch_sizes(value('batch_sizes')),
    dtype=value('dtype'), lowering=value('lowering'),
  )
  jax.default_backend = lambda: 'gpu'  # What the nets and steps ask.
  devices = topologies.get_topology_desc(
    'h100', 'cuda', target_config=H100, topology='1x1x1'
  ).devices
  for name in config['stages']:
    for stage in benchmark._stages(config, name, options, 1):
      method = benchmark._make_method(stage)
      example = runs.example_batch(stage)
      if getattr(method, 'needs_draft', False):
        example['draft'] = example['video']
      runner = parallel.Runner(method, benchmark._prepare, devices=devices)
      with lowerings.lowering(options.lowering or config['lowering']):
        lowered = runner.lower(
          runner.abstract_state(example), benchmark._random_batch(example, 0),
          jax.eval_shape(lambda: jax.random.key(0)),
        )
      compiled = lowered.compile(OPTIONS)
      size = stage['data']['batch_size']
      print(f'\n{name}, batch {size}, {stage["model"].get("dtype", "float32")}')
      show(compiled.as_text(), compiled.memory_analysis())


if __name__ == '__main__':
  with contextlib.suppress(BrokenPipeError):
    main()
