"""FEV-GAN's nets: two image encoders, a video decoder, a video discriminator.

Images are [B, S, S, 3], videos [B, T, S, S, 3], in [-1, 1]. Both encoders end
on one grid, g x g (14 in the paper), on which their maps and those of the label
are joined. Weights start as N(0, 0.01) or, for smaller steps in proportion, by
their fan-in; those that make an output always as the former. Batch norms start
as VGAN's.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from hatjax import warp
from hatjax.nets import layers, norms

DECODERS = ('down4', 'up16')
NORMS = ('batch', 'group')
HEADS = ('direct', 'residual', 'warp')
INJECTIONS = ('input', 'first')
INITS = ('normal', 'he')
STD = 0.01
LABEL_MAPS = 32  # of a label that has learned where on the face it acts
HINTS = 16  # maps by which the decoder tells the painter what to paint


def resize(images, size):
  """[..., S, S, C] -> [..., size, size, C], bilinear."""
  shape = (*images.shape[:-3], size, size, images.shape[-1])
  return jax.image.resize(images, shape, 'bilinear')


def cell_means(video, cell):
  """[B, T, S, S, C] -> [B, T, S/cell, S/cell, C]."""
  return reduce(
    video, 'b t (h i) (w j) c -> b t h w c', 'mean', i=cell, j=cell
  )


def move(image, flow, sizes=()):
  """Fetches every pixel of a frame from where a flow says.

  Args:
    image: [B, S, S, 3].
    flow: [B, T, s, s, 2 n], x and y in units of an eighth of the picture, of n
      flows that are added up.
    sizes: sides of these flows, of cell means, smallest first; (): one of s.

  Returns:
    [B, T, S, S, 3].
  """
  (b, t), size = flow.shape[:2], image.shape[1]
  parts = jnp.split(flow, flow.shape[-1] // 2, -1)
  sides = sizes or (flow.shape[2],)
  total = jnp.zeros((1, 1, 1, 1, 2))
  for side, part in zip(sides, parts, strict=True):
    total = resize(total, side) + cell_means(part, part.shape[2] // side)
  where = warp.grid(size, size) + 0.25 * resize(total, size)
  moved = warp.warp_frames(
    image, where.reshape(b, t * size, size, 2), 'gather'
  )
  return moved.reshape(b, t, size, size, 3)


def one_hot_maps(label, num_labels, shape, dtype):
  """int32 [B] -> [B, *shape, num_labels], constant over `shape`."""
  maps = jax.nn.one_hot(label, num_labels, dtype=dtype)
  maps = maps.reshape(label.shape[0], *(1,) * len(shape), num_labels)
  return jnp.broadcast_to(maps, (label.shape[0], *shape, num_labels))


def doublings(small, large, what):
  """log2(large / small); ValueError, naming `what`, unless a whole number."""
  count = round(math.log2(large / small)) if large >= small else -1
  if count < 0 or small * 2**count != large:
    raise ValueError(
      f'{what} is {large}. It must be {small} times a power of two.'
    )
  return count


class Norm(nn.Module):
  """Batch norm, over B, T, H and W and all devices; or group norm, of a clip.

  Attributes:
    kind: 'batch' or 'group' (four channels each). With a few clips a batch, a
      batch norm's running moments are poor: a net that made 34 dB in training
      made 31.6 of the same clips with them.
    axis_name: of the devices under pmap; under jit the mean is over all of
      them as it is.
  """

  kind: str = 'batch'
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, train, words=None):
    """`words`: gain and shift of what is normalized, [B, C] each; or None."""
    around_1 = lambda *args: 1 + 0.02 * jax.random.normal(*args)
    if self.kind == 'group':
      gain = self.param('scale', around_1, x.shape[-1:])[None]
      shift = self.param('bias', nn.initializers.zeros, x.shape[-1:])[None]
      if words is not None:
        gain, shift = gain * words[0], shift * words[0] + words[1]
      return norms.group_norm(x, gain, shift, None, math.gcd(4, x.shape[-1]))
    x = nn.BatchNorm(
      use_running_average=not train, momentum=0.9, axis_name=self.axis_name,
      scale_init=around_1, dtype=self.dtype,
    )(x)
    return x if words is None else norms.modulate(x, *words)


class _Net(nn.Module):
  """What the nets below share."""

  init_kind = 'normal'

  def conv(self, features, output=False, **kwargs):
    """One that makes an output starts small whatever `init_kind` is."""
    init = layers.normal_init(STD)
    if self.init_kind == 'he' and not output:
      init = nn.initializers.he_normal()
    return layers.Conv(features, kernel_init=init, dtype=self.dtype, **kwargs)

  def words(self, label, channels):
    """Gain and shift [B, C] that a label has learned; None without one."""
    if label is None:
      return None
    # A label is seen every few steps: its part learns faster for being scaled.
    change = 5 * layers.Embed(
      self.num_labels, 2 * channels,
      embedding_init=nn.initializers.normal(0.02),
    )(label)
    scale, shift = jnp.split(change, 2, -1)
    return 1 + scale, shift

  def norm(self):
    return Norm(self.norm_kind, self.axis_name, self.dtype)


class SpatialEncoder(_Net):
  """E_s: halvings by k4 s2 p1, then one valid convolution onto the grid.

  64 -> 32 -> 16 -> 14 with width, 2 width, 4 width channels.
  """

  grid: int = 14
  width: int = 128
  init_kind: str = 'normal'
  norm_kind: str = 'batch'
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image, train=False):
    x = image.astype(self.dtype)
    count = int(math.log2(x.shape[1] / self.grid))
    for i in range(count):
      x = self.conv(self.width * 2**i, kernel=4, stride=2)(x)
      x = nn.relu(self.norm()(x, train) if i else x)
    kernel = x.shape[1] - self.grid + 1
    x = self.conv(self.width * 2**count, kernel=kernel, pad=0)(x)
    return nn.relu(self.norm()(x, train))


class Decoder(_Net):
  """G_dec: maps on the grid -> video [B, T, S, S, out_channels], linear.

  `down4` shrinks the grid to 4x4 and is VGAN's generator from there on: every
  layer doubles time and space. `up16` grows the grid by a valid transposed
  convolution (14 -> 16), doubles time and space until the side is reached, then
  time alone. Channels start at 8 width (down4) or 4 width and halve with each
  doubling, down to `width`, or a quarter of it where only time doubles.

  Attributes:
    num_labels: with labels given, each scales and shifts the channels of every
      layer.
    hold_ends: before the first frame and after the last one those two go on,
      not zeros, with which both see half as much as the others.
  """

  image_size: int = 64
  num_frames: int = 32
  arch: str = 'down4'
  width: int = 128
  out_channels: int = 3
  num_labels: int = 6
  hold_ends: bool = False
  init_kind: str = 'normal'
  norm_kind: str = 'batch'
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, train=False, label=None):
    """[B, g, g, C], int32 [B] or None -> [B, T, S, S, out_channels]."""
    def block(x):
      norm = self.norm()
      return nn.relu(norm(x, train, self.words(label, x.shape[-1])))

    if self.arch == 'down4':
      x = block(self.conv(8 * self.width, kernel=4, stride=2)(x))
      x = block(self.conv(8 * self.width, kernel=x.shape[1] - 3, pad=0)(x))
      x = self._two_frames(x, 8 * self.width, kernel=1)
    else:
      x = self._two_frames(x, 4 * self.width, kernel=3)
    x = block(x)
    space = doublings(x.shape[2], self.image_size, 'model.image_size')
    time = doublings(2, self.num_frames, 'model.num_frames')
    features = x.shape[-1]
    for i in range(max(space, time)):
      last = i + 1 == max(space, time)
      features = max(features // 2, self.width if i < space else 1)
      x = self._double(
        x, self.out_channels if last else features, i < time, i < space, last
      )
      x = x if last else block(x)
    return x.astype(jnp.float32)

  def _two_frames(self, x, features, kernel):
    """Transposed convolution (2, k, k) of one frame: [B, 2, h+k-1, ..]."""
    x = self.conv(2 * features, kernel=kernel, pad=kernel - 1)(x)
    return rearrange(x, 'b h w (t c) -> b t h w c', t=2)

  def _double(self, x, features, time, space, output=False):
    """k4 s2 p1, transposed, along time, space or both."""
    if time and self.hold_ends:
      x = jnp.concatenate([x[:, :1], x, x[:, -1:]], 1)
    x = self._double_all(x, features, time, space, output)
    return x[:, 2:-2] if time and self.hold_ends else x

  def _double_all(self, x, features, time, space, output):
    conv = lambda nd: self.conv(features, output, kernel=4, stride=-2, nd=nd)
    if time and space:
      return conv(3)(x)
    b, t, h, w, _ = x.shape
    if space:
      x = conv(2)(rearrange(x, 'b t h w c -> (b t) h w c'))
      return rearrange(x, '(b t) h w c -> b t h w c', b=b)
    x = conv(1)(rearrange(x, 'b t h w c -> (b h w) t c'))
    return rearrange(x, '(b h w) t c -> b t h w c', b=b, h=h)


class Painter(_Net):
  """What is added to frames, of the frames and the decoder's hints.

  A decoder alone has to say where a mouth is to a pixel; convolutions that see
  the mouth need not.
  """

  width: int = 32
  detail: int = 1
  num_labels: int = 6
  init_kind: str = 'he'
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, frames, hints, label=None):
    """Paints.

    Args:
      frames: [B, T, S, S, 3].
      hints: [B, T, S/detail, S/detail, C].
      label: int32 [B], scales and shifts the channels of every layer; or None.

    Returns:
      float32 [B, T, S/detail, S/detail, 3 detail^2].
    """
    def conv(x, features, output=False):
      pictures = rearrange(x, 'b t h w c -> (b t) h w c')
      y = self.conv(features, output)(pictures)
      return y.reshape(*x.shape[:-1], features)

    x = layers.space_to_depth(frames, self.detail)
    x = jnp.concatenate([x, hints], -1).astype(self.dtype)
    for _ in range(2):
      x = conv(x, self.width)
      words = self.words(label, self.width)
      x = layers.leaky_relu(x if words is None else norms.modulate(x, *words))
    return conv(x, 3 * self.detail**2, output=True).astype(jnp.float32)


class Generator(nn.Module):
  """E_s, G_dec and what makes frames of the decoder's words.

  Attributes:
    spatial: whether E_s is there.
    dropout: share of E_id's maps that a training step leaves out, so that the
      decoder does not learn the training subjects by heart.
    dec_size: side that the decoder works at; each of its places says the
      colours of several pixels.
    head: 'direct' (tanh); 'residual' (input + y); 'warp' (the input, each of
      its pixels fetched from where a flow of the decoder says, + y).
    flow_sizes: sides of the flows that make that one, see `move`.
    painter_width: of a net that sees the frames to which y is added and says a
      part of it; 0, and with the head 'direct': none.
    label_everywhere: a label learns maps of its own, where else it is a map of
      ones among hundreds, and changes every layer of the decoder.
    hold_ends: see Decoder.
    init_kind: of the weights, see INITS.
  """

  image_size: int = 64
  num_frames: int = 32
  num_labels: int = 6
  grid: int = 14
  spatial: bool = True
  dropout: float = 0.0
  es_width: int = 128
  dec_arch: str = 'down4'
  dec_width: int = 128
  dec_size: int = 64
  head: str = 'direct'
  flow_sizes: tuple[int, ...] = ()
  painter_width: int = 0
  label_everywhere: bool = False
  hold_ends: bool = False
  init_kind: str = 'normal'
  norm_kind: str = 'batch'
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image, identity, label, train=False):
    """Makes a video.

    Args:
      image: float32 [B, S, S, 3].
      identity: F_id [B, g, g, C], or None.
      label: int32 [B].
      train: batch norms use the batch's own statistics and note them.

    Returns:
      float32 [B, T, S, S, 3].
    """
    common = dict(
      init_kind=self.init_kind, norm_kind=self.norm_kind,
      axis_name=self.axis_name, dtype=self.dtype,
    )
    maps = []
    if identity is not None:
      drop = nn.Dropout(self.dropout, (1, 2), deterministic=not train)
      maps.append(drop(identity.astype(self.dtype)))
    if self.spatial:
      encoder = SpatialEncoder(
        self.grid, self.es_width, name='spatial_encoder', **common
      )
      maps.append(encoder(image, train))
    shape = (self.grid, self.grid)
    if self.label_everywhere:
      table = layers.Embed(
        self.num_labels, self.grid**2 * LABEL_MAPS, name='label_maps',
        embedding_init=nn.initializers.normal(1.0),
      )
      label_maps = table(label).reshape(-1, *shape, LABEL_MAPS)
    else:
      label_maps = one_hot_maps(label, self.num_labels, shape, self.dtype)
    maps.append(label_maps.astype(self.dtype))
    label = label if self.label_everywhere else None
    detail = self.image_size // self.dec_size
    flows = len(self.flow_sizes) or 1
    counts = (3 * detail**2, 2 * flows * (self.head == 'warp'))
    paints = self.painter_width > 0 and self.head != 'direct'
    said = Decoder(
      self.dec_size, self.num_frames, self.dec_arch, self.dec_width,
      sum(counts) + HINTS * paints, self.num_labels, self.hold_ends,
      name='decoder', **common,
    )(jnp.concatenate(maps, -1), train, label)
    colours, flow, hints = jnp.split(said, (counts[0], sum(counts)), -1)
    if self.head == 'direct':
      return jnp.tanh(layers.depth_to_space(colours, detail))
    frames = image[:, None]
    if self.head == 'warp':
      frames = move(image, flow, self.flow_sizes)
    if paints:
      frames = jnp.broadcast_to(frames, (*flow.shape[:2], *image.shape[1:]))
      colours += Painter(
        self.painter_width, detail, self.num_labels, self.dtype, name='painter'
      )(frames, hints, label)
    return frames + layers.depth_to_space(colours, detail)


class Discriminator(_Net):
  """D: strided 3-D convolutions of a video and its label -> one logit.

  Five layers at 64x64: 16, 8, 4, 2 frames of 32, 16, 8, 4 pixels, then all that
  is left. The label's maps join after the first (`inject` 'first') or at the
  input. No norm in the first and last.
  """

  width: int = 64
  num_labels: int = 6
  inject: str = 'first'
  norm_kind: str = 'batch'
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, video, label):
    """[B, T, S, S, 3], int32 [B] -> float32 [B]."""
    x = video.astype(self.dtype)
    join = lambda x: jnp.concatenate([x, one_hot_maps(
      label, self.num_labels, x.shape[1:-1], x.dtype
    )], -1)
    if self.inject == 'input':
      x = join(x)
    for i in range(doublings(4, video.shape[2], 'model.image_size')):
      features = self.width * min(2**i, 8)
      x = self.conv(features, kernel=4, stride=2, nd=3)(x)
      x = layers.leaky_relu(self.norm()(x, True) if i else x)
      if i == 0 and self.inject == 'first':
        x = join(x)
    # A convolution as large as its input is a product.
    x = layers.Dense(1, layers.normal_init(STD), self.dtype)(
      x.reshape(x.shape[0], -1)
    )
    return x[:, 0].astype(jnp.float32)
