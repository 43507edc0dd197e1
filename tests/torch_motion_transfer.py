"""The first-order motion model in plain eager PyTorch, to time frames against.

  python tests/torch_motion_transfer.py --image_size 256 --frames 5

Written from a description of the published networks (layer tables, order of
work), not from anybody's code: for every driving frame its keypoints, the dense
motion and the whole generator, which encodes the source anew each time. The
parameters of hatjax's `reference` preset: 59.8 million. Needs torch and numpy,
and nothing of hatjax. Not a test: pytest passes it by.
"""

import argparse
import itertools
import json
import os
import statistics

import torch
import torch.nn.functional as F
import torch_reference
from torch import nn

KEYPOINTS = 10


class Block(nn.Module):
  """Convolution, batch norm, ReLU; `resize` 2 doubles before, -2 halves
  after."""

  def __init__(self, inputs, features, kernel=3, resize=1):
    super().__init__()
    self.conv = nn.Conv2d(inputs, features, kernel, padding=kernel // 2)
    self.norm, self.resize = nn.BatchNorm2d(features), resize

  def forward(self, x):
    if self.resize == 2:
      x = F.interpolate(x, scale_factor=2)
    x = F.relu(self.norm(self.conv(x)))
    return F.avg_pool2d(x, 2) if self.resize == -2 else x


class Residual(nn.Module):
  """x plus twice (batch norm, ReLU, convolution)."""

  def __init__(self, features):
    super().__init__()
    self.norms = nn.ModuleList(nn.BatchNorm2d(features) for _ in range(2))
    self.convs = nn.ModuleList(
      nn.Conv2d(features, features, 3, padding=1) for _ in range(2)
    )

  def forward(self, x):
    h = x
    for norm, conv in zip(self.norms, self.convs):
      h = conv(F.relu(norm(h)))
    return x + h


class Hourglass(nn.Module):
  """Halves five times, doubles as often; every level has a skip."""

  def __init__(self, inputs, width, blocks=5, widest=1024):
    super().__init__()
    wide = [min(widest, width * 2**i) for i in range(blocks + 1)]
    ins = [inputs, *wide[1:]]
    self.down = nn.ModuleList(
      Block(ins[i], wide[i + 1], resize=-2) for i in range(blocks)
    )
    # All but the deepest see what went before and its skip.
    self.up = nn.ModuleList(
      Block(wide[i + 1] * (1 if i + 1 == blocks else 2), wide[i], resize=2)
      for i in reversed(range(blocks))
    )
    self.features = width + inputs

  def forward(self, x):
    skips = [x]
    for block in self.down:
      skips.append(block(skips[-1]))
    x = skips.pop()
    for block in self.up:
      x = torch.cat([block(x), skips.pop()], 1)
    return x


class Shrink(nn.Module):
  """A Gaussian against aliasing, then every `scale`-th pixel."""

  def __init__(self, scale):
    super().__init__()
    sigma = (scale - 1) / 2
    reach = round(4 * sigma)
    taps = torch.exp(-torch.arange(-reach, reach + 1.0) ** 2 / (2 * sigma**2))
    kernel = taps[:, None] * taps
    self.register_buffer('kernel', (kernel / kernel.sum()).repeat(3, 1, 1, 1))
    self.scale, self.reach = scale, reach

  def forward(self, x):
    x = F.conv2d(x, self.kernel, padding=self.reach, groups=3)
    return x[:, :, :: self.scale, :: self.scale]


def places(height, width, like):
  """[H, W, 2] of (x, y) from -1 to 1, the corners' pixels at the ends."""
  y, x = (torch.linspace(-1, 1, n, device=like.device) for n in (height, width))
  return torch.stack(torch.meshgrid(x, y, indexing='xy'), -1)


class Keypoints(nn.Module):
  """Soft-argmax of ten maps, and a Jacobian at each."""

  def __init__(self, scale):
    super().__init__()
    self.shrink, self.features = Shrink(scale), Hourglass(3, 32)
    self.maps = nn.Conv2d(self.features.features, KEYPOINTS, 7)
    self.jacobians = nn.Conv2d(self.features.features, 4 * KEYPOINTS, 7)

  def forward(self, image):
    x = self.features(self.shrink(image))
    maps = self.maps(x)
    heat = (maps.flatten(2) / 0.1).softmax(-1).view_as(maps)
    grid = places(*maps.shape[2:], maps)
    turns = self.jacobians(x).view(len(x), KEYPOINTS, 4, *maps.shape[2:])
    turns = (turns * heat[:, :, None]).flatten(3).sum(-1)
    return (
      (heat[..., None] * grid).sum((2, 3)), turns.view(-1, KEYPOINTS, 2, 2)
    )


class DenseMotion(nn.Module):
  """A flow out of the keypoints' motions, and what it cannot show."""

  def __init__(self, scale):
    super().__init__()
    self.shrink, motions = Shrink(scale), KEYPOINTS + 1
    self.features = Hourglass(4 * motions, 64)
    self.masks = nn.Conv2d(self.features.features, motions, 7, padding=3)
    self.occlusion = nn.Conv2d(self.features.features, 1, 7, padding=3)

  def forward(self, image, source, driving):
    small = self.shrink(image)
    n, _, height, width = small.shape
    grid = places(height, width, small)

    def bumps(points):
      away = grid - points[:, :, None, None]
      return torch.exp(-away.square().sum(-1) / 0.02)

    heat = F.pad(bumps(driving[0]) - bumps(source[0]), (0, 0, 0, 0, 1, 0))
    turn = source[1] @ torch.inverse(driving[1])
    away = (grid - driving[0][:, :, None, None])[..., None]
    moved = (turn[:, :, None, None] @ away)[..., 0] + (
      source[0][:, :, None, None]
    )
    where = torch.cat([grid.expand(n, 1, -1, -1, -1), moved], 1)
    warped = F.grid_sample(
      small.repeat_interleave(KEYPOINTS + 1, 0), where.flatten(0, 1),
      align_corners=True,
    ).view(n, -1, 3, height, width)
    x = self.features(torch.cat([heat[:, :, None], warped], 2).flatten(1, 2))
    shares = self.masks(x).softmax(1)
    flow = (shares[..., None] * where).sum(1)
    return flow, torch.sigmoid(self.occlusion(x))


class Generator(nn.Module):
  """Encodes the source, warps what it found and draws from that."""

  def __init__(self, scale):
    super().__init__()
    self.motion = DenseMotion(scale)
    self.down = nn.Sequential(
      Block(3, 64, 7), Block(64, 128, resize=-2), Block(128, 256, resize=-2)
    )
    self.draw = nn.Sequential(
      *(Residual(256) for _ in range(6)),
      Block(256, 128, resize=2), Block(128, 64, resize=2),
      nn.Conv2d(64, 3, 7, padding=3), nn.Sigmoid(),
    )

  def forward(self, image, source, driving):
    x = self.down(image)
    flow, visible = self.motion(image, source, driving)
    resize = lambda y: F.interpolate(y, x.shape[2:], mode='bilinear')
    flow = resize(flow.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    x = F.grid_sample(x, flow, align_corners=True) * resize(visible)
    return self.draw(x)


def make(image_size, device):
  """(what draws the next of four random frames, the nets)."""
  scale = image_size // 64
  keypoints, generator = Keypoints(scale), Generator(scale)
  nets = nn.ModuleList([keypoints, generator]).to(device).eval()
  image, *clip = torch.rand(5, 1, 3, image_size, image_size, device=device)
  clip = itertools.cycle(clip)
  with torch.no_grad():
    source = keypoints(image)

  @torch.no_grad()
  def draw():
    return generator(image, source, keypoints(next(clip))).cpu()

  return draw, nets


def main():
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--image_size', type=int, default=256, help='a multiple of 64')
  add('--frames', type=int, default=5, help='timed, one after another')
  add('--warmup', type=int, default=2)
  add('--threads', type=int, help="default: torch's")
  add('--device', choices=('cpu', 'cuda'), default='cpu')
  args = parser.parse_args()
  if args.threads:
    torch.set_num_threads(args.threads)
  before = torch_reference.matrix_rate(args.device)
  draw, nets = make(args.image_size, args.device)
  torch_reference.seconds(draw, args.warmup, args.device)
  times = torch_reference.seconds(draw, args.frames, args.device)
  after = torch_reference.matrix_rate(args.device)
  print(json.dumps({
    'torch': torch.__version__, 'threads': torch.get_num_threads(),
    **vars(args), 'load_average': os.getloadavg()[0],
    'parameters': sum(p.numel() for p in nets.parameters()),
    'matrix_gflops_before_and_after': [round(before, 1), round(after, 1)],
    'seconds_per_frame': [round(s, 4) for s in times],
    'seconds_per_frame_median': round(statistics.median(times), 4),
    'peak_gib': round(torch_reference.peak_gib(args.device), 3),
  }, indent=2))


if __name__ == '__main__':
  main()
