"""Where a video comes from: what generated ones carry, and who reads it back.

  python -m hatjax.provenance smile.mp4

Every video of `hatjax.generate` has a comment in its metadata (made by hatjax,
its version, the methods, the checksum of their parameters) and an invisible
watermark, which stays when the metadata are lost; see `hatjax.watermark`.
"""

import argparse
import dataclasses
import re
import sys
from importlib import metadata

from hatjax import video, watermark

WATERMARKS = ('auto', 'none')
_COMMENT = re.compile(
  r'made by hatjax [\w.+-]+; method [\w.+-]+; checkpoint [\w:+-]+'
)
_EPILOG = """\
exit code:
  0 if a file was made by hatjax: its metadata or its watermark say so. 1 if
  neither does, 2 if a file cannot be read. Of several files, the highest.

The watermark survives H.264 and a resize to half; it does not survive
cropping or rotation, and says nothing about small or very noisy videos. Its
pattern is public: it informs, it proves nothing.
"""


@dataclasses.dataclass(frozen=True)
class Signature:
  """What the videos of a run get.

  Attributes:
    comment: see `describe`; '' for none.
    watermark: whether the frames are marked.
  """

  comment: str = ''
  watermark: bool = True

  def write_video(self, path, frames, fps=25):
    """As `video.write_video`; the arrays given stay unmarked."""
    frames = watermark.mark(frames) if self.watermark else frames
    video.write_video(path, frames, fps, self.comment)


def describe(names, digests):
  """The comment on a video: 'made by hatjax ...; method ...; checkpoint ...'.

  Args:
    names: of the methods that made it, in order.
    digests: checksums of their parameters, in the same order.
  """
  return (
    f'made by hatjax {version()}; method {"+".join(names) or "unknown"}; '
    f'checkpoint sha256:{"+".join(digests) or "unknown"}'
  )


def version():
  """The version of hatjax, 'unknown' where it is not installed."""
  try:
    return metadata.version('hatjax')
  except metadata.PackageNotFoundError:
    return 'unknown'


def sign(run, mark='auto'):
  """The Signature of a loaded run; `mark` is one of WATERMARKS."""
  from hatjax import state  # brings JAX, which reading does not need

  stages = getattr(run, 'video_stages', getattr(run, 'stages', ()))
  comment = describe(
    [stage.name for stage in stages],
    [  # an exported file names that of its run
      getattr(stage.method, 'facts', {}).get('checkpoint')
      or state.checksum(stage.state.frozen().params) for stage in stages
    ],
  )
  return Signature(comment, mark != 'none')


def add_option(parser):
  """--watermark."""
  parser.add_argument(
    '--watermark', choices=WATERMARKS, default='auto',
    help='auto: mark the frames invisibly, as made by hatjax (python -m '
    'hatjax.provenance reads it); none: do not',
  )


def read(path):
  """What a video says of where it comes from.

  Args:
    path: a video, or a folder of frames.

  Returns:
    (the comment of `describe`, '' if there is none; the watermark's score,
    see `watermark.score`).

  Raises:
    ValueError: it cannot be read.
  """
  found = _COMMENT.search(video.read_comment(path))
  return found[0] if found else '', watermark.score(video.iter_video(path))


def _parser():
  parser = argparse.ArgumentParser(
    prog='python -m hatjax.provenance', epilog=_EPILOG,
    description='Says whether videos were made by hatjax, and with what.',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'files', nargs='+', metavar='FILE',
    help='mp4, mov, webm, gif, webp, or a folder of frames',
  )
  return parser


def main(argv=None):
  """The command; returns its exit code."""
  code = 0
  for path in _parser().parse_args(argv).files:
    try:
      comment, score = read(path)
    except (ValueError, OSError) as error:
      print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
      code = 2
      continue
    marked = score >= watermark.THRESHOLD
    print(f'{path}: {"" if comment or marked else "not known to be "}'
          'made by hatjax')
    print(f'  metadata   {comment or "none"}')
    print(f'  watermark  {"found" if marked else "not found"} (score '
          f'{score:.1f}, found from {watermark.THRESHOLD:g} on)')
    code = max(code, int(not comment and not marked))
  return code


if __name__ == '__main__':
  sys.exit(main())
