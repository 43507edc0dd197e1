"""The 3-D U-Net's training step in plain eager PyTorch, to time against.

  python tests/torch_video_diffusion.py --image_size 32 --num_frames 8

Written from a description of the published network (layer tables, order of
work), not from anybody's code, in the form its public code has: convolutions
with kernels (1, k, k) over [B, C, T, H, W], attention between rearrangements
of that layout, noise as the target, Adam, an average every tenth step. The
same parameters as hatjax's `reference` preset: 35,714,307. Needs torch and
numpy, and nothing of hatjax. Not a test: pytest passes it by.
"""

import argparse
import json
import math
import os
import statistics

import torch
import torch.nn.functional as F
import torch_reference
from torch import nn

HEADS, HEAD_DIM = 8, 32


class Residual(nn.Module):
  """Two of (conv, group norm, SiLU); the time scales and shifts the first."""

  def __init__(self, inputs, features, cond=256):
    super().__init__()
    conv = lambda n: nn.Conv3d(n, features, (1, 3, 3), padding=(0, 1, 1))
    self.convs = nn.ModuleList([conv(inputs), conv(features)])
    self.norms = nn.ModuleList(nn.GroupNorm(8, features) for _ in range(2))
    self.cond = nn.Linear(cond, 2 * features) if cond else None
    same = inputs == features
    self.skip = nn.Identity() if same else nn.Conv3d(inputs, features, 1)

  def forward(self, x, cond=None):
    h = self.norms[0](self.convs[0](x))
    if self.cond is not None:
      change = self.cond(F.silu(cond))[..., None, None, None]
      scale, shift = change.chunk(2, 1)
      h = h * (scale + 1) + shift
    return self.skip(x) + F.silu(self.norms[1](self.convs[1](F.silu(h))))


class Scale(nn.Module):
  """Layer norm over channels, scale alone."""

  def __init__(self, channels):
    super().__init__()
    self.scale = nn.Parameter(torch.ones(1, channels, 1, 1, 1))

  def forward(self, x):
    var = torch.var(x, 1, unbiased=False, keepdim=True)
    return (x - x.mean(1, keepdim=True)) / (var + 1e-5).sqrt() * self.scale


class LinearAttention(nn.Module):
  """x + linear attention over the pixels of each frame."""

  def __init__(self, channels):
    super().__init__()
    width = HEADS * HEAD_DIM
    self.norm = Scale(channels)
    self.qkv = nn.Conv2d(channels, 3 * width, 1, bias=False)
    self.out = nn.Conv2d(width, channels, 1)

  def forward(self, x):
    b, c, t, h, w = x.shape
    y = self.norm(x).permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
    q, k, v = (
      z.reshape(b * t, HEADS, HEAD_DIM, h * w)
      for z in self.qkv(y).chunk(3, 1)
    )
    q, k = q.softmax(-2) * HEAD_DIM**-0.5, k.softmax(-1)
    context = torch.einsum('bhdn,bhen->bhde', k, v)
    y = torch.einsum('bhde,bhdn->bhen', context, q)
    y = self.out(y.reshape(b * t, -1, h, w)).reshape(b, t, c, h, w)
    return x + y.permute(0, 2, 1, 3, 4)


class Attention(nn.Module):
  """x + attention over the frames at each pixel, or the pixels of each frame.

  Over frames positions turn queries and keys, and a bias is added.
  """

  def __init__(self, channels, in_time):
    super().__init__()
    width = HEADS * HEAD_DIM
    self.norm, self.in_time = Scale(channels), in_time
    self.qkv = nn.Linear(channels, 3 * width, bias=False)
    self.out = nn.Linear(width, channels, bias=False)

  def forward(self, x, bias):
    b, c, t, h, w = x.shape
    order = (0, 3, 4, 2, 1) if self.in_time else (0, 2, 3, 4, 1)
    y = self.norm(x).permute(order)
    shape = y.shape
    y = y.reshape(b, h * w, t, c) if self.in_time else (
      y.reshape(b, t, h * w, c)
    )
    q, k, v = (
      z.reshape(*z.shape[:-1], HEADS, HEAD_DIM).transpose(-2, -3)
      for z in self.qkv(y).chunk(3, -1)
    )
    q = q * HEAD_DIM**-0.5
    if self.in_time:
      q, k = rotate(q), rotate(k)
    scores = torch.einsum('...hid,...hjd->...hij', q, k)
    if self.in_time:
      scores = scores + bias
    scores = scores - scores.amax(-1, keepdim=True).detach()
    y = torch.einsum('...hij,...hjd->...hid', scores.softmax(-1), v)
    y = self.out(y.transpose(-2, -3).reshape(*y.shape[:2], y.shape[3], -1))
    y = y.reshape(shape)
    return x + y.permute([order.index(i) for i in range(5)])


def rotate(x):
  """Turns neighbouring pairs by their frame's position."""
  rates = 10_000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
  angles = torch.arange(x.shape[-2])[:, None] * rates.repeat_interleave(2)
  first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
  turned = torch.stack([-second, first], -1).flatten(-2)
  angles = angles.to(x.device)
  return x * angles.cos() + turned * angles.sin()


