"""What every builder of face videos shares: the record, the splits, the work.

A builder module describes one raw layout with a function
`scan(raw, subjects=None) -> Scan` and names a subclass of `FaceVideo`. All of
the rest is here: frames are read, cropped and resized, lip masks made, and
records written as PNG bytes (arrays would make TFDS import TensorFlow).

Every record has one form, whatever the data set; see `features`. One stored
split, `clips`, holds all of them. Named splits are lists of ids in the
metadata, which is metadata.json beside the records and
`tfds.builder_from_directory(folder).info.metadata`:

  splits        {name: [ids]}, see `make_splits`
  clips         {id: {label, subject, num_frames, still}}, in stored order
  labels        names in the order of their codes
  options       what the records were made with
  fingerprint   digest of the content: ids, labels, subjects, decoded pixels
  raw_digest    digest of what was read from the raw folder
  report        where masks came from, skipped files with reasons, notes
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import pathlib
import re

import cv2
import numpy as np
import tensorflow_datasets as tfds
import tqdm

from hatjax import faces, video

SPLIT = 'clips'
CLIPS_PER_FILE = 64
SEED = 0
VAL_PART, TEST_PART = 0.1, 0.2
BY_VIDEO_TEST = 10  # videos, as the papers; a fifth where clips are few
MIN_BY_VIDEO = 50
LOST = 'It is the neutral frame: the whole clip is skipped.'
JUNK = ('thumbs.db', 'desktop.ini', '__macosx')
_workers = functools.partial(concurrent.futures.ThreadPoolExecutor, 2)


@dataclasses.dataclass
class Clip:
  """One clip as a builder found it; paths are absolute."""

  id: str
  label: str
  subject: str
  frames: list[pathlib.Path]  # neutral first
  masks: list[pathlib.Path | None] | None = None  # None: the set has none
  landmarks: list[pathlib.Path | None] | None = None
  facs: str = ''
  still: bool = False


@dataclasses.dataclass
class Scan:
  """What a raw folder holds."""

  raw: pathlib.Path
  labels: list[str]
  clips: list[Clip] = dataclasses.field(default_factory=list)
  skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)

  def skip(self, path, reason):
    """Lists a file or folder that is not used, and why."""
    self.skipped.append((path.relative_to(self.raw).as_posix(), reason))


@dataclasses.dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
  """The options of a data set; its name is the folder of the records."""

  scan: Scan | None = dataclasses.field(default=None, repr=False)
  options: dict | None = None
  raw_digest: str = ''


class FaceVideo(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The TFDS side of every builder."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=features(self.builder_config.scan.labels),
      metadata=tfds.core.MetadataDict(),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {SPLIT: self._generate_examples()}

  def _generate_examples(self):
    scan, options = self.builder_config.scan, self.builder_config.options
    metadata = self.info.metadata
    metadata.update(
      options=options, labels=scan.labels, clips={},
      raw_digest=self.builder_config.raw_digest,
    )
    fingerprint, masks = {}, {}
    total = sum(len(clip.frames) for clip in scan.clips)
    with tqdm.tqdm(total=total, unit='frame', desc=self.name) as bar:
      for clip in scan.clips:
        record, source = make_record(clip, options, scan)
        bar.update(len(clip.frames))
        if record is None:
          continue
        fingerprint[clip.id] = record.pop('digest')
        masks[source] = masks.get(source, 0) + 1
        metadata['clips'][clip.id] = {
          'label': clip.label, 'subject': clip.subject,
          'num_frames': len(record['video']), 'still': clip.still,
        }
        yield clip.id, record
    if all(clip['still'] for clip in metadata['clips'].values()):
      raise ValueError(f'No usable clip in {scan.raw}. Mend what is listed.')
    metadata['fingerprint'] = _hash(json.dumps(sorted(fingerprint.items())))
    metadata['splits'] = make_splits(metadata['clips'])
    metadata['report'] = {
      'masks': masks,
      'skipped': [list(entry) for entry in scan.skipped],
      'notes': scan.notes,
    }


def features(labels):
  """The record."""
  png = functools.partial(tfds.features.Image, encoding_format='png')
  return tfds.features.FeaturesDict({
    # Neutral frame first.
    'video': tfds.features.Sequence(png(shape=(None, None, 3))),
    # One per frame, 0 or 255; all zero where unknown.
    'lip_mask': tfds.features.Sequence(png(shape=(None, None, 1))),
    'label': tfds.features.ClassLabel(names=labels),
    'subject': tfds.features.Text(),
    'id': tfds.features.Text(),
    # Intensity of every frame; empty where unknown.
    'alpha': tfds.features.Sequence(np.float32),
    # Pixels of the stored frame, one set per frame; empty where unknown.
    'landmarks': tfds.features.Sequence(
      tfds.features.Tensor(shape=(68, 2), dtype=np.float32)
    ),
    # 1 for a single face to animate, 0 for a clip to learn from.
    'still': tfds.features.Scalar(dtype=np.int32),
    # 'AU:intensity AU:intensity', FACS units of the apex; '' where unknown.
    'facs': tfds.features.Text(),
  })


def config_name(options):
  """The folder name: crop, size, what is unusual; face-256, none-256-black."""
  usual = {'half': 'first', 'condition': 'vl_strong', 'background': 'keep'}
  words = [options['crop'], str(options['image_size'] or 'native')]
  words += [options[k] for k in usual if options.get(k, usual[k]) != usual[k]]
  return '-'.join(words)


def build(builder_cls, scan, options, raw_digest, data_dir):
  """Writes records below `data_dir`, reads them back, and returns both.

  Returns:
    (folder of the records, their metadata).

  Raises:
    ValueError: no clip can be used; `scan.skipped` says why.
    OSError: the records could not be written whole.
  """
  name = config_name(options)
  config = Config(name, scan=scan, options=options, raw_digest=raw_digest)
  builder = builder_cls(
    data_dir=data_dir, config=config, file_format='array_record'
  )
  folder = pathlib.Path(builder.data_dir)
  folder.mkdir(parents=True)
  # Not download_and_prepare: it holds all records in memory to shuffle them,
  # and from 1 GB on needs TensorFlow to put them aside.
  writer = tfds.core.SequentialWriter(
    builder.info, CLIPS_PER_FILE, file_format='array_record'
  )
  writer.initialize_splits([SPLIT])
  for _, record in builder._generate_examples():
    writer.add_examples({SPLIT: [record]})
  writer.close_all()
  metadata = dict(builder.info.metadata)
  _check_stored(folder, metadata['clips'])
  return folder, metadata


class _Encoded(tfds.decode.Decoder):
  """Leaves images as bytes."""

  def decode_example(self, example):
    return example

  def decode_batch_example_np(self, example):
    return example


def _check_stored(folder, clips):
  """Reads all records once: a full disk may leave files that look whole."""
  builder = tfds.builder_from_directory(folder)
  frames = 'times' if 'times' in builder.info.features else 'video'
  decoders = {k: _Encoded() for k in ('video', 'lip_mask') if frames == 'video'}
  source = builder.as_data_source(SPLIT, decoders=decoders)
  read = map(source.__getitem__, range(len(source)))
  stored = [(record['id'].decode(), len(record[frames])) for record in read]
  if stored != [(name, clip['num_frames']) for name, clip in clips.items()]:
    raise OSError(
      f'The records in {folder} cannot be read back whole. '
      'Is the disk full? Free some space and run again.'
    )


def list_entries(folder):
  """What is in a folder, in natural order (2 < 10), without systems' litter."""
  paths = [
    path for path in folder.iterdir()
    if path.name[0] != '.' and path.name.lower() not in JUNK
  ]
  parts = lambda path: [
    (0, int(part), '') if part.isdecimal() else (1, 0, part)
    for part in re.split(r'([0-9]+)', path.name) if part
  ]
  return sorted(paths, key=parts)


