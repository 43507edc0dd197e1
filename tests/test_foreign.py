"""Checkpoints of other projects: the same pictures as an independent forward
pass in PyTorch, written here from the nets' structure, on random weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hatjax
from hatjax import convert, foreign

torch = pytest.importorskip('torch')
F = torch.nn.functional


class Weights(dict):
  """A state dict that grows as a forward pass asks for its tensors."""

  def __init__(self):
    super().__init__()
    self.rng = torch.Generator().manual_seed(0)

  def get(self, name, *shape, scale=None, low=None):
    if name not in self:
      value = torch.randn(shape, generator=self.rng)
      fan = math.prod(shape[1:]) or 1
      value *= scale if scale is not None else fan**-0.5
      self[name] = value.abs() + low if low is not None else value
    return self[name]

  def conv(self, x, name, out, k, pad=None, stride=1, up=False, nd=2):
    shape = (x.shape[1], out) if up else (out, x.shape[1])
    shape += ((1,) if nd == 3 else ()) + (k,) * 2
    weight = self.get(f'{name}.weight', *shape)
    bias = self.get(f'{name}.bias', out, scale=0.1)
    pad = k // 2 if pad is None else pad
    pads = (0, pad, pad) if nd == 3 else pad
    strides = (1, stride, stride) if nd == 3 else stride
    run = getattr(F, f'conv{"_transpose" if up else ""}{nd}d')
    more = {'output_padding': k % 2} if up and nd == 2 else {}
    return run(x, weight, bias, strides, pads, **more)

  def batch_norm(self, x, name):
    read = lambda key, **k: self.get(f'{name}.{key}', x.shape[1], **k)
    return F.batch_norm(
      x, read('running_mean', scale=0.1),
      read('running_var', scale=0.3, low=0.5), read('weight', scale=1.0),
      read('bias', scale=0.1),
    )


def write(path, tree):
  torch.save(tree, path)
  return str(path)


def to_torch(x):
  return torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())


def from_torch(x):
  return np.moveaxis(x.detach().numpy(), 1, -1)


def pictures(n, size, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(-1, 1, (n, size, size, 3)).astype(np.float32)


# -- first-order model --------------------------------------------------------


def hourglass(w, name, x, width, blocks, widest):
  skips = [x]
  for i in range(blocks):
    at = f'{name}.encoder.down_blocks.{i}'
    out = min(widest, width * 2 ** (i + 1))
    x = w.batch_norm(w.conv(skips[-1], f'{at}.conv', out, 3), f'{at}.norm')
    skips.append(F.avg_pool2d(F.relu(x), 2))
  x = skips.pop()
  for j, i in enumerate(reversed(range(blocks))):
    at = f'{name}.decoder.up_blocks.{j}'
    out, x = min(widest, width * 2**i), F.interpolate(x, scale_factor=2)
    x = w.conv(x, f'{at}.conv', out, 3)
    x = torch.cat([F.relu(w.batch_norm(x, f'{at}.norm')), skips.pop()], 1)
  return x


def halved(w, name, x):
  """Gaussian of deviation 1/2, five taps, every second pixel."""
  taps = torch.exp(-(torch.arange(-2.0, 3) ** 2) / (2 * 0.5**2))
  kernel = taps[:, None] * taps
  w[f'{name}.down.weight'] = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
  return F.conv2d(x, w[f'{name}.down.weight'], padding=2, groups=3)[
    :, :, ::2, ::2
  ]


def places(h, wide):
  y, x = torch.meshgrid(
    torch.linspace(-1, 1, h), torch.linspace(-1, 1, wide), indexing='ij'
  )
  return torch.stack([x, y], -1)


def fomm_keypoints(w, x, k=3):
  x = hourglass(w, 'predictor', halved(w, 'kp', x), 4, 2, 12)
  maps = w.conv(x, 'kp', k, 7, pad=0)
  heat = (maps.flatten(2) / 0.1).softmax(-1).view_as(maps)
  grid = places(*maps.shape[2:])
  value = (heat[..., None] * grid).sum((2, 3))
  turns = w.conv(x, 'jacobian', 4 * k, 7, pad=0)
  turns = turns.view(len(x), k, 4, *maps.shape[2:]) * heat[:, :, None]
  return value, turns.sum((3, 4)).view(len(x), k, 2, 2)


def fomm_frame(w, image, source, driving, k=3):
  name = 'dense_motion_network'
  small = halved(w, name, image)
  h, wide = small.shape[2:]
  grid = places(h, wide)
  (ps, js), (pd, jd) = source, driving
  bump = lambda p: torch.exp(
    -((grid - p[:, :, None, None]) ** 2).sum(-1) / (2 * 0.01)
  )
  heat = F.pad(bump(pd) - bump(ps), (0, 0, 0, 0, 1, 0))
  away = grid[None, None] - pd[:, :, None, None]
  turn = js @ torch.inverse(jd)
  moved = torch.einsum('nkij,nkhwj->nkhwi', turn, away) + ps[:, :, None, None]
  still = grid[None, None].expand(len(image), 1, -1, -1, 2)
  where = torch.cat([still, moved], 1)
  look = lambda x, at: F.grid_sample(x, at, align_corners=True)
  parts = []
  for i in range(k + 1):
    parts += [heat[:, i : i + 1], look(small, where[:, i])]
  x = hourglass(w, f'{name}.hourglass', torch.cat(parts, 1), 4, 2, 12)
  masks = w.conv(x, f'{name}.mask', k + 1, 7).softmax(1)
  flow = (masks[..., None] * where).sum(1)
  visible = torch.sigmoid(w.conv(x, f'{name}.occlusion', 1, 7))
  block = lambda x, at, out, size=3: F.relu(
    w.batch_norm(w.conv(x, f'{at}.conv', out, size), f'{at}.norm')
  )
  x = block(image, 'first', 4, 7)
  x = F.avg_pool2d(block(x, 'down_blocks.0', 8), 2)
  x = look(x, flow) * visible
  for i in range(2):
    y = x
    for n in (1, 2):
      at = f'bottleneck.r{i}'
      y = F.relu(w.batch_norm(y, f'{at}.norm{n}'))
      y = w.conv(y, f'{at}.conv{n}', 8, 3)
    x = x + y
  x = block(F.interpolate(x, scale_factor=2), 'up_blocks.0', 4)
  return torch.sigmoid(w.conv(x, 'final', 3, 7))


def test_fomm_makes_the_same_frames(tmp_path):
  detector, generator = Weights(), Weights()
  source, driving = pictures(1, 32), pictures(2, 32, 1)
  unit = lambda x: (to_torch(x) + 1) / 2
  points = [fomm_keypoints(detector, unit(x)) for x in (source, driving)]
  want = [
    fomm_frame(
      generator, unit(source), points[0], [x[t : t + 1] for x in points[1]]
    ) for t in range(2)
  ]
  detector['down.weight'] = detector.pop('kp.down.weight')
  path = write(tmp_path / 'vox.pth.tar', {
    'generator': dict(generator), 'kp_detector': dict(detector), 'epoch': 7,
  })
  assert convert.main([
    'fomm', path, '--workdir', str(tmp_path / 'run'), '--image_size', '32'
  ]) == 0
  run = hatjax.load(tmp_path / 'run')
  found = jax.jit(run.method.keypoints)(run.state, jnp.asarray(driving))
  np.testing.assert_allclose(found['value'], points[1][0], atol=1e-4)
  np.testing.assert_allclose(found['jacobian'], points[1][1], atol=1e-4)
  made = jax.jit(run.method.animate, static_argnums=3)(
    run.state, {'image': source, 'driving': driving[None]}, None, 2
  )
  got = (np.asarray(made)[0] + 1) / 2
  np.testing.assert_allclose(got, from_torch(torch.cat(want)), atol=1e-4)
  assert convert.main(['fomm', path, '--workdir', str(tmp_path / 'run')]) == 1


# -- AffineGAN ----------------------------------------------------------------


def affine_unet(w, image, alpha, depth, width):
  base, moved, codes = image, image, []
  for n in range(depth):
    name, at = 'model' + '.sub' * n, 1 if n else 0
    out = width * min(2**n, 8)
    after = (lambda x: F.leaky_relu(x, 0.2)) if n else (lambda x: x)
    norm = F.instance_norm if 0 < n < depth - 1 else lambda x: x
    base, moved = (
      norm(w.conv(after(x), f'{name}.{part}.{at}', out, 4, 1, 2))
      for x, part in ((base, 'down_base'), (moved, 'down_res'))
    )
    codes.append(base + alpha * moved)
  x = codes[-1]
  for n in reversed(range(depth)):
    name = 'model' + '.sub' * n
    out = width * min(2 ** (n - 1), 8) if n else 3
    x = w.conv(F.relu(x), f'{name}.up_all.1', out, 4, 1, 2, up=True)
    x = torch.cat([codes[n - 1], F.instance_norm(x)], 1) if n else torch.tanh(x)
  return x


def affine_resnet(w, image, alpha, blocks, width):
  def encode(part):
    pad = lambda x, n: F.pad(x, (n,) * 4, 'reflect')
    x = w.conv(pad(image, 3), f'{part}.1', width, 7, 0)
    x = F.relu(F.instance_norm(x))
    for at, out in ((4, 2 * width), (7, 4 * width)):
      x = F.relu(F.instance_norm(w.conv(x, f'{part}.{at}', out, 3, 1, 2)))
    for i in range(blocks):
      name = f'{part}.{10 + i}.conv_block'
      y = F.instance_norm(w.conv(pad(x, 1), f'{name}.1', 4 * width, 3, 0))
      y = w.conv(pad(F.relu(y), 1), f'{name}.6', 4 * width, 3, 0)
      x = x + F.instance_norm(y)
    return x

  x = encode('down_base') + alpha * encode('down_res')
  for at, out in ((0, 2 * width), (3, width)):
    x = w.conv(x, f'up_all.{at}', out, 3, 1, 2, up=True)
    x = F.relu(F.instance_norm(x))
  return torch.tanh(w.conv(F.pad(x, (3,) * 4, 'reflect'), 'up_all.7', 3, 7, 0))


@pytest.mark.parametrize('kind', ('unet', 'resnet'))
def test_affinegan_makes_the_same_frames(tmp_path, kind):
  w, image, alphas = Weights(), pictures(1, 32), (0.0, 0.4, 1.0)
  net = dict(
    unet=lambda a: affine_unet(w, to_torch(image), a, 5, 4),
    resnet=lambda a: affine_resnet(w, to_torch(image), a, 6, 4),
  )[kind]
  want = torch.cat([net(alpha) for alpha in alphas])
  path = write(tmp_path / 'latest_net_G.pth', dict(w))
  said = foreign.convert('affinegan', path, tmp_path / 'run', 32)
  assert 'hat_cgan, 32x32' in said
  run = hatjax.load(tmp_path / 'run')
  inputs = {'image': image, 'alpha': jnp.array([alphas])}
  made = jax.jit(run.method.animate, static_argnums=3)(
    run.state, inputs, jax.random.key(0), 3
  )
  np.testing.assert_allclose(made[0], from_torch(want), atol=1e-4)


# -- video diffusion ----------------------------------------------------------

HEADS, DIM = 2, 32


def layer_norm(w, x, name):
  gamma = w.get(f'{name}.fn.norm.gamma', 1, x.shape[1], 1, 1, 1, scale=1.0)
  mean = x.mean(1, keepdim=True)
  var = x.var(1, unbiased=False, keepdim=True)
  return (x - mean) / (var + 1e-5).sqrt() * gamma


def rotate(x):
  """Turns neighbours (2 i, 2 i + 1) of [..., T, D]."""
  t, d = x.shape[-2:]
  angle = torch.arange(t)[:, None] * 10_000.0 ** (-torch.arange(0, d, 2) / d)
  z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
  z = z * torch.polar(torch.ones_like(angle), angle)
  return torch.view_as_real(z).flatten(-2)


def full_attention(w, x, name, bias=None):
  """Of [..., tokens, C]."""
  c, width = x.shape[-1], HEADS * DIM
  q, k, v = (x @ w.get(f'{name}.to_qkv.weight', 3 * width, c).T).chunk(3, -1)
  split = lambda y: y.unflatten(-1, (HEADS, DIM)).transpose(-2, -3)
  q, k, v = split(q) * DIM**-0.5, split(k), split(v)
  if bias is not None:
    q, k = rotate(q), rotate(k)
  scores = q @ k.transpose(-1, -2) + (0 if bias is None else bias)
  out = (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)
  return out @ w.get(f'{name}.to_out.weight', c, width).T


def in_time(w, x, name, bias):
  y = layer_norm(w, x, name).permute(0, 3, 4, 2, 1)
  y = full_attention(w, y, f'{name}.fn.fn.fn', bias)
  return x + y.permute(0, 4, 3, 1, 2)


def in_space(w, x, name):
  b, c, t, h, wide = x.shape
  y = layer_norm(w, x, name).transpose(1, 2).reshape(b * t, c, -1)
  at, width = f'{name}.fn.fn', HEADS * DIM
  qkv = w.get(f'{at}.to_qkv.weight', 3 * width, c, 1, 1)[..., 0, 0]
  q, k, v = (
    z.reshape(b * t, HEADS, DIM, -1) for z in (qkv @ y).chunk(3, 1)
  )
  context = torch.einsum('nhdp,nhep->nhde', k.softmax(-1), v)
  y = torch.einsum('nhde,nhdp->nhep', context, q.softmax(2) * DIM**-0.5)
  out = w.get(f'{at}.to_out.weight', c, width, 1, 1)[..., 0, 0]
  y = out @ y.reshape(b * t, width, -1)
  y = y + w.get(f'{at}.to_out.bias', c, scale=0.1)[:, None]
  return x + y.reshape(b, t, c, h, wide).transpose(1, 2)


def in_middle(w, x, name):
  b, c, t, h, wide = x.shape
  y = layer_norm(w, x, name).permute(0, 2, 3, 4, 1).reshape(b, t, -1, c)
  y = full_attention(w, y, f'{name}.fn.fn.fn')
  return x + y.reshape(b, t, h, wide, c).permute(0, 4, 1, 2, 3)


def block(w, x, name, out, cond=None):
  h, part = x, None
  if cond is not None:
    part = F.linear(
      F.silu(cond), w.get(f'{name}.mlp.1.weight', 2 * out, cond.shape[1]),
      w.get(f'{name}.mlp.1.bias', 2 * out, scale=0.1),
    )[:, :, None, None, None].chunk(2, 1)
  for i in (1, 2):
    h = w.conv(h, f'{name}.block{i}.proj', out, 3, nd=3)
    h = F.group_norm(
      h, 8, w.get(f'{name}.block{i}.norm.weight', out, scale=1.0),
      w.get(f'{name}.block{i}.norm.bias', out, scale=0.1),
    )
    if i == 1 and part is not None:
      h = h * (part[0] + 1) + part[1]
    h = F.silu(h)
  if x.shape[1] != out:
    x = w.conv(x, f'{name}.res_conv', out, 1, nd=3)
  return h + x


def frame_bias(w, frames):
  table = w.get(
    'time_rel_pos_bias.relative_attention_bias.weight', 32, HEADS, scale=1.0
  )
  bias = torch.zeros(HEADS, frames, frames)
  for i in range(frames):
    for j in range(frames):
      n = abs(i - j)  # Below 8: itself; the upper half where the key is later.
      bias[:, i, j] = table[n + 16 * (j > i)]
  return bias


def unet3d(w, x, t, dim=8, mults=(1, 2)):
  rates = torch.exp(torch.arange(dim // 2) * -math.log(10_000) / (dim // 2 - 1))
  cond = torch.cat([(t[:, None] * rates).sin(), (t[:, None] * rates).cos()], 1)
  for at in (1, 3):
    cond = F.linear(
      cond, w.get(f'time_mlp.{at}.weight', 4 * dim, cond.shape[1]),
      w.get(f'time_mlp.{at}.bias', 4 * dim, scale=0.1),
    )
    cond = F.gelu(cond) if at == 1 else cond
  bias = frame_bias(w, x.shape[2])
  x = w.conv(x, 'init_conv', dim, 7, nd=3)
  x = stem = in_time(w, x, 'init_temporal_attn', bias)

  def level(x, name, out):
    for i in (0, 1):
      x = block(w, x, f'{name}.{i}', out, cond)
    return in_time(w, in_space(w, x, f'{name}.2'), f'{name}.3', bias)

  skips, last = [], len(mults) - 1
  for i, mult in enumerate(mults):
    x = level(x, f'downs.{i}', dim * mult)
    skips.append(x)
    if i < last:
      x = w.conv(x, f'downs.{i}.4', dim * mult, 4, 1, 2, nd=3)
  middle = dim * mults[-1]
  x = block(w, x, 'mid_block1', middle, cond)
  x = in_middle(w, x, 'mid_spatial_attn')
  x = in_time(w, x, 'mid_temporal_attn', bias)
  x = block(w, x, 'mid_block2', middle, cond)
  for j, i in enumerate(reversed(range(len(mults)))):
    out = dim * mults[i - 1] if i else dim
    x = level(torch.cat([x, skips[i]], 1), f'ups.{j}', out)
    if i:
      x = w.conv(x, f'ups.{j}.4', out, 4, 1, 2, up=True, nd=3)
  x = block(w, torch.cat([x, stem], 1), 'final_conv.0', dim)
  return w.conv(x, 'final_conv.1', 3, 1, nd=3)


def test_video_diffusion_predicts_the_same_noise(tmp_path):
  w, t = Weights(), torch.tensor([7.0])
  clip = np.random.default_rng(0).normal(size=(1, 5, 8, 8, 3))
  clip = clip.astype(np.float32)
  want = unet3d(w, to_torch(clip), t)
  diffusion = {f'denoise_fn.{k}': v for k, v in w.items()}
  diffusion['betas'] = torch.linspace(0, 1, 30)
  path = write(tmp_path / 'model-1.pt', {
    'step': 1, 'ema': diffusion, 'scaler': {'scale': 1.0},
    'model': {k: torch.zeros_like(v) for k, v in diffusion.items()},
  })
  foreign.convert('video_diffusion', path, tmp_path / 'run', 8, 5)
  run = hatjax.load(tmp_path / 'run')
  method = run.method
  assert (method.num_noise_steps, method.dim_mults) == (30, (1, 2))
  params = run.state.inference_params('denoiser')
  got = jax.jit(method.denoiser.apply)(
    {'params': params}, clip, jnp.asarray(t.numpy())
  )
  np.testing.assert_allclose(got, from_torch(want), atol=1e-4)


def test_files_of_others_are_named(tmp_path):
  path = write(tmp_path / 'a.pth', {'weight': torch.zeros(2)})
  for kind in foreign.KINDS:
    with pytest.raises(ValueError, match=f'is not of {kind}: it lacks'):
      foreign.convert(kind, path, tmp_path / 'run')
