"""A sheet of synthetic faces: a row per person, at rest and at each apex.

  python -m hatjax.synthetic_faces sheet.png --people 5 --size 128
"""

import argparse
import dataclasses
import sys

import numpy as np
from PIL import Image

from hatjax import command, synthetic_faces, video


def main(argv=None):
  """Draws the sheet."""
  parser = argparse.ArgumentParser(
    prog='python -m hatjax.synthetic_faces',
    description='Draws a sheet of synthetic faces and their expressions.',
  )
  add = parser.add_argument
  add('out', metavar='PNG', help='the sheet to write')
  add('--people', type=int, default=5, help='rows (default: %(default)s)')
  add('--size', type=int, default=128, help='of a face (default: %(default)s)')
  add('--seed', type=int, default=0, help='of the first (default: %(default)s)')
  args = parser.parse_args(argv)
  rows = []
  for seed in range(args.seed, args.seed + args.people):
    # Without the camera's noise, and with few colours, the file stays small.
    face = dataclasses.replace(synthetic_faces.sample_identity(seed), grain=0.0)
    clips = [
      synthetic_faces.render_clip(face, name, 2, args.size)['video']
      for name in synthetic_faces.EXPRESSIONS
    ]
    rows.append(np.stack([clips[0][0], *(clip[-1] for clip in clips)])[:, None])
  names = ('neutral', *synthetic_faces.EXPRESSIONS)
  first = video.grid_with_labels(rows[0], names, len(names))[0]
  rest = [video.tile(row, len(names), max(2, args.size // 32))[0]
          for row in rows[1:]]
  sheet = Image.fromarray(video.stack_rows([first, *rest]))
  sheet.quantize(256, kmeans=3).save(args.out, 'PNG', optimize=True)


if __name__ == '__main__':
  sys.exit(command.run(main))