def list_frames(folder, scan):
  """Paths of the frames of a clip; what else is there is listed as skipped."""
  frames = []
  for path in list_entries(folder):
    if path.is_dir():
      scan.skip(path, 'is a folder among frames. Move it away.')
    elif path.suffix.lower() in ('', *video.IMAGE_ENDINGS):
      frames.append(path)
    else:
      scan.skip(path, 'is not named like a picture. Move it away.')
  return frames


def make_record(clip, options, scan):
  """One record, with `digest`, the digest of its content, beside its fields.

  Returns:
    (record, where its lip masks come from), or (None, None) for a clip that
    cannot be used, which is then listed in `scan.skipped`.
  """
  folder = clip.frames[0].parent if clip.frames else scan.raw
  if len(clip.frames) < 2 and not clip.still:
    reason = f'has {len(clip.frames)} frames, a clip needs 2. Add frames.'
    scan.skip(folder, f'clip {clip.id} {reason}')
    return None, None
  try:
    work = _plan(clip, options)
  except ValueError as error:
    reason = f'{_reason(error, clip.frames[0])} {LOST}'
    scan.skip(clip.frames[0], reason)
    return None, None
  with _workers() as workers:
    done = list(workers.map(work.frame, range(len(clip.frames))))
  for frame in done:
    for path, reason in frame.skipped:
      scan.skip(path, reason)
  done = [frame for frame in done if frame.image is not None]
  if len(done) < 2 and not clip.still:
    scan.skip(folder, f'clip {clip.id} has no second usable frame. Mend it.')
    return None, None
  points = [frame.points for frame in done]
  if any(p is None for p in points):
    points = []
  record = {
    'video': [frame.image for frame in done],
    'lip_mask': [frame.mask for frame in done],
    'label': clip.label, 'subject': clip.subject, 'id': clip.id,
    'alpha': [], 'landmarks': points,
    'still': int(clip.still), 'facs': clip.facs,
  }
  content = [clip.id, clip.label, clip.subject, clip.facs, clip.still]
  content += [frame.digest for frame in done]
  content += [p.tobytes().hex() for p in points]
  record['digest'] = _hash(json.dumps(content))
  return record, work.mask_source


