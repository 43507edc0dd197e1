"""Records -> uint8 batches, and the names of the batch keys.

On the host a batch is a dict of NumPy arrays: `video` uint8 [B, 1+K, H, W, 3]
with video[:, 0] the neutral frame, `time` float32 [B, 1+K] in [0, 1],
`lip_mask` uint8 [B, 1+K, H, W, 1] in {0, 1} (all zero where unknown), `label`
and `subject` int32 [B]. `prepare`, inside jit, crops, flips and jitters it and
changes the range to [-1, 1].

Batch k is a pure function of (seed, k), so a resumed run reads what the
unbroken one would have read and the iterator needs no checkpoint.
"""

import dataclasses
import functools
import os
from concurrent import futures

import cv2
import dm_pix
import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np

from hatjax import cache, settings
from hatjax import records as records_lib
from hatjax import video as video_lib

FRAMES = ('random', 'even', 'blend', 'window', 'any')
RESIDENT_LIMIT = 2 << 30  # bytes that 'auto' keeps on the device
FRAMES_LIMIT = 4 << 30  # bytes that the cache folder keeps


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Batches:
  """Training batches of one split; see `make_batches` for the settings."""

  records: records_lib.Records
  clips: tuple[records_lib.Clip, ...]
  image_size: int
  load_size: int
  batch_size: int
  num_frames: int
  frames: str
  include_last: bool
  seed: int
  pad: int
  crop_offsets: int
  flip: float
  jitter: float
  resize: str
  resident: bool

  @property
  def labels(self):
    """Names of the labels."""
    return self.records.labels

  def trained_labels(self):
    """Names of the labels that have a clip here."""
    seen = {clip.label for clip in self.clips}
    return [name for n, name in enumerate(self.labels) if n in seen]

  def _picks(self):
    """Practically endless grain data set of (clip, frames) choices."""
    n = len(self.clips)
    # grain's own shuffle takes milliseconds per pick.
    order = functools.lru_cache(4)(
      lambda epoch: np.random.default_rng((self.seed, epoch)).permutation(n)
    )
    return (
      grain.MapDataset.range(2**40).seed(self.seed)
      .map(lambda i: order(i // n)[i % n]).random_map(self._pick)
    )

  def _pick(self, position, rng):
    """The neutral frame and K others; see `make_batches`."""
    n, k = self.clips[position].num_frames, self.num_frames
    if self.frames == 'any':
      frames = rng.integers(0, n, 1 + k).astype(np.int32)
      return {'clip': np.int32(position), 'frames': frames}
    if self.frames == 'blend':
      at = np.linspace(0, n - 1, 1 + k, dtype=np.float32)
      pair = np.stack([np.floor(at), np.ceil(at)]).astype(np.int32)
      return {'clip': np.int32(position), 'frames': pair.ravel(), 'at': at}
    if self.frames == 'even':
      later = np.linspace(0, n - 1, 1 + k)[1:].round()
    elif self.frames == 'window':
      span = rng.integers(min(k, n) - 1, n)
      last = n - 1 if self.include_last else rng.integers(span, n)
      later = np.linspace(last - span, last, k).round()
    else:
      later = rng.integers(1, n, k)
    if self.include_last:
      later[-1] = n - 1
    frames = np.concatenate([[0], later]).astype(np.int32)
    return {'clip': np.int32(position), 'frames': frames}

  def _describe(self, pick):
    clip = self.clips[pick['clip']]
    at = pick.get('at', pick['frames'])
    known = {
      'time': (at / (clip.num_frames - 1)).astype(np.float32),
      'label': np.int32(clip.label),
      'subject': np.int32(clip.subject),
    }
    return known | ({'at': at} if 'at' in pick else {})

  @functools.cached_property
  def _cached_frame(self):
    frame_bytes = 4 * self.load_size**2
    size = int(min(1 << 16, (512 << 20) // frame_bytes))
    return functools.lru_cache(size)(self._load_clip_frame)

  def _load_clip_frame(self, position, frame):
    (video,), (mask,) = self.records.read(self.clips[position], [frame])
    return self._fit(video), self._fit(mask)

  def _fit(self, image, size=None):
    """Resizes a frame, or a mask (thresholded at 3/4), to a square."""
    size = size or self.load_size
    if image.shape[:2] == (size, size):
      return image
    if image.shape[-1] == 3:
      return video_lib.resize(image, size, self.resize)
    mask = cv2.resize(
      image[..., 0] * np.uint8(255), (size, size),
      interpolation=cv2.INTER_CUBIC if self.resize == 'cubic'
      else cv2.INTER_AREA,
    )
    return (mask >= 191.25).astype(np.uint8)[..., None]

  def _load(self, pick):
    frames = [
      self._cached_frame(int(pick['clip']), int(f)) for f in pick['frames']
    ]
    video, mask = (np.stack(x) for x in zip(*frames))
    return {'video': video, 'lip_mask': mask, **self._describe(pick)}

  def iterate(self, start=0):
    """Batches start, start + 1, ... with read-ahead; see the module."""
    ds = self._picks()
    if self.resident:
      first = self._first_frames
      ds = ds.map(lambda p: {
        'frames': p['frames'] + first[p['clip']], **self._describe(p)
      })
    else:
      ds = ds.map(self._load)
    ds = ds.batch(self.batch_size)[start:]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    return iter(ds.to_iter_dataset(options))

  @functools.cached_property
  def _first_frames(self):
    counts = [clip.num_frames for clip in self.clips]
    return np.cumsum([0, *counts[:-1]]).astype(np.int32)

  def resident_frames(self, stopped=lambda: False, keep=False):
    """All frames of the split for the device, or {} when streaming.

    Args:
      stopped: asked before every clip whether nobody wants them any more.
      keep: decoded and resized in the user's cache folder, for the next time.

    Returns:
      dict: video uint8 [F, S, S, 3], lip_mask uint8 [F, S, S, 1].
    """
    if not self.resident:
      return {}
    path = None
    if keep and not self.records.elsewhere:  # Those may change unseen.
      clips = [(c.id, c.first, c.num_frames) for c in self.clips]
      path = cache.path(cache.folder('frames'), [
        self.records.metadata['fingerprint'], clips, self.load_size,
        self.resize, np.__version__, cv2.__version__,
      ])
    frames = cache.load(path)
    if frames is None:
      frames = self._read_frames(stopped)
      if not stopped():
        cache.save(path, frames, FRAMES_LIMIT)
    return frames

  def _read_frames(self, stopped):
    frames = sum(clip.num_frames for clip in self.clips)
    shape = (frames, self.load_size, self.load_size)
    video, masks = (np.empty((*shape, n), np.uint8) for n in (3, 1))

    def load(clip, first):
      if stopped():
        return
      places = range(first, first + clip.num_frames)
      decoded = self.records.frames(clip, range(clip.num_frames))
      for at, (frame, mask) in zip(places, decoded, strict=True):
        video[at], masks[at] = self._fit(frame), self._fit(mask)

    with futures.ThreadPoolExecutor(min(32, os.cpu_count())) as pool:
      list(pool.map(load, self.clips, self._first_frames))
    return {'video': video, 'lip_mask': masks}

  def prepare(self, batch, resident, rng):
    """Inside jit: gather (if resident), crop, flip, jitter, to float.

    One crop, flip and jitter serve a whole clip.

    Args:
      batch: as `iterate` gives it.
      resident: as `resident_frames` gives it.
      rng: key of the step.

    Returns:
      The batch of a method: video float32 in [-1, 1], lip_mask float32.
    """
    if resident:
      batch = dict(batch)
      frames = batch.pop('frames')
      batch |= {key: value[frames] for key, value in resident.items()}
    if 'at' in batch:
      batch = _blend_pairs(batch)
    pixels = jnp.concatenate([batch['video'], batch['lip_mask']], -1)
    keys = jax.random.split(rng, pixels.shape[0])
    pixels = jax.vmap(self._crop_and_flip)(pixels, keys)
    clip = video_lib.to_float(pixels[..., :3])
    if self.jitter:
      clip = jax.vmap(self._jitter_colours)(clip, keys)
    masks = pixels[..., 3:].astype(jnp.float32)
    return {**batch, 'video': clip, 'lip_mask': masks}

  def _crop_and_flip(self, pixels, rng):
    """uint8 [T, load, load, 4] -> [T, size, size, 4]."""
    rng_crop, rng_flip = jax.random.split(rng)
    if self.pad:
      p = (self.pad, self.pad)
      pixels = jnp.pad(pixels, [(0, 0), p, p, (0, 0)], mode='edge')
    size, reach = self.image_size, self.image_size + self.crop_offsets - 1
    if self.crop_offsets > 1:
      pixels = dm_pix.random_crop(
        rng_crop, pixels[:, :reach, :reach], (len(pixels), size, size, 4)
      )
    return dm_pix.random_flip_left_right(
      rng_flip, pixels, probability=self.flip
    )

  def _jitter_colours(self, clip, rng):
    """Brightness, contrast and saturation of a whole clip in [-1, 1]."""
    keys = jax.random.split(jax.random.fold_in(rng, 1), 3)
    low, high = 1 - self.jitter, 1 + self.jitter
    clip = 0.5 * (clip + 1)
    clip = dm_pix.random_brightness(keys[0], clip, self.jitter / 2)
    clip = dm_pix.random_contrast(keys[1], clip, low, high)
    clip = dm_pix.random_saturation(keys[2], clip, low, high)
    return 2 * jnp.clip(clip, 0, 1) - 1

  def example(self):
    """A batch of zeros with the shapes that `prepare` returns."""
    return example_batch(self.image_size, self.batch_size, self.num_frames)

  def neutral_faces(self, limit=None):
    """{subject: first frame uint8 [S, S, 3]}, the first clip of each."""
    faces = {}
    for clip in self.clips:
      if clip.subject_name in faces:
        continue
      if limit and len(faces) == limit:
        break
      (frame,), _ = self.records.read(clip, [0])
      faces[clip.subject_name] = self._fit(frame, self.image_size)
    return faces

  def whole_clips(self, limit=None, skip=None):
    """Whole clips, or `limit` of them, as they are but for their size.

    Args:
      limit: how many, always the same ones.
      skip: takes (id, error) of a clip that cannot be read; else it is raised.

    Yields:
      dict: id, label (int), subject (its name), video uint8 [T, S, S, 3].
    """
    # Drawn, since every n-th one may always show the same expression.
    order = np.random.default_rng(0).permutation(len(self.clips))
    for index in sorted(order[: limit or None]):
      clip = self.clips[index]
      try:
        frames = self.records.frames(clip, range(clip.num_frames))
        video = np.stack([self._fit(f, self.image_size) for f, _ in frames])
      except Exception as error:  # decoders of damaged bytes raise anything
        if skip is None:
          raise
        skip(clip.id, error)
        continue
      known = {'id': clip.id, 'label': clip.label}
      yield {**known, 'subject': clip.subject_name, 'video': video}


def _blend_pairs(batch):
  """Frames between two, by their places `at` [B, T]: of [B, 2 T, H, W, C] the
  first T come before them, the others after. Masks are the nearer one's."""
  batch = dict(batch)
  share = batch.pop('at') % 1
  share = share[..., None, None, None]
  before, after = jnp.split(batch['video'].astype(jnp.float32), 2, 1)
  mixed = jnp.rint(before + share * (after - before))
  masks = jnp.split(batch['lip_mask'], 2, 1)
  mask = jnp.where(share < 0.5, *masks)
  return batch | {'video': mixed.astype(jnp.uint8), 'lip_mask': mask}


def example_batch(image_size, batch_size, num_frames):
  """A batch of zeros in the shapes that a method's step reads."""
  shape = (batch_size, 1 + num_frames, image_size, image_size)
  return {
    'video': np.zeros((*shape, 3), np.float32),
    'lip_mask': np.zeros((*shape, 1), np.float32),
    'time': np.zeros(shape[:2], np.float32),
    'label': np.zeros(shape[:1], np.int32),
    'subject': np.zeros(shape[:1], np.int32),
  }


def make_batches(
  name, split='train', image_size=256, batch_size=1, num_frames=5,
  frames='random', include_last=False, seed=0,
  load_size=0, pad=0, crop_offsets=0, flip=0.5, jitter=0.0,
  resize='auto', resident='auto', labels=(), directory=None,
):
  """Batches of a split.

  Args:
    name: records, such as 'ck_plus/face-256'.
    split: a named split of them.
    image_size: side of what the method sees.
    batch_size: clips per step, over all devices.
    num_frames: K frames per clip besides the neutral one.
    frames: 'random' draws these anew for every step; 'even' spreads them over
      the whole clip, in the order of time, the last one among them (the
      nearest there is; 'blend' mixes the two that are nearest); 'window' over
      any part of K frames or more, the neutral one perhaps among them; 'any'
      draws 1 + K frames, none of which need be the neutral one.
    include_last: the K-th is always the clip's last frame, the apex.
    seed: of the order and the picks.
    load_size: side after resizing, before the random crop; 0 for
      image_size.
    pad: edge pixels added before the crop.
    crop_offsets: how many crop positions per axis; 0 for all of them.
    flip: probability of mirroring a clip.
    jitter: strength of the colour jitter, 0 for none.
    resize: 'auto' (anti-aliased) or 'cubic' (the released code's).
    resident: keep all frames on the device: 'yes', 'no' or 'auto' (when they
      take less than 2 GiB).
    labels: use only clips with these labels (names or aliases); () for all.
    directory: where the records live; see `records.data_dir`.

  Raises:
    ValueError: no records, empty split, sizes that do not fit.
  """
  records = records_lib.Records(name, directory)
  clips = [c for c in records.split(split) if c.num_frames > 1]
  if labels:
    wanted = {records.labels.index(records_lib.match_label(x, records.labels))
              for x in labels}
    clips = [c for c in clips if c.label in wanted]
  if not clips:
    raise ValueError(
      f'data.labels: no clip of {name} {split} has the labels {labels}.'
    )
  load_size = load_size or image_size
  room = load_size + 2 * pad - image_size
  if room < 0:
    raise ValueError(
      f'data.load_size {load_size} is smaller than image_size {image_size}.'
    )
  crop_offsets = crop_offsets or room + 1
  if not 1 <= crop_offsets <= room + 1:
    raise ValueError(f'data.crop_offsets must lie in 1..{room + 1}.')
  settings.check_choices(
    data__frames=(frames, FRAMES),
    data__resident=(resident, ('auto', 'yes', 'no')),
    data__resize=(resize, ('auto', 'cubic', 'area')),
  )
  if resident == 'auto':
    count = sum(c.num_frames for c in clips)
    small = 4 * count * load_size**2 < RESIDENT_LIMIT
    resident = 'yes' if small else 'no'
  return Batches(
    records=records, clips=tuple(clips), image_size=image_size,
    load_size=load_size, batch_size=batch_size, num_frames=num_frames,
    frames=frames, include_last=include_last, seed=seed, pad=pad,
    crop_offsets=crop_offsets, flip=flip, jitter=jitter, resize=resize,
    resident=resident == 'yes',
  )
