"""Records on disk: TFDS folders that hatjax.prepare wrote, and their clips."""

import dataclasses
import os
import pathlib
import re
import warnings

import cv2
import numpy as np
import tensorflow_datasets as tfds

from hatjax import clips as clips_lib
from hatjax import faces, video

ALIASES = (
  ('happy', 'happiness', 'joy', 'smile'),
  ('sad', 'sadness'),
  ('angry', 'anger'),
  ('fear', 'scared', 'afraid', 'fearful'),
  ('surprise', 'surprised'),
  ('disgust', 'disgusted'),
  ('contempt', 'contemptuous'),
  ('neutral', 'calm'),
)


def data_dir(path=None):
  """Where records live: `path`, else $TFDS_DATA_DIR, else TFDS's default."""
  path = path or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return pathlib.Path(path).expanduser()


def match_label(text, labels):
  """The known label that `text` names, aliases included (joy = happiness).

  Raises:
    ValueError: no known label; the message lists them.
  """
  wanted = text.strip().lower()
  for group in ALIASES:
    if wanted in group:
      for label in labels:
        if label.lower() in group:
          return label
  for label in labels:
    if label.lower() == wanted:
      return label
  raise ValueError(f'Unknown label {text!r}. Known: {", ".join(labels)}.')


class _Encoded(tfds.decode.Decoder):
  """Leaves images encoded: a clip is long and a step wants a few frames."""

  def decode_example(self, example):
    return example

  decode_example_np = decode_example

  def decode_batch_example_np(self, example):
    return example


@dataclasses.dataclass(frozen=True)
class Clip:
  """One clip of the records: where it stands and what is known of it."""

  index: int
  id: str
  label: int
  subject: int
  subject_name: str
  num_frames: int
  first: int = 0  # number of its first frame in the record


class Records:
  """An opened data set.

  Attributes:
    labels: names of the labels.
    metadata: what `prepare` kept: splits, options, fingerprint.
    clips: {id: Clip}.
    elsewhere: whether the clips were left where they are.
  """

  def __init__(self, name, directory=None):
    self.name = name
    folder = _record_folder(name, data_dir(directory))
    try:
      self._open(folder)
    except Exception as error:  # damaged files raise anything
      raise ValueError(
        f'The records in {folder} cannot be read ({_reason(error)}). Run '
        'hatjax.prepare again with --force.'
      ) from error

  def _open(self, folder):
    builder = tfds.builder_from_directory(folder)
    self.metadata = dict(builder.info.metadata or {})
    self.labels = tuple(builder.info.features['label'].names)
    # These have times and no pictures.
    self.elsewhere = 'times' in builder.info.features
    decoders = {'video': _Encoded(), 'lip_mask': _Encoded()}
    decoders = {} if self.elsewhere else decoders
    self._source = builder.as_data_source('clips', decoders=decoders)
    self.clips = {}
    subjects = sorted({c['subject'] for c in self.metadata['clips'].values()})
    for index, (name, c) in enumerate(self.metadata['clips'].items()):
      self.clips[name] = Clip(
        index, name, self.labels.index(c['label']),
        subjects.index(c['subject']), c['subject'], c['num_frames'],
      )

  def split(self, name):
    """Clips of a named split; '<name>/early' and '<name>/late' are the first
    four fifths and the last fifth of the frames of each.

    Raises:
      ValueError: no such split, or nothing in it.
    """
    splits = self.metadata['splits']
    name, _, part = name.partition('/')
    if part not in ('', 'early', 'late'):
      raise ValueError(
        f'Split {name}/{part}: Choose one of: {name}, {name}/early, '
        f'{name}/late.'
      )
    if name not in splits:
      raise ValueError(
        f'{self.name} has no split {name!r}. Choose one of: '
        f'{", ".join(sorted(splits))}.'
      )
    clips = [self.clips[i] for i in splits[name]]
    if not clips:
      raise ValueError(
        f'Split {name!r} of {self.name} is empty. With few subjects train on '
        "--config.data.split=everything instead."
      )
    if name.startswith('by_video'):
      warnings.warn(
        f'{name} splits by video: subjects leak between training and test. '
        'Scores on it say nothing about new faces.', stacklevel=2,
      )
    return [_part(clip, part) for clip in clips]

  def read(self, clip, frames):
    """Decoded frames uint8 [T, h, w, 3] and masks [T, h, w, 1] in {0, 1}."""
    return tuple(map(np.stack, zip(*self.frames(clip, frames))))

  def frames(self, clip, frames):
    """Yields (frame, mask) of `read` one by one."""
    frames = [clip.first + int(i) for i in frames]
    try:
      example = self._source[clip.index]
      if not self.elsewhere:
        yield from self._decoded(example, frames, clip)
        return
    except Exception as error:  # decoders of damaged bytes raise anything
      raise ValueError(
        f'{clip.id} of the records of {self.name} cannot be read '
        f'({_reason(error)}). Run hatjax.prepare again with --force.'
      ) from error
    self._check_id(example, clip)
    yield from self._frames_elsewhere(example, frames)

  def _decoded(self, example, frames, clip):
    self._check_id(example, clip)
    for i in frames:
      image = _decode(example['video'][i], cv2.IMREAD_COLOR_RGB)
      mask = _decode(example['lip_mask'][i], cv2.IMREAD_GRAYSCALE)
      yield image, (mask > 127).astype(np.uint8)[..., None]

  def _check_id(self, example, clip):
    if _text(example['id']) != clip.id:
      raise ValueError(
        f'Records of {self.name} do not match their metadata (want '
        f'{clip.id}). Run hatjax.prepare again with --force.'
      )

  def _frames_elsewhere(self, example, frames):
    """Those of a clip that was left where it is; its lips are unknown."""
    raw, part = pathlib.Path(self.metadata['raw']), _text(example['path'])
    path = raw / part
    if pathlib.Path(part).is_absolute() or '..' in pathlib.Path(part).parts:
      raise ValueError(f'{self.name}: {part} leads out of its folder {raw}.')
    size, boxes = self.metadata['options']['image_size'], example['boxes']
    found = clips_lib.read(path, frames, example['times'])
    for i, image in zip(frames, found):
      if len(boxes):
        image = faces.crop(image, [int(x) for x in boxes[i]], size or None)
      elif size:
        image = video.resize(image, size)
      yield image, np.zeros((*image.shape[:2], 1), np.uint8)

  def alphas(self, clip):
    """True intensity of every frame, float32 [T]; empty where unknown."""
    alphas = np.asarray(self._source[clip.index]['alpha'], np.float32)
    return alphas[clip.first : clip.first + clip.num_frames]