class UNet3D(nn.Module):
  """[B, 3, T, H, W], level [B] -> the same shape."""

  def __init__(self, dim=64, mults=(1, 2, 4, 8)):
    super().__init__()
    widths = [dim] + [dim * m for m in mults]
    pairs = list(zip(widths, widths[1:]))
    self.dim = dim
    self.table = nn.Parameter(torch.randn(32, HEADS))
    self.conv_in = nn.Conv3d(3, dim, (1, 7, 7), padding=(0, 3, 3))
    self.time_in = Attention(dim, True)
    self.cond = nn.Sequential(
      nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim)
    )
    level = lambda a, b: nn.ModuleList([
      Residual(a, b, 4 * dim), Residual(b, b, 4 * dim), LinearAttention(b),
      Attention(b, True),
    ])
    shape = dict(kernel_size=(1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))
    self.down = nn.ModuleList(level(a, b) for a, b in pairs)
    self.halving = nn.ModuleList(nn.Conv3d(b, b, **shape) for b in widths[1:-1])
    last = widths[-1]
    self.middle = nn.ModuleList([
      Residual(last, last, 4 * dim), Attention(last, False),
      Attention(last, True), Residual(last, last, 4 * dim),
    ])
    self.up = nn.ModuleList(level(2 * b, a) for a, b in reversed(pairs))
    self.doubling = nn.ModuleList(
      nn.ConvTranspose3d(a, a, **shape) for a, _ in reversed(pairs[1:])
    )
    self.block_out = Residual(2 * dim, dim, 0)
    self.conv_out = nn.Conv3d(dim, 3, 1)

  def forward(self, x, t):
    rates = torch.exp(
      -math.log(10_000) * torch.arange(self.dim // 2) / (self.dim // 2 - 1)
    ).to(x.device)
    angles = t[:, None] * rates
    cond = self.cond(torch.cat([angles.sin(), angles.cos()], -1))
    # Clips of this length: distances below 8 have a row each.
    frames = torch.arange(x.shape[2])
    d = frames[:, None] - frames
    rows = (d.abs().clamp(max=15) + 16 * (d < 0)).to(x.device)
    bias = self.table[rows].permute(2, 0, 1)
    x = self.time_in(self.conv_in(x), bias)
    stem, skips = x, []

    def run(level, x):
      for block in level[:2]:
        x = block(x, cond)
      return level[3](level[2](x), bias)

    for i, level in enumerate(self.down):
      x = run(level, x)
      skips.append(x)
      if i < len(self.halving):
        x = self.halving[i](x)
    x = self.middle[1](self.middle[0](x, cond), None)
    x = self.middle[3](self.middle[2](x, bias), cond)
    for i, level in enumerate(self.up):
      x = run(level, torch.cat([x, skips.pop()], 1))
      if i < len(self.doubling):
        x = self.doubling[i](x)
    return self.conv_out(self.block_out(torch.cat([x, stem], 1)))


class Trainer:
  """Net, its average, Adam and the cosine schedule."""

  def __init__(self, device, levels=300):
    self.net, self.average = UNet3D().to(device), UNet3D().to(device)
    self.average.requires_grad_(False)
    self.adam = torch.optim.Adam(self.net.parameters(), 1e-4)
    t = torch.arange(levels + 1) / levels
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    self.signal2, self.count = (f / f[0]).to(device), 0

  def step(self, video):
    """One update on [B, 3, T, H, W] in [0, 1]; returns the loss."""
    x0 = 2 * video - 1
    t = torch.randint(0, len(self.signal2) - 1, x0.shape[:1]).to(x0.device)
    a = self.signal2[t + 1][:, None, None, None, None]
    noise = torch.randn_like(x0)
    loss = F.l1_loss(
      self.net(a.sqrt() * x0 + (1 - a).sqrt() * noise, t.float()), noise
    )
    self.adam.zero_grad()
    loss.backward()
    self.adam.step()
    if self.count % 10 == 0:
      parameters = zip(self.average.parameters(), self.net.parameters())
      for average, new in parameters:
        average.data.mul_(0.995).add_(new.data, alpha=0.005)
    self.count += 1
    return loss.item()


@torch.no_grad()
def refine(net, video, steps):
  """`steps` DDIM-like passes, whose arithmetic besides the net is nothing."""
  for t in torch.linspace(45, 4, steps):
    noise = net(video, t.expand(len(video)).to(video.device))
    video = video - 0.05 * noise
  return video


def main():
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--image_size', type=int, default=32)
  add('--num_frames', type=int, default=8)
  add('--batch_size', type=int, default=1)
  add('--steps', type=int, default=5, help='timed')
  add('--warmup', type=int, default=2)
  add('--refine', type=int, default=0, help='time passes forward, not steps')
  add('--threads', type=int, help="default: torch's")
  add('--device', choices=('cpu', 'cuda'), default='cpu')
  args = parser.parse_args()
  if args.threads:
    torch.set_num_threads(args.threads)
  before = torch_reference.matrix_rate(args.device)
  trainer, size = Trainer(args.device), args.image_size
  video = torch.rand(
    args.batch_size, 3, args.num_frames, size, size, device=args.device
  )
  work = lambda: trainer.step(video)
  if args.refine:
    work = lambda: refine(trainer.net.eval(), video, args.refine).cpu()
  torch_reference.seconds(work, args.warmup, args.device)
  times = torch_reference.seconds(work, args.steps, args.device)
  after = torch_reference.matrix_rate(args.device)
  print(json.dumps({
    'torch': torch.__version__, 'threads': torch.get_num_threads(),
    **vars(args), 'load_average': os.getloadavg()[0],
    'parameters': sum(p.numel() for p in trainer.net.parameters()),
    'matrix_gflops_before_and_after': [round(before, 1), round(after, 1)],
    'seconds': [round(s, 4) for s in times],
    'seconds_median': round(statistics.median(times), 4),
    'peak_gib': round(torch_reference.peak_gib(args.device), 3),
  }, indent=2))


if __name__ == '__main__':
  main()
