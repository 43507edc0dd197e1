"""Faces that nobody has, drawn here: nothing to download, no raw folder.

  python -m hatjax.prepare synthetic                          synthetic/default
  python -m hatjax.prepare synthetic --image_size 64 --grey   its options' name

synthetic/default holds 64 people with six expressions of 32 frames each at
128x128, from neutral to the apex, with the exact intensity, 68 points and mask
of the lips of every frame. It is made on first use without being asked. Any
other choice of OPTIONS is named by them: synthetic/64-grey-i64-f32-s0. Frames
are framed as faces are cropped from photographs.

Person 0007 of seed S is `synthetic_faces.sample_identity(10000 * S + 7)`; the
id of a clip is 0007_happy. Of 64 people the first 48 are `train`, 4 are `val`,
12 are `test`, and so in proportion of other numbers.
"""

import concurrent.futures
import hashlib
import json
import pathlib
import re

import cv2
import tqdm

from hatjax import synthetic_faces

from . import face_video

# What prepare's options of these names may say, and what they say by default.
OPTIONS = {
  'image_size': 128, 'grey': False, 'num_identities': 64, 'num_frames': 32,
  'seed': 0,
}
PEOPLE = 10_000  # of one seed
VAL, TEST = 4 / 64, 12 / 64
NUM_WORKERS = 2
# Seconds per frame on two cores: per frame, and per pixel.
COST = (0.0030, 2.0e-7)


class Synthetic(face_video.FaceVideo, skip_registration=True):
  """Drawn faces of many people going from neutral to six expressions."""

  def _create_builder_config(self, builder_config, version):
    """Names the records by these options, not by those of cropped ones."""
    del version
    builder_config.name = config_name(builder_config.options)
    return builder_config

  def _generate_examples(self):
    config, metadata = self.builder_config, self.info.metadata
    scan, options = config.scan, config.options
    metadata.update(
      options=options, labels=scan.labels, raw_digest=config.raw_digest,
      clips={},
    )
    digests = {}
    for clip, record, digest in _render(scan.clips, options):
      digests[clip.id] = digest
      metadata['clips'][clip.id] = {
        'label': clip.label, 'subject': clip.subject,
        'num_frames': options['num_frames'], 'still': False,
      }
      yield clip.id, record
    content = json.dumps(sorted(digests.items())).encode()
    metadata['fingerprint'] = hashlib.sha256(content).hexdigest()
    metadata['splits'] = name_splits(metadata['clips'])
    metadata['report'] = {
      'masks': {'drawn': len(digests)}, 'skipped': [], 'notes': scan.notes,
    }


def config_name(options):
  """The folder name of options: default, 64-grey-i64-f32-s0."""
  if options == complete({}):
    return 'default'
  grey = '-grey' if options['grey'] else ''
  return (
    f'{options["image_size"]}{grey}-i{options["num_identities"]}'
    f'-f{options["num_frames"]}-s{options["seed"]}'
  )


def options_of(name):
  """The options of which `config_name` made a name."""
  if name == 'default':
    return complete({})
  match = re.fullmatch(r'(\d+)(-grey)?-i(\d+)-f(\d+)-s(\d+)', name)
  if not match:
    raise ValueError(
      f'There are no synthetic faces {name!r}. They are named default, or by '
      'size, people, frames and seed: 64-i64-f32-s0, 64-grey-i64-f32-s0.'
    )
  size, grey, people, frames, seed = match.groups()
  return complete({
    'image_size': int(size), 'grey': bool(grey), 'num_identities': int(people),
    'num_frames': int(frames), 'seed': int(seed),
  })


def complete(options):
  """All options, from those that were given; checks them."""
  options = {**OPTIONS, **options, 'crop': 'face'}
  for name, low, high in (
    ('image_size', 16, 2048), ('num_identities', 1, PEOPLE),
    ('num_frames', 2, 10_000), ('seed', 0, 2**31),
  ):
    if not low <= options[name] <= high:
      raise ValueError(f'--{name} is {options[name]}. Use {low} to {high}.')
  return options


def scan(options):
  """The clips that options ask for."""
  labels = list(synthetic_faces.EXPRESSIONS)
  found = face_video.Scan(pathlib.Path(), labels)
  for k in range(options['num_identities']):
    for label in labels:
      found.clips.append(
        face_video.Clip(f'{k:04d}_{label}', label, f'{k:04d}', []))
  found.notes.append('drawn, not photographed: alpha and landmarks are exact')
  return found


def digest():
  """Digest of what draws: records drawn by older code are made again."""
  sha = hashlib.sha256()
  folder = pathlib.Path(synthetic_faces.__file__).parent
  for path in sorted(folder.glob('*.py')):
    sha.update(path.read_bytes())
  return sha.hexdigest()


def seconds(options):
  """About how long it takes on two cores."""
  frames = options['num_identities'] * options['num_frames'] * 6
  # Below that frames are drawn larger than they are stored.
  side = max(options['image_size'], 128)
  return frames * (COST[0] + COST[1] * side**2)


def name_splits(clips):
  """The splits of every data set; train, val and test by number of person."""
  who = sorted({clip['subject'] for clip in clips.values()})
  n = len(who)
  num_test = max(round(TEST * n), 1) if n > 1 else 0
  num_val = max(round(VAL * n), 1) if n > 2 else 0
  num_train = n - num_val - num_test
  splits = face_video.make_splits(clips)
  for name, part in (
    ('train', who[:num_train]), ('val', who[num_train : num_train + num_val]),
    ('test', who[num_train + num_val :]),
  ):
    splits[name] = [
      i for i in splits['everything'] if clips[i]['subject'] in part]
  return splits


def _render(clips, options):
  """Draws clips, a person at a time; yields (clip, record, digest)."""
  people = {}
  for clip in clips:
    people.setdefault(clip.subject, []).append(clip)
  draw = lambda of_one: [_record(clip, options) for clip in of_one]
  workers = concurrent.futures.ThreadPoolExecutor(NUM_WORKERS)
  total = len(clips) * options['num_frames']
  try:
    with tqdm.tqdm(total=total, unit='frame', desc='synthetic') as bar:
      for done in workers.map(draw, people.values()):
        for result in done:
          yield result
          bar.update(options['num_frames'])
  finally:  # Ctrl-C does not wait for everybody.
    workers.shutdown(cancel_futures=True)


def _record(clip, options):
  seed = PEOPLE * options['seed'] + int(clip.subject)
  drawn = synthetic_faces.render_clip(
    seed, clip.label, options['num_frames'], options['image_size'],
    grey=options['grey'],
  )
  png = lambda image: cv2.imencode('.png', image)[1].tobytes()
  record = {
    'video': [png(frame[..., ::-1]) for frame in drawn['video']],
    'lip_mask': [png(mask) for mask in drawn['lip_mask']],
    'label': clip.label,
    'subject': clip.subject,
    'id': clip.id,
    'alpha': list(drawn['alpha']),
    'landmarks': list(drawn['landmarks']),
    'still': 0,
    'facs': '',
  }
  sha = hashlib.sha256(f'{clip.id} {clip.label} {clip.subject}'.encode())
  for key in ('video', 'lip_mask', 'alpha', 'landmarks'):
    sha.update(drawn[key].tobytes())
  return clip, record, sha.hexdigest()
