"""From videos to a report: folders, comparison, ablation, pages, the judge."""

import importlib
import json
import types

import cv2
import jax
import numpy as np
import pytest
import skimage.metrics

from hatjax import (
  ablation,
  comparison,
  convert,
  evaluate,
  extractors,
  score_report,
  scores,
  video,
  weights,
)


def clips(seed, frames=6, size=24):
  rng = np.random.default_rng(seed)
  still = rng.integers(0, 256, (1, size, size, 3)).repeat(frames, 0)
  moved = still + rng.normal(0, 20, (frames, size, size, 3))
  return np.clip(moved, 0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """(generated, real): three pairs, a damaged one, one without a partner."""
  ours, theirs = (tmp_path_factory.mktemp(n) for n in ('ours', 'theirs'))
  for i in range(3):
    video.write_video(f'{ours}/clip{i}/', clips(i))
    video.write_video(f'{theirs}/clip{i}/', clips(10 + i, 11, 48))
  (ours / 'bad.mp4').write_bytes(b'not a video')
  video.write_video(f'{theirs}/bad/', clips(5))
  video.write_video(f'{theirs}/alone/', clips(6))
  return ours, theirs


@pytest.fixture(scope='module')
def report(folders, tmp_path_factory):
  out = tmp_path_factory.mktemp('out')
  gallery = score_report.Gallery(out, 2, frames=True)
  result = evaluate.evaluate_folders(
    *folders, sizes=(128, 12), faces='builtin', ssim='uniform7', keep=gallery
  )
  score_report.write(result, gallery, out, [('a', out / 'absent.png')])
  return result, out


def test_scores_equal_scikit_image_on_the_written_pngs(report):
  result, out = report
  read = lambda row, clip: np.stack([
    cv2.imread(str(path))[..., ::-1]
    for path in sorted((out / 'frames' / row / clip).glob('*.png'))
  ])
  for i, name in enumerate(result['ids']):
    real = read('real', name)
    for row in ('generated', 'copy', 'blend'):
      fake, last = read(row, name), -1 if row == 'blend' else None
      pairs = list(zip(fake[1:last], real[1:last]))
      found = result['clips'][row]
      psnr = [
        skimage.metrics.peak_signal_noise_ratio(x, y) for x, y in pairs
      ]
      ssim = [
        skimage.metrics.structural_similarity(x, y, channel_axis=-1)
        for x, y in pairs
      ]
      np.testing.assert_allclose(found['psnr'][i], np.mean(psnr), rtol=1e-5)
      np.testing.assert_allclose(found['ssim'][i], np.mean(ssim), atol=1e-5)
      small = [
        skimage.metrics.peak_signal_noise_ratio(*(
          cv2.resize(x, (12, 12), interpolation=cv2.INTER_AREA) for x in pair
        )) for pair in pairs
      ]
      np.testing.assert_allclose(
        found['psnr@12'][i], np.mean(small), rtol=1e-5
      )
      assert 'psnr@128' not in found  # larger than the clips


def test_frames_are_compared_with_those_nearest_in_time(report, folders):
  result, out = report
  real, _ = video.read_video(folders[1] / 'clip1')
  # 6 frames of 11: round(2 i).
  kept = video.resize(real[[0, 2, 4, 6, 8, 10]], 24)
  written, _ = video.read_video(out / 'frames' / 'real' / 'clip1')
  np.testing.assert_array_equal(written, kept)
  assert result['rows']['real']['psnr']['mean'] == scores.PSNR_CAP
  assert result['rows']['real']['identical_frames'] == 15


def test_unreadable_clips_are_skipped_and_counted(report):
  result, _ = report
  assert result['n'] == {'clips': 3, 'subjects': None, 'skipped': 2}
  assert any(line.startswith('bad: Cannot read') for line in result['skipped'])
  assert 'alone: no generated video' in result['skipped']


def test_faces_that_are_not_there_are_counted_as_missed(report):
  row = report[0]['rows']['generated']
  assert row['faces_missed'] == row['faces_sought'] == 18
  assert np.isnan(row['acd']['mean']) and row['acd']['n'] == 0
  assert 'generated 18/18' in '\n'.join(score_report.notes(report[0]))


def test_the_report_needs_nothing_outside_its_folder(report):
  result, out = report
  page = (out / 'report.html').read_text()
  links = [
    part.split('"')[0]
    for key in ('src="', 'href="') for part in page.split(key)[1:]
  ]
  assert any(x.endswith('.mp4') for x in links)
  for link in links:
    assert '://' not in link and (out / link).is_file(), link
  frames, _ = video.read_video(next((out / 'videos').glob('*.mp4')))
  assert len(frames) == 6 + 6
  back = json.loads(
    (out / 'scores.json').read_text(), parse_constant=pytest.fail
  )
  assert back['rows']['generated']['acd']['mean'] is None
  assert back['settings']['ssim'] == 'uniform7'
  assert back['settings']['extractors']['ACD']['name'] == 'builtin-hog-1'
  text = (out / 'report.md').read_text()
  assert 'not computed' in text and 'built-in descriptor' in text
  strip = video.read_image(next((out / 'strips').glob('*_real.png')))
  assert strip.shape == (24, 6 * 24 + 5 * 2, 3)
  assert result['scoring']['frames'] == 3 * 4 * 6


def test_folders_that_do_not_match(folders, tmp_path):
  with pytest.raises(ValueError, match='is not a folder'):
    evaluate.evaluate_folders(tmp_path / 'no', folders[1])
  video.write_video(f'{tmp_path}/other/', clips(0))
  with pytest.raises(ValueError, match='no video of the same name'):
    evaluate.evaluate_folders(tmp_path, folders[1])


def test_comparison_warns_of_other_conditions(report, tmp_path):
  result, _ = report
  other = json.loads(json.dumps(result))
  other['settings']['ssim'] = 'gaussian'
  table = comparison.write({'a': result, 'b': other}, tmp_path)
  assert table.count('| copy |') == 1
  assert '| a: generated |' in table and '| b: generated |' in table
  assert 'b has ssim "gaussian", a "uniform7": not comparable' in table
  text = (tmp_path / 'comparison.md').read_text()
  assert '| FEV-GAN | 27.1 | 0.91 | 0.09 | 0.23 |' in text
  assert 'digit for digit' in (tmp_path / 'comparison.html').read_text()


def test_published_rows_fit_their_columns():
  for table in comparison.published()['tables']:
    assert {'source', 'dataset', 'notes'} <= table.keys()
    for name, values in table['rows'].items():
      assert len(values) == len(table['columns']), name
    assert set(table['columns']) <= set(scores.COLUMNS)


@pytest.mark.parametrize('method, words, changes', [
  ('hat_cgan', 'tiny', {'net', 'affine', 'lambda_patch', 'gan_loss'}),
  ('fev_gan', 'identity_encoder,fev_gan,tiny', {'use_spatial', 'use_identity'}),
])
def test_every_ablation_is_a_config_that_exists(method, words, changes):
  module = importlib.import_module('configs.synthetic')
  commands = ablation.commands(f'configs/synthetic.py:{words}', 'r', 30)
  assert list(commands) == ['judge', *ablation.VARIANTS[method]]
  changed = set()
  for args in commands.values():
    config = module.get_config(args[1].partition(':')[2])
    for option in args[4:]:
      key, _, value = option.removeprefix('--config.').partition('=')
      *path, leaf = key.split('.')
      block = config
      for part in path:
        block = block[part]
      assert leaf in block, option
      if path[-1] == 'model':
        assert str(block[leaf]) != value, option  # else it ablates nothing
        changed.add(leaf)
  assert changed == changes


def test_ablations_share_what_is_trained_once():
  gan = ablation.commands('configs/synthetic.py', 'r', 30)
  assert '--config.init_from.hat_cgan=r/base' in gan['diff']
  fev = ablation.commands('c.py:identity_encoder,fev_gan', 'r', 30, 'data')
  trained = [args[1] for args in fev.values()]
  encoder = '--config.init_from.identity_encoder=r/base'
  assert trained == ['c.py:face_classifier', 'c.py:identity_encoder,fev_gan',
                     'c.py:fev_gan', 'c.py:fev_gan']
  shared = [encoder in args for args in fev.values()]
  assert shared == [False, False, True, True]
  roots = [ablation.default_root(c) for c in ('c.py', 'c.py:fev_gan')]
  assert len(set(roots)) == 2  # each has a run named base
  paper = ablation.commands('c.py:fev_gan,paper', 'r', 30)  # VGG-Face's weights
  assert paper['base'][1] == 'c.py:fev_gan,paper'
  assert encoder not in paper['no_spatial_encoder']
  assert ablation.folders('c.py:fev_gan', 'r').keys() | {'judge'} == fev.keys()


def test_an_ablation_ends_where_a_training_was_stopped(tmp_path, monkeypatch):
  begun = []

  def run(command):
    folder = tmp_path / f'{command[command.index("--workdir") + 1]}'
    begun.append(folder.name)
    stage = 'face_classifier' if folder.name == 'judge' else 'hat_cgan'
    step = 4 if folder.name == 'resnet_6' else 7
    (folder / stage / 'checkpoints' / f'{step}').mkdir(parents=True)
    config = {'stages': [stage], stage: {'train': {'num_steps': 7}}}
    (folder / 'config.json').write_text(json.dumps(config))
    return types.SimpleNamespace(returncode=0)

  monkeypatch.setattr(ablation.subprocess, 'run', run)
  with pytest.raises(ValueError, match='resnet_6 was stopped at step 4 of 7'):
    ablation.train('configs/synthetic.py', tmp_path, 7)
  assert begun == ['judge', 'base', 'resnet_6']


def test_weights_are_listed_with_all_that_one_must_know(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv('HATJAX_WEIGHTS', str(tmp_path))
  assert convert.main(['weights', '--list']) == 0
  text = capsys.readouterr().out
  for name, entry in weights.REGISTRY.items():
    part = text[text.index(f'\n{name}: not there') :]
    for fact in (entry.use, entry.licence, entry.file, entry.sha256):
      assert fact in part
  assert convert.main(['weights', 'fetch', 'resnext101_kinetics']) == 1
  assert 'has no address' in capsys.readouterr().err
  (tmp_path / 'x').write_bytes(b'x')
  code = convert.main(
    ['weights', 'fetch', 'lpips_vgg', '--source', f'{tmp_path}/x']
  )
  assert code == 1 and 'another file' in capsys.readouterr().err


def test_the_judge_follows_the_labels_asked_for():
  method = types.SimpleNamespace(
    num_labels=3, classify=lambda state, x: jax.numpy.tile(
      jax.numpy.arange(4.0), (len(x), 1)
    ),
  )
  run = types.SimpleNamespace(
    method=method, state=None, image_size=8, step=1,
    config={
      'info': {'labels': ['a', 'b', 'c'], 'fingerprint': 'x'},
      'stages': ['face_classifier'],
    },
  )
  judge = extractors.make_judge(run, ('c', 'a'))
  found = judge(np.zeros((2, 16, 16, 3), np.uint8))
  np.testing.assert_array_equal(found, [[2, 0, 1, 3]] * 2)
  with pytest.raises(ValueError, match='knows a, b, c, not d'):
    extractors.make_judge(run, ('a', 'd'))


def test_an_expression_counts_as_recognised_by_its_end():
  logits = np.zeros((8, 3))
  logits[:6, 2] = 9  # neutral for most of the clip
  logits[6:, 1] = 1
  assert scores.is_recognised(logits, 1)
  assert not scores.is_recognised(logits, 0)
