"""The benchmark's numbers as a table and a plot."""

import numpy as np

# Title, key of the row, unit.
STEP_COLUMNS = (
  ('batch', 'batch_size', 1),
  ('compile s', 'compile_seconds', 1),
  ('first s', 'first_step_seconds', 1),
  ('median ms', 'step_seconds_median', 1e-3),
  ('p90 ms', 'step_seconds_p90', 1e-3),
  ('in a row', 'step_seconds_mean', 1e-3),
  ('videos/s', 'videos_per_second', 1),
  ('frames/s', 'frames_per_second', 1),
  ('GFLOP', 'flops', 1e9),
  ('GFLOP/s', 'flops_per_second', 1e9),
  ('% peak', 'share_of_peak', 0.01),
  ('cores', 'cores_busy', 1),
  ('GB moved', 'bytes_accessed', 1e9),
  ('GiB', 'compiled_peak_bytes', 2**30),
  ('GiB real', 'device_peak_bytes', 2**30),
)
INPUT_COLUMNS = (
  ('batch', 'batch_size', 1),
  ('input', 'input', None),
  ('first b/s', 'first_batches_per_second', 1),
  ('batches/s', 'batches_per_second', 1),
  ('step ms', 'step_seconds_mean', 1e-3),
  ('fetch ms', 'fetch_seconds_mean', 1e-3),
  ('% waits', 'waiting_share', 0.01),
  ('videos/s', 'videos_per_second', 1),
  ('frames/s', 'frames_per_second', 1),
)


def line(mode, row=None):
  """A row as a line of the table, or the line of the titles."""
  cells = []
  for title, key, unit in INPUT_COLUMNS if mode == 'data' else STEP_COLUMNS:
    value = title if row is None else row.get(key)
    if value is None:
      value = '-'
    elif not isinstance(value, str):
      value /= unit
      value = f'{value:.4g}' if value < 1000 else f'{value:.0f}'
    cells.append(f'{value:>9}')
  return ' '.join(cells)


def growth(rows):
  """Lines on how frames/s grow with the batch; linear growth is 100 %.

  Args:
    rows: of one stage, small batches first; each input by itself.
  """
  firsts = {}
  for row in rows:
    first = firsts.setdefault(row.get('input'), row)
    if row is not first:
      times = row['batch_size'] / first['batch_size']
      faster = row['frames_per_second'] / first['frames_per_second']
      yield (
        f'batch {first["batch_size"]} to {row["batch_size"]}: {faster:.3g} '
        f'times the frames/s, {100 * faster / times:.0f} % of linear'
      )


def compare(special, plain):
  """Lines on what a profile or determinism saves and costs.

  Args:
    special: rows with it, whose `variant` names it.
    plain: rows without it; a batch size may be missing (it did not fit).
  """
  before = {row['batch_size']: row for row in plain}
  for row in special:
    words = []
    for key, unit, text in (
      ('compiled_peak_bytes', 2**30, 'compiled memory {} GiB'),
      ('device_peak_bytes', 2**30, 'real {} GiB so far'),
      ('flops', 1e9, '{} GFLOP'),
      ('step_seconds_median', 1e-3, '{} ms'),
    ):
      if row.get(key) is not None:
        old = before.get(row['batch_size'], {}).get(key)
        old = 'does not fit' if old is None else f'{old / unit:.4g}'
        value = text.format(f'{row[key] / unit:.4g}')
        words.append(f'{value} (without: {old})')
    yield f'batch {row["batch_size"]}, {row["variant"]}: {", ".join(words)}'


def plot(report, path):
  """Frames per second against batch size; dashed: linear growth."""
  from matplotlib import figure  # Slow to import.

  fig = figure.Figure(figsize=(6, 4), layout='constrained')
  axis = fig.subplots()
  curves = {}
  for row in report['rows']:
    words = (row.get(k) for k in ('stage', 'input', 'variant'))
    name = ' '.join(filter(None, words))
    point = (row['batch_size'], row['frames_per_second'])
    curves.setdefault(name, []).append(point)
  for name, points in curves.items():
    x, y = np.array(points, float).T
    (line,) = axis.plot(x, y, 'o-', label=name)
    axis.plot(x, x * y[0] / x[0], '--', color=line.get_color(), linewidth=0.8)
  axis.set_xscale('log', base=2)
  axis.set_yscale('log', base=2)
  for side in (axis.xaxis, axis.yaxis):
    side.set_major_formatter('{x:g}')  # Not as powers of two.
  machine = report['machine']
  axis.set(
    xlabel='batch size', ylabel='frames per second',
    title=f'{report["options"]["mode"]}, {machine["devices"]} x '
    f'{machine["device"]}',
  )
  axis.legend()
  axis.grid(alpha=0.3)
  fig.savefig(path, dpi=110)