def _part(clip, part):
  """Some of a clip's frames; see `Records.split`."""
  if not part:
    return clip
  cut = min(max(round(0.8 * clip.num_frames), 1), clip.num_frames - 1)
  if part == 'early':
    return dataclasses.replace(clip, num_frames=cut)
  return dataclasses.replace(
    clip, first=cut, num_frames=clip.num_frames - cut
  )


def _reason(error):
  """The first line of an error."""
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _text(value):
  return value.decode() if isinstance(value, bytes) else str(value)


def _decode(encoded, flag):
  image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flag)
  if image is None:
    raise ValueError('a frame is no picture')
  return image


def _record_folder(name, root):
  """<root>/<builder>/<config>/<newest version>, or a clear error."""
  name, _, version = name.partition(':')
  folder = root / name
  if '..' in pathlib.Path(name).parts or pathlib.Path(name).is_absolute():
    raise ValueError(f'data.name {name!r} leads out of {root}.')
  versions = sorted(
    (p.parent for p in folder.glob('*/dataset_info.json')),
    key=lambda p: tuple(int(n) for n in p.name.split('.') if n.isdigit()),
  )
  versions = [p for p in versions if version in ('', p.name)]
  if versions:
    return versions[-1]
  raise ValueError(
    f'No records for {name} in {root}. Build them: python -m hatjax.prepare '
    f'{_prepare_options(name)} --data_dir {root}'
  )


def _prepare_options(name):
  """What hatjax.prepare is told to build the records of that name."""
  builder, _, options = name.partition('/')
  if builder == 'synthetic':
    made = re.fullmatch(r'(\d+)(-grey)?-i(\d+)-f(\d+)-s(\d+)', options)
    if not made:
      return builder
    size, grey, people, frames, seed = made.groups()
    return (
      f'{builder} --image_size {size}{" --grey" if grey else ""} '
      f'--num_identities {people} --num_frames {frames} --seed {seed}'
    )
  crop, size, *more = (*options.split('-'), '')[: options.count('-') + 2]
  size = {'native': '0'}.get(size, size) or '<side>'
  for word in filter(None, more):
    flag = 'condition' if '_' in word else 'half'
    size += f' --{"background" if word == "black" else flag} {word}'
  return f'{builder} --raw <folder> --crop {crop or "face"} --image_size {size}'
