"""Weights and checkpoints that others released, for hatjax.

  python -m hatjax.convert fomm vox-cpk.pth.tar --workdir runs/fomm
  python -m hatjax.convert affinegan latest_net_G.pth --workdir runs/affinegan
  python -m hatjax.convert video_diffusion model.pt --workdir runs/diffusion
  python -m hatjax.convert export --workdir runs/a --out model.hatjax
  python -m hatjax.convert weights --list
  python -m hatjax.convert weights fetch inception_fid
  python -m hatjax.convert weights fetch inception_fid --source my_download.pth

`fetch` downloads (and resumes), verifies the checksum, and converts what
OpenCV does not read itself. Files live in ~/.cache/hatjax/weights, or where
HATJAX_WEIGHTS says.
"""

import argparse
import sys
import tarfile

import tqdm

from hatjax import command, torch_files, weights
from hatjax.nets import pretrained, vgg


def _lpips(path):
  state = torch_files.read(path)
  return {f'lin{i}': state[f'lin{i}.model.1.weight'].ravel() for i in range(5)}


def _features(depths):
  """Reads the convolutions of a VGG; its classifier stays out."""

  def read(path):
    arrays = vgg.from_torch(torch_files.read(path), depths)
    return {k: v for k, v in arrays.items() if k.startswith('conv')}

  return read


KINDS = ('fomm', 'affinegan', 'video_diffusion')  # see `foreign`
# Weights -> (the released file's path -> arrays as hatjax reads them).
CONVERTERS = {
  'inception_fid':
    lambda path: pretrained.inception_from_torch(torch_files.read(path)),
  'resnext101_kinetics':
    lambda path: pretrained.resnext_from_torch(torch_files.read(path)),
  'vgg16': _features(vgg.D),
  'vgg19': _features(vgg.E),
  'vgg_face': _features(vgg.D),
  'lpips_vgg': _lpips,
}


def fetch(name, source=None, progress=None):
  """Fetches weights and converts them where that is needed.

  Returns:
    pathlib.Path of the file that hatjax reads.

  Raises:
    ValueError: see `weights.fetch`; or a file that is another net's.
  """
  entry = weights.entry_of(name)
  path = weights.fetch(name, progress, source)
  if not entry.converted:
    return path
  if name not in CONVERTERS:
    raise ValueError(f'{name}: hatjax has no converter for {entry.file}.')
  try:
    arrays = CONVERTERS[name](path)
  except (KeyError, tarfile.TarError) as error:
    raise ValueError(f'{path} is not {name}: {error}.') from error
  weights.store(name, arrays, weights.verify(name, path))
  return weights.find(name)


def show():
  """Lines on all weights: what for, licence, size, address, where, there?"""
  yield f'Weights live in {weights.folder()} (HATJAX_WEIGHTS moves them).'
  for name, entry in weights.REGISTRY.items():
    there = weights.is_there(name)
    size = f'{entry.size / 1e6:.3g} MB' if entry.size else 'size not known'
    yield ''
    yield f'{name}: {"there" if there else "not there"}'
    yield f'  for       {entry.use}'
    yield f'  licence   {entry.licence}; {size}'
    yield f'  address   {entry.address or entry.note}'
    if entry.address and entry.note:
      yield f'  note      {entry.note}'
    digest = entry.sha256 or "not known; your file's is kept"
    yield f'  sha256    {digest}'
    yield f'  file      {weights.released(name)}'
    if not there:
      yield f'  get it    python -m hatjax.convert weights fetch {name}' + (
        '' if entry.address else ' --source <file>'
      )


def _parser():
  parser = argparse.ArgumentParser(
    prog='python -m hatjax.convert', description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  kinds = parser.add_subparsers(dest='kind', required=True)
  part = kinds.add_parser('weights', help='released weights: list, fetch')
  part.add_argument('--list', action='store_true', help='all, with addresses')
  part.add_argument(
    'action', nargs='?', choices=('fetch',), help='fetch NAME ...'
  )
  part.add_argument('names', nargs='*', metavar='NAME')
  part.add_argument(
    '--source', help='another address, or a file you have, of one NAME'
  )
  part = kinds.add_parser(
    'export', help='a run -> one file, for python -m hatjax.generate --model'
  )
  part.add_argument('--workdir', required=True, help='the trained run')
  part.add_argument('--step', type=int, help='default: its newest checkpoint')
  part.add_argument('--out', default='model.hatjax', help='the file to write')
  for kind in KINDS:
    part = kinds.add_parser(kind, help='a checkpoint of that project -> a run')
    part.add_argument('file', help='the checkpoint; nothing in it is executed')
    part.add_argument('--workdir', required=True, help='the run to write')
    part.add_argument(
      '--image_size', type=int, default=0,
      help='side of its pictures, where the file does not say',
    )
    part.add_argument(
      '--num_frames', type=int, default=10, help='of video_diffusion'
    )
  return parser


def _convert(args):
  try:
    if args.kind == 'export':
      from hatjax import export  # brings JAX

      if not args.out.endswith('.hatjax'):
        raise ValueError(f'--out is {args.out}. End it with .hatjax')
      export.export(args.workdir, args.out, args.step)
      print(args.out)
      return 0
    from hatjax import foreign  # brings JAX

    print(f'{args.workdir}: ' + foreign.convert(
      args.kind, args.file, args.workdir, args.image_size, args.num_frames
    ))
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


def main(argv=None):
  """The command; returns the exit code."""
  parser = _parser()
  args = parser.parse_args(argv)
  if args.kind in (*KINDS, 'export'):
    return _convert(args)
  if args.list or not args.action:
    print('\n'.join(show()))
    return 0
  if not args.names or (args.source and len(args.names) > 1):
    parser.error('fetch takes NAME ..., and --source one NAME only')
  for name in args.names:
    with tqdm.tqdm(unit='B', unit_scale=True, desc=name) as bar:
      def progress(done, total, bar=bar):
        bar.total = total or None
        bar.update(done - bar.n)

      try:
        path = fetch(name, args.source, progress)
      except (ValueError, OSError) as error:
        bar.close()
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(f'{name}: {path}')
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