def _plan(clip, options):
  """What is to be done with every frame, from the neutral one."""
  neutral = video.read_image(clip.frames[0])
  own, tracked = clip.masks is not None, clip.landmarks is not None
  black = options.get('background') == 'black'
  face = None
  if options['crop'] == 'face' or not (own or tracked) or black:
    face = faces.detect_face(neutral)
  box = None
  if options['crop'] == 'face':
    if face is None:
      raise ValueError(
        'no face found. Check that it shows one upright, or use --crop none.'
      )
    box = faces.square_crop_box(face, neutral.shape)
  source = 'mouth box' if face else 'none'
  if own or tracked:
    source = 'own' if own else 'landmarks'
  if black and face is None and not tracked:
    raise ValueError('no face found. Use --background keep.')
  size = options['image_size'] or None
  return _Work(clip, neutral.shape, face, box, size, source, black)


@dataclasses.dataclass
class _Frame:
  """A finished frame: PNG bytes of image and mask; image None if unusable."""

  skipped: list
  image: bytes | None = None
  mask: bytes | None = None
  points: np.ndarray | None = None
  digest: str = ''


@dataclasses.dataclass
class _Work:
  """One clip's face, crop and sizes; all of its frames get the same."""

  clip: Clip
  shape: tuple
  face: tuple | None
  box: tuple | None
  size: int | None
  mask_source: str
  black: bool = False

  def frame(self, t):
    path = self.clip.frames[t]
    out = _Frame([])
    try:
      image = video.read_image(path)
      if image.shape != self.shape:
        raise ValueError(
          f'is {_size(image.shape)}, the first frame {_size(self.shape)}. '
          'Bring both to one size.'
        )
    except ValueError as error:
      out.skipped.append((path, _reason(error, path)))
      return out
    points = self._points(t, out.skipped)
    mask = faces.binarize(self._place(self._mask(t, points, out.skipped)))
    if self.black:
      image = faces.blacken_background(image, self.face, points)
    image = self._place(image)
    if points is not None:
      box = self.box or (0, 0, self.shape[1], self.shape[0])
      out.points = faces.move_points(points, box, image.shape)
      out.points = out.points.astype(np.float32)
    out.image = video.encode_png(image)
    out.mask = cv2.imencode('.png', mask)[1].tobytes()
    out.digest = _hash(str(image.shape), image.tobytes(), mask.tobytes())
    return out

  def _place(self, image):
    if self.box is not None:
      return faces.crop(image, self.box, self.size)
    return image if self.size is None else video.resize(image, self.size)

  def _points(self, t, skipped):
    path = self.clip.landmarks and self.clip.landmarks[t]
    if not path:
      return None
    try:
      points = np.array(path.read_text().split(), float).reshape(68, 2)
      if not (np.abs(points) < 1e5).all():
        raise ValueError('points far outside the image')
      return points
    except (ValueError, OSError) as error:
      reason = f'does not hold 68 lines "x y" ({error}). Unpack it again.'
      skipped.append((path, reason))
      return None

  def _mask(self, t, points, skipped):
    """uint8 [H, W] of the whole frame, zero where nothing is known."""
    empty = np.zeros(self.shape[:2], np.uint8)
    if self.mask_source == 'own':
      return self._own_mask(t, skipped, empty)
    if self.mask_source == 'landmarks':
      if points is None:
        return empty
      return faces.lip_mask_from_landmarks(points, self.shape)
    if self.mask_source == 'mouth box':
      return faces.mouth_box_mask(self.face, self.shape)
    return empty

  def _own_mask(self, t, skipped, empty):
    path = self.clip.masks[t]
    if path is None:
      reason = 'has no mask; it gets an empty one. Add the mask of its name.'
      skipped.append((self.clip.frames[t], reason))
      return empty
    try:
      mask = cv2.cvtColor(video.read_image(path), cv2.COLOR_RGB2GRAY)
      if mask.shape != self.shape[:2]:
        raise ValueError(
          f'is a mask of {_size(mask.shape)}, its frame is '
          f'{_size(self.shape)}. Make it of the same size.'
        )
      if 0 < mask.max() < 128:
        raise ValueError(
          f'is a mask whose brightest value is {mask.max()}. Lips must be 255.'
        )
      return mask
    except ValueError as error:
      reason = f'{_reason(error, path)} The frame gets an empty mask.'
      skipped.append((path, reason))
      return empty


def make_splits(clips):
  """Named lists of ids, the same for the same clips on every machine.

  train, val and test have no subject in common. by_video_* are the papers'
  split, in which they may have. `everything` is all clips; `stills` are single
  faces, in no other split.
  """
  moving = sorted(name for name, clip in clips.items() if not clip['still'])
  subjects = shuffled({clips[name]['subject'] for name in moving})
  n = len(subjects)
  # With few subjects every split gets one before train gets a second.
  num_test = max(round(TEST_PART * n), 1) if n > 1 else 0
  num_val = max(round(VAL_PART * n), 1) if n > 2 else 0
  test = set(subjects[:num_test])
  val = set(subjects[num_test : num_test + num_val])
  train = set(subjects) - test - val
  of = lambda who: [name for name in moving if clips[name]['subject'] in who]
  few = len(moving) < MIN_BY_VIDEO
  held_out = round(TEST_PART * len(moving)) if few else BY_VIDEO_TEST
  if len(moving) > 1:
    held_out = max(held_out, 1)
  by_video = shuffled(moving)
  return {
    'train': of(train),
    'val': of(val),
    'test': of(test),
    'everything': moving,
    'stills': sorted(name for name, clip in clips.items() if clip['still']),
    'by_video_train': sorted(by_video[held_out:]),
    'by_video_test': sorted(by_video[:held_out]),
  }


def shuffled(names):
  """An order that depends on the names and SEED alone, nothing else."""
  return sorted(names, key=lambda name: (_hash(f'{SEED}:{name}'), name))


def digest(scan):
  """Digest of all that was read or will be; the same for a moved folder."""
  name = lambda path: path and path.relative_to(scan.raw).as_posix()
  read, told = [], [scan.labels, scan.skipped, scan.notes]
  for clip in scan.clips:
    paths = [clip.frames, clip.masks or [], clip.landmarks or []]
    told.append([clip.id, clip.label, clip.subject, clip.facs, clip.still])
    told.append([[name(path) for path in part] for part in paths])
    read += [path for part in paths for path in part if path]
  with _workers() as workers:
    work = workers.map(_file_digest, read)
    # Shown only where it takes more than a moment.
    bar = tqdm.tqdm(work, 'checking', len(read), unit='file', delay=1)
    content = list(bar)
  return _hash(json.dumps([told, content]))


def _file_digest(path):
  try:
    with open(path, 'rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    return str(error.strerror)  # reading it for its pixels will say so, too


def _hash(*parts):
  sha = hashlib.sha256()
  for part in parts:
    sha.update(part.encode() if isinstance(part, str) else part)
  return sha.hexdigest()


def _reason(error, path):
  return str(error).removeprefix(str(path)).lstrip(' :')


def _size(shape):
  return f'{shape[1]}x{shape[0]}'
