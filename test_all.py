"""Tests, a section for each file in their order, and the course. pytest test_all.py; -k gpu, -k exercise_03

Reference tests put the slow, literal version of an equation beside the fast one; property tests are what a
wrong implementation would break; command tests are real runs with tiny settings; fault tests are wrong input.

python test_all.py handout 3 --out exercise-3     python test_all.py grade exercise-3 --exercise 3
"""

import argparse
import ast
import collections
import contextlib
import copy
import errno
import functools
import inspect
import io
import itertools
import json
import math
import os
import pickle
import pkgutil
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from pytest import approx
from torch.testing import assert_close

import kmeans
import objectives
import probe
import tcas
import train
import vit as V
from kmeans import KMeans, KMeansTokenizer, assign

HERE = os.path.dirname(os.path.abspath(train.__file__))


@pytest.fixture(autouse=True)
def fixed_random_numbers():
    torch.manual_seed(0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def refusal(capture, command, *argv):
    """The one line with which a command ends, exit code 2."""
    capture.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*argv)
    printed = capture.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in printed
    error, = [line for line in printed.splitlines() if ": error: " in line]
    assert printed.endswith(error + "\n")
    return error


# --- vit.py -----------------------------------------------------------------------------------------------


tiny = functools.partial(                                                 # 9 patches
    V.ViT, image_size=24, patch_size=8, width=32, depth=2, heads=2)


def test_vit_equals_torchvision():
    theirs = torchvision.models.VisionTransformer(48, 8, 3, 4, 64, 256)
    ours = V.ViT(48, 8, 64, 3, 4)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=.2)
    theirs.heads = nn.Identity()
    values = iter(theirs.state_dict().values())   # cls, then in the order of use
    state = {"cls_token": next(values), "patch_embed.proj.weight": next(values)}
    state |= {"patch_embed.proj.bias": next(values), "pos_embed": next(values)}
    state |= dict(zip([key for key in ours.state_dict() if key not in state], values, strict=True))
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 48, 48)
    assert_close(ours(images)[:, 0], theirs(images), atol=1e-4, rtol=1e-4)
    assert {part.eps for part in ours.modules() if hasattr(part, "eps")} == {1e-6}


@pytest.mark.parametrize("scale", [None, .1])
def test_state_dict_is_timms(scale):
    """Keys, order and shapes of timm's vit_small_patch16_224 (num_classes=0), written out."""
    d = 384
    block = {"norm1.weight": (d,), "norm1.bias": (d,),
             "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,),
             "attn.proj.weight": (d, d), "attn.proj.bias": (d,),
             "ls1.gamma": (d,),
             "norm2.weight": (d,), "norm2.bias": (d,),
             "mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,),
             "mlp.fc2.weight": (d, 4 * d), "mlp.fc2.bias": (d,),
             "ls2.gamma": (d,)}
    wanted = {"cls_token": (1, 1, d), "pos_embed": (1, 197, d)}
    wanted |= {"patch_embed.proj.weight": (d, 3, 16, 16), "patch_embed.proj.bias": (d,)}
    for i in range(12):
        wanted |= {f"blocks.{i}.{key}": shape for key, shape in block.items() if scale or "gamma" not in key}
    wanted |= {"norm.weight": (d,), "norm.bias": (d,)}
    with torch.device("meta"):
        ours = V.vit_small(layer_scale=scale).named_parameters()          # shared ones: once
    assert [(key, tuple(value.shape)) for key, value in ours] == list(wanted.items())


def test_patches_are_in_raster_order_and_values_by_row_column_channel():
    images = torch.randn(2, 3, 6, 6)
    patches = V.patchify(images, 2)
    for y, x, c in itertools.product(range(6), range(6), range(3)):
        value = patches[:, y // 2 * 3 + x // 2, (y % 2 * 2 + x % 2) * 3 + c]
        assert torch.equal(images[:, c, y, x], value)
    assert torch.equal(V.unpatchify(patches, 2), images)


def test_standardized_patches_have_mean_0_and_variance_1():
    x = V.standardize_patches(5 + 3 * torch.randn(2, 3, 16, 16), 8)
    assert_close(x.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    assert_close(x.var(-1), torch.ones(2, 4))
    faint = 1e-3 * torch.randn(1, 3, 8, 8)                                # eps 1e-6, inside of the root
    wanted = faint.var() / (faint.var() + 1e-6)
    assert_close(V.standardize_patches(faint, 8).var(), wanted)


def test_hog_is_the_slow_loop():
    images = torch.randn(2, 3, 16, 32)
    x = F.pad(images, (1, 1, 1, 1), mode="reflect").double().view(6, 1, 18, 34)
    sobel = torch.tensor([[1., 0, -1], [2, 0, -2], [1, 0, -1]]).double()
    gx, gy = (F.conv2d(x, kernel[None, None]).view(2, 3, 16, 32).tolist() for kernel in (sobel, sobel.T))
    wanted = torch.zeros(2, 2, 3, 9, 2, 2, dtype=torch.float64)           # image, patch, channel, bin, cell
    for b, c, row, column in itertools.product(range(2), range(3), range(16), range(32)):
        dx, dy = gx[b][c][row][column], gy[b][c][row][column]
        orientation = math.floor(math.atan2(dx, dy) / math.pi * 9) % 9
        wanted[b, column // 16, c, orientation, row // 8, column % 16 // 8] += math.hypot(dx, dy)
    wanted = F.normalize(wanted, dim=3).flatten(2)
    assert_close(V.hog(images, 16).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p, cells", [(4, 1), (8, 1), (12, 4), (14, 4), (20, 16)])
def test_hog_cells_have_unit_length_for_any_patch_size(p, cells):
    images = torch.randn(2, 3, 2 * p, 2 * p)
    bins = V.hog(images, p).view(2, 4, 3, 9, cells)
    assert_close(bins.square().sum(3), torch.ones(2, 4, 3, cells))
    flat = torch.zeros(1, 3, p, p, requires_grad=True)
    V.hog(flat, p).sum().backward()
    assert flat.grad.isfinite().all()                                     # PeCo's loss on flat areas


@pytest.mark.parametrize("prefix", [0, 1])
def test_sincos_positions_value_by_value(prefix):
    pos = V.sincos_positions(5, 16, prefix)
    assert pos.shape == (1, prefix + 25, 16)
    assert pos.dtype == torch.float32
    assert not pos[0, :prefix].any()
    for y, x, j in itertools.product(range(5), range(5), range(4)):
        w = 10000 ** (-j / 4)
        wanted = [math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)]
        assert pos[0, prefix + 5 * y + x, j::4].tolist() == approx(wanted, abs=1e-5)


def test_positions_are_resized_smoothly():
    ramp = torch.arange(9.).view(1, 9, 1)
    pos = F.pad(ramp, (0, 0, 1, 0), value=7.)                             # the class token's first
    assert_close(V.resize_positions(pos, 3), pos)           # the same grid: unchanged
    large = V.resize_positions(pos, 6)[0, :, 0]
    up = large[1:].view(6, 6)
    assert large[0] == 7
    stripe = (torch.arange(64) % 8 == 0).float().view(1, 64, 1)           # the first column of 8
    assert V.resize_positions(stripe, 2, prefix=0)[0, 0] > .1             # smoothed before it shrinks
    assert (up.diff(dim=1) > 0).all()
    assert (up.diff(dim=0) > up.diff(dim=1).mT).all()


def slow_attention(attention, x, mask):
    """softmax(q k^T / sqrt(head width)) v, one head and one row at a time; mask (rows, keys)."""
    b, rows, d = x.shape
    size = d // attention.heads
    q, k, v = (F.linear(x, w, c)
               for w, c in zip(attention.qkv.weight.split(d), attention.qkv.bias.split(d)))
    out = torch.zeros_like(x)
    for i, head, row in itertools.product(range(b), range(attention.heads), range(rows)):
        part = slice(head * size, (head + 1) * size)
        seen = mask[row].nonzero()[:, 0]
        weights = (k[i, seen, part] @ q[i, row, part] / size ** .5).softmax(0)
        out[i, row, part] = weights @ v[i, seen, part]
    return attention.proj(out)


def test_attention_with_mask_and_query_only_rows_is_the_slow_loop():
    attention, x = V.Attention(16, 2), torch.randn(2, 7, 16)
    mask = torch.rand(7, 5) < .5
    mask[:, 0] = True
    wanted = slow_attention(attention, x, mask)                           # nobody sees rows 5 and 6
    assert_close(attention(x, mask, n_keys=5), wanted)
    assert_close(attention(x, mask, n_keys=5, n_out=3), wanted[:, -3:])
    assert_close(attention(x), slow_attention(attention, x, torch.ones(7, 7)))
    wanted = slow_attention(attention, x, torch.ones(7, 5))               # no mask: all see 5 rows
    assert_close(attention(x, n_keys=5, n_out=2), wanted[:, -2:])


def test_block_is_eq_2_and_3():
    block, x = V.Block(16, 2, layer_scale=.3), torch.randn(2, 5, 16)
    assert (block.ls1.gamma == .3).all()
    for parameter in block.parameters():
        nn.init.normal_(parameter)

    def norm(layer, x):
        return F.layer_norm(x, (16,), layer.weight, layer.bias, 1e-6)
    y = x + block.ls1.gamma * block.attn(norm(block.norm1, x))
    hidden = block.mlp.fc1(norm(block.norm2, y))
    hidden = hidden * (1 + torch.erf(hidden / 2 ** .5)) / 2               # GELU, exact
    wanted = y + block.ls2.gamma * block.mlp.fc2(hidden)
    assert_close(block(x), wanted)
    assert_close(block(x, n_out=2), wanted[:, -2:])


def test_encode_of_the_last_rows_only_changes_nothing_else():
    vit, x = tiny(layer_scale=.5).eval(), torch.randn(2, 10, 32)
    mask = torch.rand(10, 8) < .7
    mask[:, 0] = True
    assert_close(vit.encode(x, mask, 8, n_out=4), vit.encode(x, mask, 8)[:, -4:])


def test_stochastic_depth_is_one_draw_per_sample():
    block, x = V.Block(16, 2, drop_path=.25), torch.randn(2000, 3, 16)
    nn.init.zeros_(block.mlp.fc2.weight)                                  # attention alone
    nn.init.zeros_(block.mlp.fc2.bias)
    y = block(x) - x
    kept = y.abs().amax(-1) > 0
    assert torch.equal(kept.all(1), kept.any(1))                          # all rows of a sample together
    assert kept.float().mean().item() == approx(.75, abs=.04)
    branch = block.eval()(x) - x
    assert_close(y[kept], branch[kept] / .75, atol=1e-5, rtol=1e-4)     # the mean stays
    assert [block.drop_path.p for block in tiny(drop_path=.3, depth=4).blocks] == approx([0, .1, .2, .3])


@pytest.mark.parametrize("init", ["timm", "mae"])
def test_initialization(init):
    """MAE: uniform in +-sqrt(6 / (in + out)), the patch projection as a linear layer; timm: std 0.02."""
    vit = tiny(init=init, width=64)
    weight, patches = vit.blocks[0].mlp.fc1.weight, vit.patch_embed.proj.weight
    if init == "mae":
        assert weight.abs().max() <= math.sqrt(6 / (64 + 256))
        assert weight.std().item() == approx(math.sqrt(2 / (64 + 256)), rel=.05)
        assert patches.std().item() == approx(math.sqrt(2 / (64 + 3 * 8 * 8)), rel=.05)
    else:
        assert weight.std().item() == approx(.02, rel=.05)
    assert not vit.blocks[0].mlp.fc1.bias.any()
    assert (vit.cls_token.std() < 1e-5) == (init == "timm")
    assert vit.pos_embed.std().item() == approx(.02, rel=.1)
    assert not tiny(pos="sincos").pos_embed.requires_grad


# --- weights ----------------------------------------------------------------------------------------------

def split_qkv(state, bias):
    """BEiT's layout (bias: q_bias and v_bias, none for keys) or MaPeT's (q apart from kv)."""
    out = dict(state)
    for key in state:
        if "qkv.bias" in key and bias:
            q, _, v = out.pop(key).chunk(3)
            out |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
        elif "qkv" in key and not bias:
            q, k, v = out.pop(key).chunk(3)
            out |= {key.replace("qkv", "q"): q, key.replace("qkv", "kv"): torch.cat([k, v])}
    return out


def test_weights_of_every_layout_give_the_same_features(tmp_path):
    source, images = tiny(layer_scale=.1).eval(), torch.randn(1, 3, 24, 24)
    for block in source.blocks:
        nn.init.normal_(block.attn.qkv.weight)
        nn.init.normal_(block.attn.qkv.bias)
        block.attn.qkv.bias.data[32:64] = 0                               # BEiT's keys have none
    flat, wanted, other = source.state_dict(), source(images), torch.zeros(3)

    def prefixed(prefix):
        return {prefix + key: value for key, value in flat.items()}
    beit = split_qkv(flat, bias=True)
    beit = {re.sub(r"ls(\d).gamma", r"gamma_\1", key): value for key, value in beit.items()}
    tuned = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: flat[key]
             for key in flat}
    layouts = {
        "timm": flat | {"head.weight": other},
        "mae": {"model": flat | {"decoder_pred.bias": other}, "epoch": 3, "args": argparse.Namespace(lr=1)},
        "dino": {"student": {}, "teacher": prefixed("module.backbone.") | {"module.head.mlp.0.bias": other}},
        "compiled": {"state_dict": prefixed("_orig_mod.module.")},
        "ours": {"model": prefixed("encoder.") | {"regressor.0.q.weight": other}},
        "fine-tuned": tuned,
        "beit": beit | {"lm_head.weight": other, "mask_token": other},
        "mapet": split_qkv(flat, bias=False),
    }
    for name, state in layouts.items():
        torch.save(state, tmp_path / "encoder.pt")
        loaded = V.load_weights(tiny(layer_scale=1.).eval(), tmp_path)    # a folder: its encoder.pt
        assert_close(loaded(images), wanted, msg=name)
    rebuilt = V.from_weights(tmp_path / "encoder.pt", heads=2).eval()
    assert (rebuilt.grid, rebuilt.patch_size, rebuilt.depth, rebuilt.mlp_ratio) == (3, 8, 2, 4)
    assert_close(rebuilt(images), wanted)
    large = V.from_weights(tmp_path, image_size=48, heads=2)
    assert large.pos_embed.shape == (1, 37, 32)
    assert torch.equal(large.pos_embed[:, 0], source.pos_embed[:, 0])
    bare = tiny(cls_token=False).state_dict()
    assert torch.equal(V.from_weights(bare, heads=2).pos_embed, bare["pos_embed"])


def test_unknown_number_of_heads_is_asked_for():
    sizes = *V.MODELS.values(), functools.partial(V.vit_large, width=1280)
    for build, heads in zip(sizes, (3, 3, 6, 12, 16, 16)):
        net = build(image_size=16, patch_size=16, depth=1)
        assert V.from_weights(net.state_dict()).heads == net.heads == heads
    state = V.ViT(16, 16, 1152, 1, 16).state_dict()
    with pytest.raises(ValueError, match="1152.*--heads"):
        V.from_weights(state)
    assert V.from_weights(state, heads=16).heads == 16


@pytest.mark.parametrize("content, words", [
    (b"<!doctype html><html>", "<!doctype html>"),
    (b"", "begins with b''"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
    ({"model": {}, "best": np.float64(3)}, "numpy"),
    ({"model": 1}, "no weights"),
    ({"patch_embed.proj.weight": torch.zeros(3)}, "pos_embed is missing"),
    (tiny().state_dict() | {"register_tokens": torch.zeros(1, 4, 32)}, "register_tokens"),
    (tiny().state_dict() | {"blocks.0.attn.q_norm.weight": torch.zeros(32)}, "q_norm"),
    (tiny(depth=3).state_dict(), "blocks.2.norm1"),
    (tiny(width=16).state_dict(), "cls_token"),
])
def test_what_does_not_load_says_why_in_one_line(content, words, tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"w.pt.*{words}") as error:
        V.load_weights(tiny(), path)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


def test_download_checks_the_hash_and_fetches_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    source = tmp_path / "weights.pth"
    source.write_bytes(b"weights")
    with pytest.raises(ValueError, match="0123.*put the file at"):
        V.download(source.as_uri(), sha256="0123")
    path = V.download(source.as_uri(), sha256="9a129038")
    source.unlink()
    assert V.download(source.as_uri()) == path
    assert open(path, "rb").read() == b"weights"


# --- files, errors, pictures ------------------------------------------------------------------------------

def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    V.save({"step": 1}, path)
    for error in (OSError(28, "No space left"), RuntimeError("pos 64 vs 0")):
        with pytest.raises(OSError, match=f"last.pt is left as it was.*{re.escape(str(error))}"):
            with V.write_atomically(path) as temporary:
                open(temporary, "w").write("half")
                raise error
        assert V.read_checkpoint(path) == {"step": 1}
        assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("error", [ValueError("bad --flag"), OSError(5, "Input/output error")])
def test_bad_input_is_one_line_and_a_bug_a_traceback(error, capsys):
    with pytest.raises(SystemExit) as stop, V.exit_on_error("train.py"):
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"train.py: error: {error}\n"
    with pytest.raises(KeyError), V.exit_on_error("train.py"):
        raise KeyError


def test_rows_are_drawn(tmp_path, monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    red = torch.zeros(2, 3, 8, 8)
    red[:, 0] = 1.2                                                       # beyond 1: clamped
    V.draw_rows({"two red": red, "one black": 0 * red[:1]}, tmp_path / "new" / "p.png")
    picture = plt.imread(tmp_path / "new" / "p.png")
    for color in ([1, 0, 0, 1], [0, 0, 0, 1]):
        assert (picture == np.array(color)).all(-1).mean() > .05
    monkeypatch.setitem(sys.modules, "matplotlib", None)                  # not installed
    V.draw_rows({"red": red}, tmp_path / "q.png")
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "q.png").exists()


def test_principal_colors_are_the_three_main_directions():
    rows = torch.randn(2, 500, 6) * torch.tensor([9., 5., 3., .1, .1, .1])
    colors, again = V.principal_colors(rows, rows[:1])
    assert_close(again, colors[:1])
    for axis in range(3):                                                 # of either sign
        both = torch.stack([colors[..., axis].flatten(), rows[..., axis].flatten()])
        assert torch.corrcoef(both)[0, 1].abs() > .95
    inside = (colors > 0) & (colors < 1)                                  # two standard deviations
    assert inside.float().mean().item() == approx(.95, abs=.03)
    flat, = V.principal_colors(torch.ones(1, 9, 6))
    assert_close(flat, torch.full((1, 9, 3), .5), atol=.02, rtol=0)


def test_table_of_models(capsys):
    V.main()
    out = capsys.readouterr().out
    assert "85.80M" in out
    assert "35.13" in out                                                 # 17.6 G multiply-adds


# --- kmeans.py --------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TYPES = torch.float32, torch.bfloat16, torch.float16, torch.uint8


def rows_of(n, d, kind=torch.float32):
    """Rows around seven centers; of bytes: any."""
    g = seeded(0)
    if kind == torch.uint8:
        return torch.randint(256, (n, d), generator=g, dtype=kind)
    centers = 3 * torch.randn(7, d, generator=g)
    x = centers[torch.randint(7, (n,), generator=g)]
    return (x + torch.randn(n, d, generator=g)).to(kind)


def check_labels(x, c, labels):
    """Labels are the float64 brute force's, but where squared distances agree to 1e-4; those distances."""
    exact = torch.cdist(x.double(), c.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    found = exact.gather(1, labels[:, None])[:, 0]
    assert (found <= exact.min(1).values * (1 + 1e-4) + 1e-12).all()
    assert (labels == exact.argmin(1)).float().mean() > .98
    return found


def slow_lloyd(x, c, steps):
    """Float64, one centroid at a time, as in the docstring of `lloyd`: centroids, inertia."""
    x, c = x.double(), c.double()
    for step in range(steps + 1):
        distances = (x[:, None] - c).square().sum(-1)
        if step == steps:
            return c, distances.min(1).values.sum().item()
        labels = distances.argmin(1)
        c = torch.stack([x[labels == k].mean(0) for k in range(len(c))])


class Toy(torch.utils.data.Dataset):
    """Images that are functions of their index; `asked` notes for which."""
    mean, std = (.5, .4, .3), (.2, .25, .3)
    name, image_size = "toy", 16

    def __init__(self, n=20):
        self.n, self.asked = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.asked.append(i)
        return draw_images(i, 1, self.image_size)[0], -1, i, i

    def note_damaged(self, wanted, read):
        assert torch.equal(wanted, read)


def draw_images(seed, n, size=16):
    return torch.randint(256, (n, 3, size, size), generator=seeded(seed), dtype=torch.uint8)


def read_images(ds):
    return torch.stack([ds[i][0] for i in range(len(ds))])


def toy_tokenizer(p=8, features="pixel"):
    blank = kmeans.blank_tokenizer(Toy(), features, p)
    x = blank.compute_features(torch.zeros(1, 3, 16, 16))
    codes = torch.randn(9, x.shape[-1], generator=seeded(1))
    blank.weight, blank.bias = kmeans.linear_layer(codes)
    return blank


def replace_download(monkeypatch, path):
    """Whatever is asked for is the file `path`; returns what was asked for."""
    asked = {}

    def download(url, **check):
        asked.update(check, url=url)
        return path

    monkeypatch.setattr(kmeans, "download", download)
    return asked


@pytest.mark.parametrize("n, d, k", [(1, 1, 1), (2049, 17, 33), (300, 257, 130)])
@pytest.mark.parametrize("kind", TYPES)
def test_assign_is_the_brute_force(n, d, k, kind):
    x = rows_of(n, d, kind)
    c = x[:k].float() + .01 * torch.randn(k, d)
    labels, distances = assign(x, c)
    wanted = check_labels(x, c, labels)
    assert_close(distances.double(), wanted, rtol=1e-5, atol=1e-9)


def test_assign_is_exact_far_from_the_origin():
    x = rows_of(500, 20) + 1000             # ||x||^2 is 10^6 times the distances: naive float32 loses them
    c = x[:40] + .1
    check_labels(x, c, assign(x, c)[0])
    far = kmeans.lloyd(x, c, 4)[2]
    near = kmeans.lloyd(x - 1000, c - 1000, 4)[2]
    assert far == approx(near, rel=1e-3)


def test_rows_of_zeros_are_no_seeds_by_cosine():
    x = rows_of(300, 8)
    x[::10] = 0
    for seed in range(5):
        found = KMeans(8, "cosine", seed=seed).fit(x)
        assert_close(found.centroids.norm(dim=1), torch.ones(8))


@pytest.mark.parametrize("n, d, k", [(60, 2, 3), (5000, 30, 20)])
def test_lloyd_is_the_slow_lloyd(n, d, k):
    x = rows_of(n, d)
    for steps in (0, 1, 4):
        found, counts, history = kmeans.lloyd(x, x[:k], steps)
        wanted, inertia = slow_lloyd(x, x[:k], steps)
        assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
        assert len(history) == steps + 1
        assert history[-1] == approx(inertia, rel=1e-6)
        assert torch.equal(counts, assign(x, found)[0].bincount(minlength=k))


def test_fit_ends_where_nothing_moves_or_where_tol_says():
    x = rows_of(900, 5)
    exact = KMeans(9, tol=0, max_iter=300).fit(x)
    assert_close(kmeans.lloyd(x, exact.centroids, 1)[0], exact.centroids)
    loose = KMeans(9, tol=.003, max_iter=300).fit(x)
    assert loose.n_iter < exact.n_iter
    left = kmeans.lloyd(x, loose.centroids, 1)[0] - loose.centroids       # what the next pass would move
    assert left.square().sum() <= .003 * x.var(0).mean()
    assert KMeans(9, max_iter=2).fit(x).n_iter == 2


def test_cosine_is_kmeans_of_rows_and_centroids_of_unit_length():
    x = rows_of(400, 6) * torch.rand(400, 1).mul(5).exp()      # lengths over two orders of magnitude
    km = KMeans(5, "cosine", tol=0).fit(x)
    unit, labels = F.normalize(x, dim=1), km.predict(x)
    check_labels(unit, km.centroids, labels)
    means = torch.stack([unit[labels == k].mean(0) for k in range(5)])
    assert_close(km.centroids, F.normalize(means, dim=1))
    longer = KMeans(5, "cosine", tol=0, init=9 * km.centroids).fit(x)
    assert longer.inertia == approx(km.inertia)


def test_an_empty_cluster_takes_half_of_the_largest():
    c = torch.tensor([[0., 0], [9., 9], [5., 5]])
    found = kmeans.split_empty(c, torch.tensor([3, 0, 8]), .5)
    assert found.tolist() == [[0, 0], [5.5, 4.5], [5, 5]]
    corners = torch.eye(3)[:, :2].repeat(50, 1)
    assert KMeans(3, init=torch.zeros(3, 2)).fit(corners).inertia < 1e-6


def test_degenerate_data_ends_finite():
    x = rows_of(40, 5)
    assert KMeans(40).fit(x).inertia < 1e-6                              # K = n
    few = x[:12].repeat(10, 1)                                           # more clusters than distinct rows
    km = KMeans(30).fit(few)
    assert km.inertia < 1e-6
    assert (km.counts > 0).sum() == 12
    km = KMeans(4).fit(torch.full((50, 3), 1e3))
    assert km.inertia == 0
    assert km.n_iter < 3


def test_what_cannot_be_clustered_is_refused():
    x = rows_of(4, 3)
    for km, bad, says in ((KMeans(2, "cos"), 1, "cos"),
                          (KMeans(5), 1, "5 clusters of 4 rows"),
                          (KMeans(2), math.nan, "NaN"),
                          (KMeans(2), math.inf, "infinite")):
        x[1, 2] = bad
        with pytest.raises(ValueError, match=says):
            km.fit(x)
    with pytest.raises(ValueError, match="5 clusters of 0 rows"):         # zeros have no direction
        KMeans(5, "cosine").fit(torch.zeros(20, 3))


@pytest.mark.parametrize("metric, init", [("euclidean", "k-means++"), ("cosine", "random")])
def test_streams_memory_maps_and_bytes_are_the_tensor(tmp_path, metric, init):
    x = rows_of(2500, 9, torch.uint8)
    np.save(tmp_path / "x.npy", x.numpy())
    passes = []

    def fit(rows):
        return KMeans(6, metric, init, max_iter=5, tol=0).fit(rows)

    def stream():
        passes.append(1)
        yield x[:0]
        yield from x.float().split(701)

    whole = fit(x.float())
    for other in (x, np.load(tmp_path / "x.npy", mmap_mode="c"), stream):
        km = fit(other)
        assert_close(km.centroids, whole.centroids, rtol=1e-4, atol=1e-4)
        assert torch.equal(km.counts, whole.counts)
    # The moments twice, the seeds, one pass an iteration, the last assignment: nothing else reads the stream.
    assert len(passes) == 3 + km.n_iter + 1


def test_the_best_of_several_restarts_is_kept():
    x = rows_of(300, 4)
    one = KMeans(7, init="random", seed=2).fit(x)
    six = KMeans(7, init="random", seed=2, restarts=6).fit(x)
    assert six.inertia < one.inertia


def slow_plusplus(x, u):
    distances = torch.cdist(x, x).square()
    chosen = [int(u[0, 0] * len(x))]
    for draws in u[1:].tolist():
        closest = distances[chosen].min(0).values
        share = closest.cumsum(0) / closest.sum()
        trials = [int((share > draw).nonzero()[0]) for draw in draws]
        left = [torch.minimum(closest, distances[j]).sum() for j in trials]
        chosen.append(trials[left.index(min(left))])
    return chosen


def test_kmeans_plusplus_is_the_slow_loop():
    x = rows_of(90, 5)
    u = torch.rand(10, 4, generator=seeded(5), dtype=torch.float64)
    found = kmeans.kmeans_plusplus(x, 10, seeded(5))
    assert found.tolist() == slow_plusplus(x.double(), u)
    rows = torch.tensor([0., 0, 1, 0, 3])[:, None]
    seeds = rows[kmeans.kmeans_plusplus(rows, 3)]
    assert sorted(seeds.flatten().tolist()) == [0, 1, 3]
    assert kmeans.kmeans_plusplus(torch.ones(5, 2), 3).max() < 5          # all alike: any


def largest_tensor(function, *given):
    """Bytes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function(*given)
    return max(event.cpu_memory_usage for event in profile.events())


def test_no_matrix_of_all_scores_is_made():
    x = torch.randn(40000, 2)
    km = KMeans(50, max_iter=1)
    assert largest_tensor(km.fit, x) < 40000 * 50
    assert largest_tensor(km.predict, x) < 40000 * 50                     # bytes: not even one an entry


TRITON = """
import torch, kmeans
from test_file import TYPES, check_labels, rows_of
for n, d, k in (1, 3, 1), (130, 17, 70), (200, 40, 150):
    for kind in TYPES:
        x = rows_of(n, d, kind)
        c = x[:k].float() + .1 * torch.randn(k, d)
        check_labels(x, c, kmeans.find_nearest_triton(x, *kmeans.linear_layer(c)))
x = rows_of(40, 4)
labels = kmeans.find_nearest_triton(x, *kmeans.linear_layer(x.repeat(5, 1)))
assert (labels < 40).all()                                    # ties between codes of different tiles
"""


def test_the_triton_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    here, name = os.path.split(os.path.splitext(__file__)[0])
    env = dict(os.environ, OMP_NUM_THREADS="1", TRITON_INTERPRET="1", PYTHONPATH=HERE)
    command = [sys.executable, "-c", TRITON.replace("test_file", name)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=here, env=env)
    if "interpreter.py" in run.stderr and "only 0-dimensional arrays" in run.stderr:
        pytest.skip("Triton 3.6's interpreter does not work with numpy 2.4 and newer")
    assert run.returncode == 0, run.stderr


class CLIPNet(torchvision.models.ResNet):
    """What OpenAI's file calls `visual`, smaller: three convolutions first, attention last."""

    def __init__(self):
        super().__init__(torchvision.models.resnet.Bottleneck, [1, 1, 2, 1])
        for i, sizes in enumerate([(3, 8), (8, 8), (8, 64)], 1):
            self.add_module(f"conv{i}", nn.Conv2d(*sizes, 3, 2 if i == 1 else 1, 1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(sizes[1]))
        for value in self.state_dict().values():
            if value.dim() == 1:                               # of the norms: none is 0 or 1
                nn.init.uniform_(value, .5, 1.5)

    def trunk(self, x):
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = self.relu(norm(conv(x)))
        x = self.layer2(self.layer1(F.avg_pool2d(x, 2)))
        return self.layer4(self.layer3(x)).flatten(2).mT

    def forward(self, x):
        x = self.trunk(x.type(self.conv1.weight.dtype))
        return F.scaled_dot_product_attention(x.mean(1, keepdim=True), x, x)


def test_clip_runs_from_a_torchscript_archive_without_its_pooling(tmp_path, monkeypatch):
    path, net = str(tmp_path / "RN50x64.pt"), CLIPNet().eval().half()
    archive = nn.Sequential(collections.OrderedDict(visual=net))
    torch.jit.trace(archive, torch.randn(1, 3, 128, 128)).save(path)
    asked = replace_download(monkeypatch, path)
    ds = Toy()
    ds.image_size = 64
    tokenizer = kmeans.blank_tokenizer(ds, "clip", 16)
    assert asked["sha256"] in asked["url"]
    assert tokenizer.input_size == 128                                    # twice the pixels
    assert (tokenizer.mean, tokenizer.std) == V.CLIP
    small = torch.randn(3, 3, 64, 64)
    large = F.interpolate(small, scale_factor=2, mode="bicubic")
    wanted = net.float().trunk(large)
    assert wanted.std() > .1
    for images in (large, small):
        x = tokenizer.compute_features(images)
        assert x.shape == (3, 16, 2048)
        assert_close(x, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="patch size 8"):
        kmeans.blank_tokenizer(ds, "clip", 8)


@pytest.mark.parametrize("features", ["pixel", "pixel-norm", "hog", "vit"])
def test_a_tokenizer_is_a_function_and_a_linear_layer_and_survives_a_round_trip(tmp_path, features):
    path, images = str(tmp_path / "t.pt"), draw_images(0, 3)
    if features == "vit":
        features = str(tmp_path / "encoder.pt")
        torch.save(V.vit_micro(image_size=16, depth=1).state_dict(), features)
    tokenizer = toy_tokenizer(features=features)
    x = tokenizer.compute_features(V.normalize(images, Toy.mean, Toy.std))
    tokens = tokenizer(images)
    logits = F.linear(x, tokenizer.weight, tokenizer.bias)
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(tokens, torch.cdist(x, tokenizer.weight).argmin(-1))
    tokenizer.save(path)
    assert os.path.getsize(path) < 30000                                  # the encoder is named, not copied
    again = kmeans.load_tokenizer(path)
    assert torch.equal(tokens, again(images))
    assert not kmeans.average_patches(images, tokens, 8, 10)[9].any()     # no patch has code 9
    assert again.mean == Toy.mean


def test_foreign_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "good.pt"
    toy_tokenizer().save(str(path))
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:900])
    (tmp_path / "page.html").write_text("<html>\n404")
    torch.save({"model": 1}, tmp_path / "other.pt")
    torch.save({**torch.load(path), "color": 8}, tmp_path / "more.pt")
    np.save(tmp_path / "floats.npy", np.zeros((3, 4)))
    for name in ("cut.pt", "page.html", "other.pt", "more.pt", "floats.npy", "missing"):
        for load in (kmeans.load_tokenizer, kmeans.load_tokens):
            with pytest.raises((OSError, ValueError), match=name) as error:
                load(str(tmp_path / name))
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="patch size 7"):
        toy_tokenizer(p=7)


def official_vqkd(vit, project, codes):
    """A state dict with the names of BEiT v2's file: encoder, decoder, teacher, buffers; no bias of keys."""
    state = {}
    for key, value in split_qkv(vit.state_dict(), bias=True).items():
        key = key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key
        state[f"encoder.{key}"] = state[f"decoder.{key}"] = value
    state |= {f"encode_task_layer.{key}": value for key, value in project.state_dict().items()}
    for key in ("decode_task_layer.0.bias", "teacher_model.visual.proj", "quantize.cluster_size"):
        state[key] = torch.zeros(4)
    return state | {"quantize.embedding.weight": codes}


def test_official_vqkd_weights_give_its_tokens(tmp_path, monkeypatch):
    path, own = str(tmp_path / "vqkd.pth"), str(tmp_path / "own.pt")
    vit = V.vit_micro(image_size=224, patch_size=16, depth=2)
    for block in vit.blocks:
        block.attn.qkv.bias.data[:96] = torch.randn(96)
    nn.init.normal_(vit.norm.weight)
    project = nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 32))
    pixels = draw_images(0, 4, 224)
    features = vit(pixels / 127.5 - 1)[:, 1:]                  # its input: -1 to 1
    z = F.normalize(project(features), dim=-1)
    codes = z.flatten(0, 1).detach()[::9]
    wanted = torch.cdist(z, codes).argmin(-1)
    torch.save({"model": official_vqkd(vit, project, codes), "epoch": 99}, path)
    asked = replace_download(monkeypatch, path)
    kmeans.load_tokenizer(path).save(own)
    for name in ("vqkd", path, own):
        tokenizer = kmeans.load_tokenizer(name)
        assert torch.equal(tokenizer(pixels), wanted)
        assert (tokenizer.features, tokenizer.vocab_size, tokenizer.mean) == ("vqkd", 88, (.5, .5, .5))
    assert asked["sha256"] in asked["url"]


def test_fit_tokenizer_is_kmeans_of_the_normalized_patches():
    ds = Toy(30)
    tokenizer = kmeans.fit_tokenizer(ds, "pixel", 5, 4)
    images = read_images(ds)
    x = V.patchify(V.normalize(images, ds.mean, ds.std), 4)
    tokens = tokenizer(images)
    means = torch.stack([x[tokens == k].mean(0) for k in range(5)])
    assert_close(tokenizer.weight, means, atol=.05, rtol=0)


def test_kmeans_is_fitted_on_random_images_and_of_textures_on_5_percent_of_their_patches(monkeypatch):
    fit, given, n = KMeans.fit, [], 60
    monkeypatch.setattr(KMeans, "fit", lambda km, rows: given.append(rows) or fit(km, rows))
    for name, kept in ("photos", 64), ("textures/train", 3):
        ds = Toy(n)
        ds.name = name
        tokenizer = kmeans.fit_tokenizer(ds, "pixel", 5, 2)
        assert given[-1].shape == (n * kept, 12)
        assert sorted(ds.asked) == list(range(n)) != ds.asked
    places = set()
    for i, row in zip(ds.asked[:50], given[-1][::3]):
        patches = tokenizer.compute_features(draw_images(i, 1))[0]
        places.add(int((patches == row).all(1).nonzero()[0]))
    assert len(places) > 10                                    # not the same corner of every image


def test_beyond_1000_codes_seeds_are_random_and_the_log_says_so(capsys, monkeypatch):
    monkeypatch.setattr(kmeans, "kmeans_plusplus", None)
    kmeans.fit_tokenizer(Toy(30), "pixel", 1100, 2, max_iter=1)
    assert "random" in capsys.readouterr().out


def test_tokenize_writes_the_tokens_once_and_refuses_those_of_others(tmp_path):
    tokenizer, ds, path = toy_tokenizer(), Toy(150), str(tmp_path / "tokens.npy")
    tokens = kmeans.tokenize(tokenizer, ds, path)
    images = read_images(ds)
    assert np.array_equal(tokens, tokenizer(images))
    assert np.load(path).dtype == np.uint16
    assert os.listdir(tmp_path) == ["tokens.npy"]
    ds.asked.clear()
    kmeans.tokenize(tokenizer, ds, path)
    assert not ds.asked
    with pytest.raises(ValueError, match="remove it"):
        kmeans.tokenize(toy_tokenizer(4), ds, path)


def work_together(rank, world, folder):
    """What must not hang on the number of processes; saved by each."""
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    x = torch.cat([rows_of(3001, 6), torch.full((1, 6), 1e3)])
    own = x if world == 1 else x.split([1300, 1702])[rank]
    found = []
    for km in (KMeans(9, restarts=2), KMeans(9, "cosine", "random"), KMeans(3, init=torch.zeros(3, 6))):
        km.fit(own)
        found += [km.centroids, km.counts.float()]
    tokenizer = kmeans.fit_tokenizer(Toy(15), "pixel", 5, 8, max_iter=5)
    tokens = kmeans.tokenize(tokenizer, Toy(15), f"{folder}/tokens{world}.npy")
    found += [tokenizer.weight, torch.from_numpy(tokens.astype("f4"))]
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_kmeans_of_two_processes_is_that_of_one(tmp_path):
    work_together(0, 1, tmp_path)
    torch.multiprocessing.spawn(work_together, (2, str(tmp_path)), nprocs=2)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for one, a, b in zip(alone, first, second):
        assert torch.equal(a, b)
        assert_close(a, one, rtol=1e-5, atol=1e-5)


def test_the_commands_on_pictures_of_ones_own(tmp_path, capsys):
    for i in range(12):
        picture = draw_images(i, 1, 40)[0, :, :32].permute(1, 2, 0)
        Image.fromarray(picture.numpy()).save(tmp_path / f"{i:02}.jpg")
    data, out = ["--data", str(tmp_path), "--device", "cpu"], f"{tmp_path}/out"
    tokenizer = ["--tokenizer", f"{out}/tokenizer.pt"]
    fit = ["fit", *data, "--out", out, "--k", "6"]
    kmeans.main(fit)
    assert "6 of 6 codes used" in capsys.readouterr().out
    kmeans.main(["tokenize", *data, *tokenizer])                           # beside the tokenizer
    kmeans.main(["show", *data, *tokenizer])
    assert kmeans.load_tokens(f"{out}/tokens.npy").shape == (12, 196)
    assert sorted(os.listdir(out)) == ["codebook.png", "tokenizer.pt", "tokens.npy", "tokens.png"]
    for words, says in ((fit, "tokens.npy is there"),
                        ([*fit, "--out", f"{out}2", "--k", "9999"], "9999 clusters"),
                        (["show", *data, "--tokenizer", "nothing.pt"], "nothing.pt")):
        assert says in refusal(capsys, kmeans.main, words)


# --- kmeans.py on a GPU -----------------------------------------------------------------------------------

@on_gpu
@pytest.mark.parametrize("n, d, k", [(1, 3, 1), (3000, 260, 150), (70001, 768, 100)])
@pytest.mark.parametrize("kind", TYPES)
def test_gpu_kernel_is_the_slow_reference(n, d, k, kind):
    x = rows_of(n, d, kind)
    c = x[:k].float() + .1 * torch.randn(k, d)
    labels = assign(x.cuda(), c.cuda())[0].cpu()
    check_labels(x[:2000], c, labels[:2000])
    sums, _ = kmeans.add_up(x.cuda(), c.cuda())
    total = x.double().sum(0)
    assert_close(sums.sum(0).cpu(), total, rtol=1e-4, atol=1e-2)


@on_gpu
def test_gpu_kmeans_is_the_cpus():
    x = rows_of(5000, 30)
    here = KMeans(9, max_iter=5).fit(x)
    for rows in (x.cuda(), x.numpy()):
        there = KMeans(9, max_iter=5, device="cuda").fit(rows)
        assert_close(there.centroids.cpu(), here.centroids, rtol=1e-3, atol=1e-3)


@on_gpu
def test_gpu_tokens_are_the_cpus(tmp_path):
    for tokenizer in (kmeans.fit_tokenizer(Toy(40), "pixel", 5, 8, device="cuda"),
                      toy_tokenizer(features="hog")):
        name = f"{tmp_path}/{tokenizer.features}"
        there = kmeans.tokenize(tokenizer.cuda(), Toy(40), f"{name}-gpu.npy", device="cuda")
        here = kmeans.tokenize(tokenizer.cpu(), Toy(40), f"{name}-cpu.npy")
        assert (np.asarray(there) == here).mean() > .98        # a near-tie may fall otherwise


# --- tcas.py ----------------------------------------------------------------------------------------------


def random_counts(k, c):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 40, (k, c)))


def literal_tcas(counts, norm):
    """Both terms of Eq. 8 with the (K, K) matrix C and explicit sums."""
    r = []
    for row in counts.numpy():
        length = math.sqrt(sum(row ** 2)) if norm == "l2" else sum(row)
        if length > 0:
            r.append(row / length)
    k = len(r)
    c = np.array(r) @ np.array(r).T
    first = sum((1 - c[i, i]) ** 2 for i in range(k))
    second = sum(c[i, j] ** 2 for i, j in itertools.permutations(range(k), 2))
    return first / k, second / k ** 2


def test_cooccurrence_is_a_count_whatever_holds_the_tokens(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(7, size=(50, 6)).astype(np.uint16)
    labels = rng.integers(3, size=50)
    want = np.zeros((7, 3), int)
    for row, label in zip(tokens, labels):
        for token in row:
            want[token, label] += 1
    np.save(tmp_path / "t.npy", tokens)
    for kind in (tokens, torch.from_numpy(tokens), np.load(tmp_path / "t.npy", mmap_mode="r")):
        counts = tcas.cooccurrence(kind, labels, 7, 3)
        assert counts.dtype == torch.int64
        assert (counts.numpy() == want).all()


def test_cooccurrence_refuses_tokens_of_other_images():
    with pytest.raises(ValueError, match="4 images but 3 labels"):
        tcas.cooccurrence(np.zeros((4, 3), int), [0, 1, 0], 8, 2)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("k, c", [(9, 5), (5, 9)])
def test_tcas_is_eq_8(norm, k, c):
    counts = random_counts(k, c)
    counts[2] = 0  # a dead code
    first, second = literal_tcas(counts, norm)
    got = tcas.tcas_terms(counts, norm)
    found = got["used"], got["impurity"], got["confusion"], tcas.tcas(counts, norm)
    assert found == approx((k - 1, first, second, first + second), abs=1e-12)


def test_tcas_never_builds_the_matrix_of_all_codes():
    assert largest_tensor(tcas.tcas, random_counts(3000, 4)) < 3000 * 3000


def test_tcas_values_that_are_known():
    k, c = 7, 5
    same = torch.arange(1, c + 1).repeat(k, 1)
    assert tcas.tcas(same) == approx(1 - 1 / k)
    labels_as_tokens = torch.eye(c)
    assert tcas.tcas(labels_as_tokens) == 0
    lumped = torch.tensor([[1, 1, 0], [0, 0, 2]])  # two classes in a token: l1 sees it
    assert tcas.tcas(lumped) < 1e-15
    assert tcas.tcas(lumped, "l1") > .1


def test_codebook_in_words():
    tokens = np.random.default_rng(0).integers(50, size=(2000, 100))
    labels = np.arange(2000) % 10
    words = "codebook: 50 of 50 codes used, perplexity 50.0; a guess by code frequency has loss 3.912"
    line = tcas.describe_codebook(tokens, labels, 50)
    assert line.startswith(f"{words}; TCAS 0.9")
    aligned = labels[:, None].repeat(100, 1)
    assert "; TCAS 0.000 (" in tcas.describe_codebook(aligned, labels, 50)
    for unknown in (-1, 0):                                               # no labels, one class
        assert tcas.describe_codebook(tokens, np.full(2000, unknown), 50) == words
    skewed = np.array([[0, 0, 0, 1]])
    assert "2 of 8 codes used, perplexity 1.8; " in tcas.describe_codebook(skewed, np.array([-1]), 8)


def test_line_through_table_7(tmp_path, monkeypatch, capsys):
    """TCAS and linear probe of the paper's 16 tokenizers: the "r-value 0.85" is r^2, r itself is -0.92."""
    score = "69 60 66 56 56 21 52 34 15 9 49 39 12 77 86 69".split()
    linear = "42.7 48.3 47.2 52.5 52.7 58.2 50.1 52.3 59.7 64.8 50.8 50.6 56.9 44.3 41.2 50.3".split()
    runs = {int(x) / 100 + i * 1e-9: [float(y)] for i, (x, y) in enumerate(zip(score, linear))}  # no ties
    monkeypatch.chdir(tmp_path)
    tcas.draw_lines({"ours": runs}, argparse.Namespace(against="linear"))
    assert ("linear = 62.9 -24.0 TCAS l2 (%), Pearson r = -0.920, r^2 = 0.846, 16 tokenizers"
            in capsys.readouterr().out)


# --- tcas.py: the toy model -------------------------------------------------------------------------------

THREE = "mae", "classwise", "crossclass"
WORLDS = pytest.mark.parametrize("classes, n, overlap", [
    (2, 6, 2),
    (2, 40, 4),
    (4, 16, 2),
])


def test_graphs_are_the_drawing_of_app_b():
    """M by listing every draw (class, x1, x2), A by its sum over tokens, alpha by its sum over labels."""
    classes, n, overlap = 3, 8, 2
    points, z = tcas.populations(n, overlap, classes)
    assert len(points) == classes * n - overlap * 3
    assert (z.sum(0) == n).all()
    assert (z.T @ z)[0, 1] == overlap
    tokens = tcas.assign_tokens("classwise", points)
    every = range(len(points))
    mask, a = np.zeros((2, len(points), len(points)))
    for c in range(classes):
        members = [x for x in every if c in points[x]]
        for x1, x2 in itertools.product(members, members):
            mask[x1, x2] += 1 / (classes * n * n)
    for s in range(classes):
        inside = tokens == s
        for x, y in itertools.product(every, every):
            both = mask[x, inside].sum() * mask[y, inside].sum()
            a[x, y] += both / mask[:, inside].sum()
    assert np.allclose(tcas.mask_graph(z), mask, atol=1e-15)
    to_token, graph, normalized = tcas.augmentation_graph(mask, tokens)
    assert np.allclose(to_token[:, 1], mask[:, tokens == 1].sum(1))
    assert np.allclose(graph, a, atol=1e-15)
    d = mask.sum(1)
    assert np.allclose(normalized, a / np.sqrt(d[:, None] * d))
    toy = tcas.toy_model(n, overlap, "classwise", classes)
    assert toy["sum"] == approx((normalized ** 2).sum())  # Eq. 17
    wrong = 0
    for x, y in itertools.product(every, every):
        unequal = [i != j for i, j in itertools.product(points[x], points[y])]
        wrong += a[x, y] * np.mean(unequal)
    assert toy["alpha"] == approx(wrong)


@WORLDS
@pytest.mark.parametrize("name", THREE)
def test_algebra_equals_brute_force(classes, n, overlap, name):
    brute = tcas.toy_model(n, overlap, name, classes)
    for key, value in tcas.closed_form(n, overlap, name, classes).items():
        assert brute[key] == approx(value, abs=1e-9)
    assert brute["tail"] < 1e-9
    assert brute["bound"] == approx(brute["sum"] + classes * brute["alpha"])


@pytest.mark.parametrize("name, wanted", [                                # sum, alpha, w_in, w_x
    ("classwise", [1.262144, .2952, .0041, .0009]),
    ("crossclass", [1, .5, .0025, .0025]),
])
def test_toy_numbers(name, wanted):
    toy = tcas.toy_model(10, 2, name)
    assert [toy[key] for key in ("sum", "alpha", "w_in", "w_x")] == approx(wanted)


@pytest.mark.parametrize("width, name, wanted", [                         # sum, tail, alpha, linked
    (1, "mae", [5.6296, 3.6296, 0, 5 / 12]),
    (1, "classwise", [2, 0, 0, 1]),
    (1, "crossclass", [1.0123, 0, .5, 1]),
    (2, "mae", [3.264, 1.264, 0, 3 / 4]),
])
def test_ring(width, name, wanted):
    toy = tcas.toy_model(12, 0, name, ring=width)
    assert [toy[key] for key in ("sum", "tail", "alpha", "linked")] == approx(wanted, abs=5e-5)


def test_no_tokenizer_beats_mae_inside_a_class_and_merging_is_a_trade():
    """Merging two tokens lowers the spectrum and raises alpha; of equal class shares: nothing changes."""
    rng, mae = np.random.default_rng(0), tcas.toy_model(10, 2)
    for _ in range(40):
        tokens = rng.integers(rng.integers(2, 12), size=18)
        merged = np.where(tokens == tokens.max(), tokens.min(), tokens)
        toy, coarser = (tcas.toy_model(10, 2, some.tolist()) for some in (tokens, merged))
        assert toy["w_x"] > mae["w_x"] - 1e-12
        assert toy["w_in"] < mae["w_in"] + 1e-12
        assert coarser["sum"] < toy["sum"] + 1e-12
        assert coarser["alpha"] > toy["alpha"] - 1e-12
    pairs = tcas.toy_model(10, 2, "pairs")
    for key in ("w_in", "w_x", "sum", "alpha"):
        assert pairs[key] == approx(mae[key])


@WORLDS
def test_windows_of_the_bounds(classes, n, overlap):
    kappa = 1 - classes * overlap / (2 * n)
    mae, classwise, crossclass = (tcas.toy_model(n, overlap, name, classes) for name in THREE)
    assert tcas.window(mae, crossclass) == (approx(classes * kappa), math.inf)
    low, high = tcas.window(classwise, mae)
    assert (low, high) == (0, approx(classes * kappa * (1 + kappa)))
    for factor, better in ((.99, True), (1.01, False)):  # the bound itself turns there
        bound, worse = (toy["sum"] + high * factor * toy["alpha"] for toy in (classwise, mae))
        assert (bound < worse) == better
    assert tcas.window(classwise, mae, "tail") == (0, 0)  # no tail here: never


def test_theorem_1_holds_from_a_ratio_on():
    """Of all tokenizers of 3 + 3 points the labels minimize the bound if and only if c2/c1 >= 4 - 2/n."""
    z = np.repeat(np.eye(2), 3, axis=0)
    mask = tcas.mask_graph(z)
    wanted = {"sum": (approx(4 - 2 / 3), math.inf), "tail": (0, math.inf)}
    assert tcas.theorem1(mask, z) == wanted
    every = [tcas.measure_graph(mask, z, tokens) for tokens in tcas.partitions(6)]
    assert len(every) == 203
    label = tcas.measure_graph(mask, z, z.argmax(1))
    for c2, smallest in ((3.3, False), (3.34, True)):
        best = min(one["sum"] + c2 * one["alpha"] for one in every)
        assert (label["sum"] <= best + 1e-9) == smallest
    pure = [one["sum"] for one in every if one["alpha"] < 1e-12]
    assert pure == approx([2] * 25)                 # 5 x 5 within-class ones, all tie


# --- tcas.py: the commands --------------------------------------------------------------------------------

def run_tcas(*argv):
    tcas.main([str(word) for word in argv])


def test_toy_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run_tcas("toy", "--overlap", 2)
    out, err = capsys.readouterr()
    assert not err
    assert Path("runs/toy.png").exists()
    assert out.index("labeling error") < out.index("alpha 0.2")           # what it is, then how much
    numbers = "w_in 0.004500 w_x 0.000500 sum 1.409600 alpha 0.244000"
    assert re.search(rf"\nmae +{numbers} tail", out)
    assert re.search(rf"\n  algebra +{numbers}\n", out)
    assert re.search(r"Theorem 1\), sum +c2/c1 3.5 to inf", out)
    assert re.search(r"classwise <= mae, sum +c2/c1 0 to 2.88", out)
    run_tcas("toy", "--ring", 1, "--n", 12)
    out = capsys.readouterr().out
    assert "algebra" not in out
    assert re.search(r"mae <= crossclass, tail +c2/c1 7.259 to inf", out)


@pytest.mark.parametrize("flags, what", [
    (["--n", 9], "even numbers"),
    (["--n-classes", 1], "2 classes"),
    (["--overlap", 10], "overlap < n"),
    (["--ring", 0], "--ring"),
])
def test_toy_command_refuses_in_one_line(capsys, flags, what):
    assert what in refusal(capsys, run_tcas, "toy", *flags)


@pytest.fixture
def few(tmp_path, monkeypatch):
    """200 textures as the data set, runs that train.py might have left: K = 2, 8 and twice the same 32."""
    textures = train.open_dataset("textures", "test")
    ds = torch.utils.data.Subset(textures, range(200))
    ds.labels, ds.classes, ds.note_damaged = textures.labels[:200], range(10), textures.note_damaged
    monkeypatch.setattr(train, "open_dataset", lambda *_, **__: ds)
    monkeypatch.chdir(tmp_path)
    for i, k in enumerate((2, 8, 32, 4)):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        noise = np.random.default_rng(k).integers(k, size=(200, 36))
        tokens = np.where(noise % 2, noise, ds.labels[:, None] % k)
        np.save(folder / "tokens.npy", tokens.astype(np.uint16))
        settings = dict(tokens="run2/tokens.npy" if i == 3 else None, tokenizer=None)
        end = dict(summary=True, linear=.5 + i / 10, objective="mapet", step=9, steps=9, data="textures")
        (folder / "metrics.jsonl").write_text(json.dumps(end | {"settings": settings}) + "\n")
        probe = dict(what="linear", protocol="mae", source="a run", data="textures", linear=.9 - i / 10)
        lines = probe, probe | dict(data="others", linear=0)
        (folder / "probe.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return tmp_path


def read_table(out):
    """[[K used, perplexity, TCAS l2, TCAS l1, of random tokens]] of the table that `score` prints."""
    rows = re.findall(r"^.{40} +(\d+) +(\d+\.\d)" + r" +(\d\.\d{3})" * 3 + "$", out, re.M)
    return [[float(value) for value in row] for row in rows]


def test_a_tokenizer_scores_as_its_stored_tokens_do(few, capsys):
    ds = train.open_dataset("textures")
    tokenizer = kmeans.fit_tokenizer(ds.dataset, "pixel", 8, patch_size=8, max_iter=3)
    tokenizer.save(str(few / "t.pt"))
    tokens = tokenizer(read_images(ds))
    np.save(few / "t.npy", tokens.numpy().astype(np.uint16))
    run_tcas("score", "--tokenizer", few / "t.pt", "--tokens", few / "t.npy")
    out = capsys.readouterr().out
    assert "equal K only" in out
    made, stored = read_table(out)
    assert made == stored
    assert 0 < made[2] < made[4] - .05
    run_tcas("score", "--tokens", few / "t.npy", "--group", 2)
    pairs = read_table(capsys.readouterr().out)[0]
    assert 8 < pairs[0] <= 64                                             # of 8 tokens


@pytest.mark.parametrize("against, y", [
    ("closing", [50, 60, 75]),
    ("linear-mae", [90, 80, 65]),
])
def test_a_dot_is_a_tokenizer_the_mean_of_its_runs(few, capsys, against, y):
    runs = [few / f"run{i}" for i in range(4)]
    run_tcas("score", "--probes", *runs, "--against", against)
    out = capsys.readouterr().out
    assert Path("runs/tcas.png").exists()
    x = [row[2] for row in read_table(out)[:3]]
    line = re.search(rf"mapet, 9 steps: {against} = (\S+) .*Pearson r = (\S+),.*, 3 tokenizers", out)
    assert float(line[1]) == approx(np.polyfit(x, y, 1)[1], abs=1)
    assert float(line[2]) == approx(np.corrcoef(x, y)[0, 1], abs=.02)


def test_probes_that_cannot_be_used_are_left_out(few, capsys):
    (few / "run1" / "tokens.npy").unlink()
    (few / "run2" / "metrics.jsonl").write_text('{"summary": true, "step": 5, "steps": 9}\n{"step": 7, "lo')
    runs = [few / f"run{i}" for i in range(4)]
    run_tcas("score", "--probes", *runs)
    out = capsys.readouterr().out
    assert "run1: left out, it has no tokens" in out
    assert "run2: left out, it stopped at step 5" in out
    assert "mapet, 9 steps: no line, it needs 3 tokenizers" in out
    run_tcas("score", "--probes", *runs, "--against", "finetune")
    assert capsys.readouterr().out.count("left out") == 4


@pytest.mark.parametrize("name, what", [
    ("short.npy", "39 images but 200 labels"),
    ("missing.npy", "missing.npy"),
])
def test_score_refuses_wrong_token_files_in_one_line(few, capsys, name, what):
    np.save(few / "short.npy", np.zeros((39, 36), np.uint16))
    assert what in refusal(capsys, run_tcas, "score", "--tokens", few / name)


# --- objectives.py ----------------------------------------------------------------------------------------


TOKEN_OBJECTIVES = ["clustermim", "cae", "beit", "mim", "pim", "mapet"]
FORMS = [("mae", "pixel"), ("mae", "pixel-norm"), ("maskfeat", "hog"), ("maskfeat", "features")]
FORMS += [(name, None) for name in TOKEN_OBJECTIVES]                     # every objective in every form


def example(name, target=None, b=2, k=11, vit=None, **how):
    """A small objective; images, tokens or features, an order."""
    model = objectives.make(name, vit or tiny(), k, target=target, **how)
    tokens = torch.randn(b, 9, k) if target == "features" else torch.randint(k, (b, 9))
    return model, torch.randn(b, 3, 24, 24), tokens, objectives.random_order(b, 9)


def strengthen(model, std=.2):
    """Weights so large that nothing is near uniform, and any leak shows."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


def find_idle(model):
    """Parameters without a gradient; softmax cannot see a bias on keys."""
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    return [key for key, p in trained.items() if p.grad is None or not p.grad.any()]


# --- orders and masks

def literal_blocks(rng, n, grid=14):
    """BEiT's Algorithm 1, patch by patch, and random patches for what is missing."""
    mask = np.zeros((grid, grid), bool)
    tries = 10
    while mask.sum() < n and tries:
        remaining = n - mask.sum()
        area = rng.uniform(*sorted([16, remaining]))
        aspect = math.exp(rng.uniform(math.log(.3), math.log(1 / .3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        tries -= 1
        if h < grid and w < grid:
            block = np.zeros_like(mask)
            top, left = rng.integers(grid - h + 1), rng.integers(grid - w + 1)
            block[top:top + h, left:left + w] = True
            if 1 <= (block & ~mask).sum() <= remaining:
                mask |= block
                tries = 10
    visible = np.flatnonzero(~mask)
    mask.flat[rng.permutation(visible)[:n - mask.sum()]] = True
    return mask


@pytest.mark.parametrize("n", [75, 98])
def test_block_masks_are_distributed_as_beits(n):
    rng = np.random.default_rng(0)
    slow = torch.tensor(np.array([literal_blocks(rng, n) for _ in range(1000)])).float()
    fast = objectives.blockwise_mask(4000, 14, n).view(-1, 14, 14).float()

    def edge(mask):                                                       # of random masks: twice as long
        return sum(mask.diff(dim=dim).abs().sum() for dim in (1, 2)) / len(mask)
    assert edge(fast).item() == approx(edge(slow).item(), rel=.03)
    rows, columns = (fast.sum(dim).square().mean().item() for dim in (1, 2))
    assert rows == approx(columns, rel=.02)                               # as many blocks are high as wide
    assert (fast.mean(0) - slow.mean(0)).abs().max() < .07                # the center is hidden more often


@pytest.mark.parametrize("grid, n", [(14, 75), (14, 1), (14, 196), (6, 18), (3, 5), (1, 1)])
def test_block_masks_hide_exactly_the_count(grid, n):
    mask = objectives.blockwise_mask(50, grid, n)
    assert mask.shape == (50, grid ** 2)
    assert (mask.sum(1) == n).all()


@pytest.mark.parametrize("name, blocks", [("beit", True), ("cae", True), ("mim", False), ("mae", False)])
def test_orders_hide_blocks_or_not(name, blocks):
    model = objectives.make(name, tiny(image_size=112, depth=1), 8)
    order = model.draw_order(8, seeded(3))
    assert torch.equal(order.sort(1).values, torch.arange(196).expand(8, -1))
    _, hidden = model.split(torch.zeros(8), order)
    mask = objectives.blockwise_mask(8, 14, model.num_targets, seeded(3))
    found = torch.zeros_like(mask).scatter(1, hidden, True)
    assert torch.equal(mask, found) == blocks


def may_attend(row, i, key, j, cut):
    """MaPeT Eq. 3: may row (x content, m mask token, g query) of rank i look at key (x, m) of rank j?"""
    if row == "m" or row == "x" and i < cut:
        return key == "m" or j < cut
    if key == "x":
        return j < cut or (j <= i if row == "x" else j < i)
    return j > i if row == "x" else j >= i


def literal_mask(ranks, targets, cut, positions):
    """Rows and keys in the order of `ranks`, mask tokens and queries in that of `targets`."""
    keys = [("x", i) for i in ranks] + [("m", i) for i in targets if positions]
    rows = keys + [("g", i) for i in targets]
    return torch.tensor([[may_attend(*row, *key, cut) for key in keys] for row in rows])


@pytest.mark.parametrize("n, cut", [(1, 1), (4, 1), (4, 4), (6, 3), (16, 12)])
@pytest.mark.parametrize("positions", [True, False])
def test_two_stream_mask_is_eq_3(n, cut, positions):
    mask = objectives.two_stream_mask(cut, 1 + n - cut, positions)
    assert torch.equal(mask, literal_mask(range(1 + n), range(cut, 1 + n), cut, positions))


@pytest.mark.parametrize("cut, share", [(30, 85.2), (40, 80.1), (50, 75.), (60, 69.9), (98, 50.5)])
def test_cutting_points_of_table_6(cut, share):
    with torch.device("meta"):
        model = objectives.make("mapet", V.vit_tiny(), 8192, cut=cut)
    assert round(100 * model.num_targets / 196, 1) == share
    assert model.mask.shape == (197 + 2 * model.num_targets, 197 + model.num_targets)


def test_amount_of_masking():
    def amount(name, **how):
        with torch.device("meta"):
            return objectives.make(name, V.vit_tiny(), 16, **how).num_targets
    defaults = dict(mae=147, maskfeat=147, clustermim=147, cae=98, beit=75,
                    mim=75, pim=147, mapet=147, vq=0)
    assert {name: amount(name) for name in defaults} == defaults
    assert amount("mapet", mask_ratio=.7) == 137                          # ViT-B: cutting point 60


# --- each objective beside its literal description

def raster_loss(model, images, tokens, order):
    """PIM and MaPeT as released: nothing permuted, a mask for every image, two separate streams."""
    vit = model.encoder
    losses = []
    for image, token, z in zip(images, tokens, order.tolist()):
        ranks = [0] + [1 + z.index(j) for j in range(9)]
        targets = [j for j in range(10) if ranks[j] >= model.cut]
        mask = literal_mask(ranks, [ranks[j] for j in targets], model.cut, model.positions)
        h = torch.cat([vit.cls_token, vit.patch_embed(image[None])], 1) + vit.pos_embed
        g = model.mask_token + vit.pos_embed[:, targets]
        if model.positions:
            h = torch.cat([h, g], 1)
        for block in vit.blocks:
            keys = h.shape[1]
            both = torch.cat([h, g], 1)
            qkv = block.attn.qkv(block.norm1(both))
            q, k, v = qkv.view(1, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
            scores = q @ k[:, :, :keys].mT / 4
            attention = scores.masked_fill(~mask, -math.inf).softmax(-1)
            seen = attention @ v[:, :, :keys]
            seen = block.attn.proj(seen.transpose(1, 2).flatten(2))
            both = both + block.ls1(seen)
            both = both + block.ls2(block.mlp(block.norm2(both)))
            h, g = both[:, :keys], both[:, keys:]
        logits = model.head(vit.norm(g))[0]
        wanted = token[[j - 1 for j in targets]]
        losses.append(F.cross_entropy(logits, wanted))                    # the same number in each image
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", ["mapet", "pim"])
@pytest.mark.parametrize("cut", [1, 4, 9])
def test_permuted_rows_equal_raster_order_with_masks(name, cut):
    model, *batch = example(name, vit=tiny(layer_scale=.3), cut=cut)
    strengthen(model)
    assert_close(model(*batch)[0], raster_loss(model, *batch), atol=1e-5, rtol=1e-5)


def test_mim_equals_masking_in_raster_order():
    """BEiT's way: the mask token replaces the embedding of a masked patch, then positions are added."""
    model, images, tokens, order = example("mim", cut=4)
    vit = strengthen(model).encoder
    masked = torch.ones(2, 9).bool().scatter(1, order[:, :3], False)
    patches = torch.where(masked[..., None], model.mask_token, vit.patch_embed(images))
    x = torch.cat([vit.cls_token.expand(2, -1, -1), patches], 1) + vit.pos_embed
    logits = model.head(vit.encode(x))[:, 1:][masked]
    assert_close(model(images, tokens, order)[0], F.cross_entropy(logits, tokens[masked]))


def literal_autoencoder(model, images, given, order):
    """MAE, MaskFeat, ClusterMIM in raster order: unshuffled, with all positions."""
    vit = model.encoder
    errors = []
    if model.target in V.PATCH_FEATURES:
        given = V.PATCH_FEATURES[model.target](images, 8)
    elif model.target == "features":
        given = given / given.norm(dim=-1, keepdim=True)
    for i, z in enumerate(order.tolist()):
        visible = sorted(z[:model.cut - 1])
        hidden = sorted(z[model.cut - 1:])
        patches = vit.patch_embed(images[i:i + 1])
        x = torch.cat([vit.cls_token, patches], 1) + vit.pos_embed
        seen = [0] + [1 + j for j in visible]
        latent = model.decoder_embed(vit.encode(x[:, seen]))[0]
        full = model.mask_token[0].expand(9, -1).clone()
        full[visible] = latent[1:]
        x = torch.cat([latent[:1], full])[None] + V.sincos_positions(3, full.shape[-1])
        x = model.decoder(x)[0, 1:]
        for j in hidden:
            if model.target == "tokens":
                error = -x[j].log_softmax(0)[given[i, j]]
            else:
                error = (x[j] - given[i, j]).square().mean()
            errors.append(error)
    return torch.stack(errors).mean()


@pytest.mark.parametrize("name, target", FORMS[:5])
def test_masked_autoencoders_equal_raster_order(name, target):
    model, *batch = example(name, target, cut=4, decoder_depth=2)
    strengthen(model)
    loss, logs = model(*batch)
    assert_close(loss, literal_autoencoder(model, *batch), atol=1e-5, rtol=1e-5)
    if target:                                                            # beside predicting the mean
        _, wanted = model.predict(*batch)
        constant = F.mse_loss(wanted.mean((0, 1)).expand_as(wanted), wanted)
        assert_close(logs["explained"], 1 - loss.detach() / constant)


def test_decoders_are_those_of_the_paper():
    """As in ClusterMIM's code: ViT-S 256 wide, 8 heads; ViT-B and L 512, 16 heads; 8 blocks."""
    with torch.device("meta"):
        for build, width, heads in ((V.vit_small, 256, 8), (V.vit_base, 512, 16), (V.vit_large, 512, 16)):
            decoder = objectives.make("clustermim", build(), 50).decoder
            assert decoder[-1].weight.shape == (50, width)
            assert len(decoder) == 8 + 2                                  # norm and head
            assert decoder[0].attn.heads == heads
        cae = objectives.make("cae", V.vit_small(drop_path=.3, layer_scale=.1), 50)
        assert objectives.make("vq", V.vit_base(), 50).codebook.shape == (50, 256)
    assert cae.decoder[-1].in_features == 384
    assert cae.regressor[0].attn.heads == 6
    for blocks in (cae.regressor, list(cae.decoder)[:4]):
        assert [block.drop_path.p for block in blocks] == approx([0, .1, .2, .3])
        assert all(hasattr(block.ls1, "gamma") for block in blocks)


def literal_cae(model, image, tokens, z):
    """CAE for one image, by torch's own attention of several heads."""
    vit = model.encoder
    visible = z[:model.cut - 1]
    hidden = z[model.cut - 1:]

    def norm(layer, x):
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-6)

    def encode(net, which):
        x = torch.cat([net.cls_token, net.patch_embed(image[None])], 1) + net.pos_embed
        return net.encode(x[:, F.pad(1 + which, (1, 0))])[0, 1:]
    latent = encode(vit, visible)
    target = encode(model.teacher, hidden).detach()
    pos = vit.pos_embed[0, 1 + hidden]
    pos_visible = vit.pos_embed[0, 1 + visible]
    x = model.mask_token[0].expand(len(hidden), -1)
    for block in model.regressor:
        both = torch.cat([latent, x])
        where = torch.cat([pos_visible, pos])
        qkv, proj = block.attn.qkv, block.attn.proj
        read = norm(block.norm1, x + pos), norm(block.norm_k, both + where), norm(block.norm_v, both)
        attended, _ = F.multi_head_attention_forward(*read, 32, 2, qkv.weight, qkv.bias, None, None, False, 0,
                                                     proj.weight, proj.bias)
        x = norm(block.norm2, x + block.ls1.gamma * attended)
        x = x + block.ls2.gamma * block.mlp(x)                            # the normalized sum goes on
    guess = norm(model.regressor_norm, x)
    logits = model.decoder((guess + pos)[None])[0]
    return F.cross_entropy(logits, tokens[hidden]) + 2 * (guess - target).square().mean()


def test_cae_equals_its_description_with_a_teacher_one_step_behind():
    model, *batch = example("cae", vit=tiny(layer_scale=.3, pos="sincos"), cut=5, decoder_depth=2)
    strengthen(model)
    for _ in range(2):
        wanted = torch.stack([literal_cae(model, *row) for row in zip(*batch)]).mean()
        assert_close(model.train()(*batch)[0], wanted)
        assert not model.teacher.training
        before = copy.deepcopy(model.encoder.state_dict())
        model.before_step(.5)                                             # then the optimizer's step:
        strengthen(model.encoder)
        assert_close(model.teacher.state_dict(), before, atol=0, rtol=0)


# --- who sees what

def sees(output, images):
    """Which patches of the first image a number depends on."""
    gradient, = torch.autograd.grad(output, images, retain_graph=True)
    return set(V.patchify(gradient, 8)[0].abs().sum(-1).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("name", ["mapet", "pim", "mim"])
@pytest.mark.parametrize("cls_token", [True, False])
def test_no_target_leaks_through_12_layers(name, cls_token):
    """Prediction t depends on the visible patches and on targets before t, and on nothing else."""
    vit = tiny(depth=12, cls_token=cls_token)
    model, images, tokens, order = example(name, vit=vit, b=1, cut=4)
    strengthen(model, .3).double()
    images = images.double().requires_grad_()
    logits, _ = model.predict(images, tokens, order)
    for t in range(6):
        before = 3 + t if name != "mim" else 3
        assert sees(logits[0, t].sum(), images) == set(order[0, :before].tolist())


@pytest.mark.parametrize("name, target", FORMS[:6])
def test_no_hidden_pixel_reaches_encoder_or_gradient(name, target):
    model, images, given, order = example(name, target, b=1, cut=4, decoder_depth=2)
    strengthen(model, .3)
    images.requires_grad_()
    visible, rows = set(order[0, :3].tolist()), []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[1]))
    prediction = model.predict(images, given, order)[0]
    assert rows == [4, 4]                                                 # cls and visible patches only
    for row in prediction[0]:
        assert sees(row.square().sum(), images) == visible
    assert sees(model(images, given, order)[0], images) == visible        # no way back through the target


def test_first_query_equals_its_mask_token_in_every_layer():
    model, *batch = example("mapet", vit=tiny(depth=4), cut=5)
    strengthen(model, .3).double()
    rows = []
    for block in model.encoder.blocks[:-1]:
        block.register_forward_hook(lambda module, args, out: rows.append(out))
    model.predict(batch[0].double(), *batch[1:])
    for x in rows:                                                        # [..., mask tokens, queries]
        assert_close(x[:, -5], x[:, -10])
        assert ((x[:, -4:] - x[:, -9:-5]).abs().amax(-1) > 1e-6).all()


# --- learning

@pytest.mark.parametrize("name", TOKEN_OBJECTIVES)
def test_untrained_loss_is_ln_k_and_each_target_counts_once(name):
    model, images, tokens, order = example(name, b=64, k=50, cut=4, vit=tiny(init="mae"))
    logits, wanted = model.predict(images, tokens, order)[:2]
    assert torch.equal(wanted, tokens.gather(1, order[:, 3:]))            # each target once
    loss, logs = objectives.Objective.loss(model, logits, wanted)
    assert loss.item() == approx(math.log(50), abs=.05)
    assert logs["accuracy"] == (logits.argmax(-1) == wanted).float().mean()
    logp = (9 * logits).log_softmax(-1)
    by_hand = -logp.gather(-1, wanted[..., None]).mean()
    assert_close(objectives.Objective.loss(model, 9 * logits, wanted)[0], by_hand)


@pytest.mark.parametrize("name, target", FORMS)
def test_every_parameter_learns_and_8_images_are_overfitted(name, target):
    cut = 7 if name == "mae" else 4                                       # a narrow head, much noise
    model, *batch = example(name, target, b=8, k=6, cut=cut, decoder_depth=1)
    model(*batch)[0].backward()
    assert all(key.endswith("k.bias") for key in find_idle(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, fused=True)
    for _ in range(400 if target == "hog" else 150 if name in ("beit", "mim", "pim", "mapet") else 250):
        loss, logs = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logs["explained"] > .8 if "explained" in logs else loss - 2 * logs.get("alignment", 0) < .1


# --- learned tokenizers

def tokenizer_example(name, k=7, b=4, **over):
    """A small learned tokenizer, images, a teacher's features."""
    vit = tiny(**{"width": 96, "heads": 3, "init": "mae", **over})
    perceptual = (lambda images: V.hog(images, 8)) if name == "peco" else None
    model = objectives.make(name, vit, k, values=5, decoder_depth=1, perceptual=perceptual)
    return model, torch.randn(b, 3, 24, 24), torch.randn(b, 9, 5) + 1


@pytest.mark.parametrize("name, beta", [("vq", .25), ("vqkd", 1.)])
def test_straight_through_and_commitment_gradients(name, beta):
    """d/dz: the gradient at the code, and beta 2 (z - C_t) / size; d/dC_k: 2 (C_k - z) / size, or none."""
    model, *_ = tokenizer_example(name)
    z = torch.randn(4, 9, model.codebook.shape[1], requires_grad=True)
    pull = torch.randn_like(z)                                            # a loss that is linear in the code
    code, loss, tokens = model.quantize(z)
    nearest = torch.cdist(z, model.codebook).argmin(-1)
    assert torch.equal(tokens, nearest)
    assert_close(code, model.codebook[nearest])
    ((code * pull).sum() + loss).backward()
    apart = z.detach() - model.codebook.detach()[nearest]
    assert_close(z.grad, pull + beta * 2 * apart / z.numel())
    if name == "vq":
        wanted = torch.zeros_like(model.codebook)
        for i, j in itertools.product(range(4), range(9)):
            wanted[nearest[i, j]] -= 2 * apart[i, j] / z.numel()
        assert_close(model.codebook.grad, wanted)
    assert model.codebook.requires_grad == (name == "vq")


@pytest.mark.parametrize("progress, tau, weight", [(0, 1, 0), (.5, 1 - 15 / 32, .5), (1, 1 / 16, 1)])
def test_dvae_mixes_codes_by_gumbel_softmax_and_pays_the_divergence(progress, tau, weight, monkeypatch):
    model, *_ = tokenizer_example("dvae")
    nn.init.normal_(model.classify.weight)
    monkeypatch.setattr(F, "gumbel_softmax", lambda logits, tau: (logits / tau).softmax(-1))   # no noise
    model.before_step(progress)
    z = torch.randn(4, 9, 96)
    logits = z @ model.classify.weight.T + model.classify.bias
    code, loss, tokens = model.quantize(z)
    assert torch.equal(tokens, logits.argmax(-1))
    assert_close(code, (logits / tau).softmax(-1) @ model.codebook, atol=1e-4, rtol=1e-4)
    q = logits.softmax(-1)
    kl = (q * (q * 7).log()).sum(-1).mean()
    assert_close(loss, weight * kl / 192, atol=1e-7, rtol=1e-4)
    assert torch.equal(model.eval().quantize(z)[0], model.codebook[tokens])


@pytest.mark.parametrize("name", ["vq", "vqkd"])
def test_codes_follow_their_z_and_idle_ones_start_anew(name):
    """One step of two micro-batches, by plain loops."""
    model, images, features = tokenizer_example(name, k=40)
    model.codebook.data = F.normalize(model.codebook.data, dim=-1)
    *_, tokens, z = model.predict(images, features)
    unused = [k for k in range(40) if k not in tokens]
    model.idle[unused[:2]] = 199.
    wanted = model.codebook.detach().clone()
    for part in (slice(0, 2), slice(2, 4)):
        model(images[part], features[part])
    model.before_step(.3)
    for k in range(40):
        own = z[tokens == k]
        if len(own) and model.unit:
            moved = .99 * wanted[k] + .01 * own.mean(0) / own.mean(0).norm()
            wanted[k] = moved / moved.norm()
        if k in unused[:2]:                                               # the last part's first image
            wanted[k] = z[2, k % 9]
    assert_close(model.codebook.detach(), wanted)
    assert model.idle[unused].tolist() == [200., 200.] + [1.] * len(unused[2:])
    assert model.idle.count_nonzero() == len(unused)
    assert not model.sums.any()


@pytest.mark.parametrize("name", objectives.TOKENIZERS)
def test_exported_function_and_linear_layer_give_the_models_tokens(name):
    model, images, features = tokenizer_example(name, k=40)
    strengthen(model.classify)
    model.codebook.data = F.normalize(model.codebook.data, dim=-1)
    f, weight, bias = model.export()
    other, *_ = tokenizer_example(name, k=40)
    other.load_state_dict(f, strict=False)
    scores = F.linear(other.encode_patches(images), weight, bias)
    tokens = model.predict(images, features)[3]
    assert torch.equal(scores.argmax(-1), tokens)
    assert len(tokens.unique()) > 1
    if name == "vqkd":
        assert_close(model.encode_patches(images).norm(dim=-1), torch.ones(4, 9))


@pytest.mark.parametrize("name", ["vq", "peco", "vqkd"])
def test_loss_of_learned_tokenizers(name):
    model, images, features = tokenizer_example(name)
    prediction, _, wanted, tokens, _ = model.predict(images, features)
    x = model.decoder_embed(model.codebook[tokens]) + model.encoder.pos_embed[:, 1:]
    assert_close(prediction, model.decoder(x))
    if name == "vqkd":
        error = 1 - F.cosine_similarity(prediction, features, dim=-1).mean()
    else:
        error = F.mse_loss(prediction, V.patchify(images, 8))
    if name == "peco":
        seen, true = (F.layer_norm(V.hog(x, 8), [27]) for x in (V.unpatchify(prediction, 8), images))
        wanted = wanted + F.mse_loss(seen, true)
    loss, logs = model(images, features)
    assert_close(loss, error + wanted)
    share = tokens.flatten().bincount() / 36
    assert_close(logs["perplexity"].log(), -share.xlogy(share).sum())


@pytest.mark.parametrize("name", objectives.TOKENIZERS)
def test_learned_tokenizers_learn(name):
    model, _, features = tokenizer_example(name, k=72, b=8)
    images = F.interpolate(torch.randn(8, 3, 3, 3), 24)                   # a color a patch
    model.codebook.data = model.encode_patches(.9 * images).detach().flatten(0, 1)    # as by K-means
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    errors = []
    for step in range(40):
        loss, logs = model(images, features)
        errors.append(logs["error"])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert all(key.endswith("k.bias") for key in find_idle(model))
        model.before_step(step / 40)
        optimizer.step()
    assert errors[-1] < .9 * errors[0]


# --- pictures

@pytest.mark.parametrize("name, target", FORMS)
def test_perfect_predictions_look_like_the_target(name, target, monkeypatch):
    model, images, given, order = example(name, target, b=3, k=6, cut=5)
    pixels = images.sigmoid()
    looks = torch.rand(6, 192)
    predict = model.predict

    def perfect(*batch):
        wanted = predict(*batch)[1]
        right = F.one_hot(wanted, 6) if model.needs == "tokens" else wanted
        return right, wanted
    monkeypatch.setattr(model, "predict", perfect)
    monkeypatch.setattr(model, "draw_order", lambda b, device: order)
    colors = [(.5, .4, .3), (.2, .3, .25)]
    rows = objectives.picture_predictions(model, pixels, *colors, given, looks)
    image, visible, predicted, wanted = (V.patchify(row, 8) for row in rows.values())
    hidden = torch.zeros(3, 9, 1).bool().scatter(1, order[:, 4:, None], True)
    assert torch.equal(visible, torch.where(hidden, .5, image))
    assert_close(predicted, wanted, atol=1e-4, rtol=1e-3)
    if target == "pixel":
        assert_close(wanted, image)
    elif model.needs == "tokens":
        assert torch.equal(wanted, torch.where(hidden, looks[given], image))


def test_masks_are_printed_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mapet", "pim"):
        objectives.main([name, "--patches", "6", "--cut", "3"])
        _, keys, *lines, _ = capsys.readouterr().out.splitlines()
        assert keys.split()[0] == "cls"
        marks = [[mark == "#" for mark in line.split()[1:-1]] for line in lines]
        assert marks == objectives.two_stream_mask(3, 4, name == "mapet").tolist()
    assert (tmp_path / "runs" / "masks" / "mapet.png").exists()
    objectives.main(["cae"])
    assert capsys.readouterr().out.split("marked 1")[1].count("1") == 98


# --- train.py --------------------------------------------------------------------------------

SMALL = """--preset laptop --image-size 24 --vocab-size 6 --batch-size 8 --epochs 4 --warmup-epochs 1
           --workers 0 --device cpu --log-every 1 --no-probe""".split()          # 20 steps on 40 pictures
textures = functools.cache(train.open_textures)


def make_folder(root, per_class=20, splits=("train", "val"), size=(24, 32)):
    """Pictures in ImageNet's layout: ants are dark, bees are light."""
    rng = np.random.default_rng(0)
    for split in splits:
        for name, level in (("ant", 0), ("bee", 100)):
            os.makedirs(root / split / name)
            for i in range(per_class):
                pixels = level + rng.integers(128, size=(*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:03}.png")
    return str(root)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def folder(pictures, monkeypatch):
    """The same for runs that draw nothing."""
    monkeypatch.chdir(os.path.dirname(pictures))
    monkeypatch.setattr(train, "draw_rows", lambda *_: None)
    return pictures


def run(data, out, *flags):
    """train.main in this process; lines of metrics.jsonl without speeds."""
    train.main([str(flag) for flag in ("--data", data, "--out", out, *SMALL, *flags)])
    lines = train.read_metrics(os.path.join(out, "metrics.jsonl"))
    return [{key: line[key] for key in line if key != "images_per_second"} for line in lines]


def losses(lines):
    return [line["loss"] for line in lines]


def launch(*command):
    """A script in processes of its own, which are a group."""
    command = [sys.executable, *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=environment, start_new_session=True)


TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 2".split()


def wait_for(path, process):
    while not os.path.exists(path):
        assert process.poll() is None, process.communicate()
        time.sleep(.01)


def refused(data, out, capture, flags, *words):
    """The run ends in one line that holds the words."""
    error = refusal(capture, run, data, out, *flags)
    assert not [word for word in words if str(word) not in error], error


def load(path):
    return torch.load(path, weights_only=True)


def same_files(a, b):
    """The encoder, and the tokenizer where there is one, are equal to the last bit."""
    names = ["encoder.pt"] + ["tokenizer.pt"] * os.path.exists(f"{a}/tokenizer.pt")
    return all(Path(a, name).read_bytes() == Path(b, name).read_bytes() for name in names)


GOLDEN = {
    "mae": (.976551, .977024),
    "maskfeat": (.13469, .135808),
    "clustermim": (4.175056, 4.169457),
    "beit": (4.168435, 4.180559),
    "cae": (8.673997, 8.683187),
    "mim": (4.171854, 4.175009),
    "pim": (4.171861, 4.174604),
    "mapet": (4.171727, 4.174875),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_first_losses_are_those_of_the_runs_whose_results_are_printed(name, folder, tmp_path, monkeypatch):
    if nn.init.trunc_normal_(torch.empty(1)) < 1:
        pytest.skip("this torch draws other truncated normals, as 2.11 did")
    monkeypatch.setattr(train, "open_textures", textures)
    argv = ["--objective", name, "--out", str(tmp_path)]
    argv += "--steps 2 --no-probe --log-every 1 --seed 3 --device cpu".split()
    if name not in objectives.TARGETS:
        tokens = np.random.default_rng(0).integers(64, size=(12000, 36), dtype=np.uint16)
        np.save(tmp_path / "t.npy", tokens)
        argv += ["--tokens", str(tmp_path / "t.npy"), "--vocab-size", "64"]
    train.main(argv)
    lines = train.read_metrics(tmp_path / "metrics.jsonl")
    assert losses(lines) == approx(GOLDEN[name], abs=1e-4)


def test_every_step_of_every_process_has_a_seed_of_its_own(folder, tmp_path, monkeypatch):
    seeds, predict = [], objectives.MaPeT.predict

    def noted(*batch):
        seeds.append(torch.initial_seed())
        return predict(*batch)
    monkeypatch.setattr(objectives.MaPeT, "predict", noted)
    monkeypatch.setattr(train, "DistributedDataParallel", lambda net, **how: net)
    for rank in range(2):
        monkeypatch.setattr(train, "rank_and_world", lambda: (rank, 2))
        run(folder, tmp_path / str(rank), "--steps", 3)
    assert len(set(seeds)) == 6


def test_textures_are_a_function_of_seed_and_index_and_have_not_changed():
    images, labels = zip(*(train.render_texture(1, i) for i in range(12)))
    assert list(labels) == [5, 3, 4, 0, 3, 3, 1, 3, 5, 6, 7, 0]
    assert images[7][:, 10, 20].tolist() == [130, 176, 142]
    assert train.TEXTURES == {"train": (1, 12000), "test": (2, 2000), "val": (3, 2000)}
    image, *rest = textures("train", 48)[7]
    assert np.array_equal(image, images[7])
    assert rest == [3, 7, 7]


# --- what a step is

def test_schedule_is_a_function_of_seed_and_step():
    def steps(start, rows, seed=3):
        return list(train.schedule(21, 8, seed, start, 6, rows))

    whole = steps(0, range(0, 8, 8))
    for epoch in range(3):
        seen = whole[2 * epoch] + whole[2 * epoch + 1]
        assert {e for e, _ in seen} == {epoch}
        assert len({i for _, i in seen}) == len(seen) == 16
    assert [i for _, i in whole[0]] != [i for _, i in whole[2]]
    assert steps(3, range(0, 8, 8)) == whole[3:]
    assert steps(0, range(0, 8, 8), seed=4) != whole
    first, second = (steps(0, range(at, at + 4, 2)) for at in (0, 4))         # two processes
    for step in range(6):
        parts = first[2 * step:2 * step + 2] + second[2 * step:2 * step + 2]
        assert sum(parts, []) == whole[step]


def test_learning_rate_is_a_warm_up_and_half_a_cosine():
    def rates(cosine):
        return [train.learning_rate(step, 100, 20, 1., .1, .2, cosine) for step in (0, 10, 20, 60, 100)]

    assert rates("warmup") == approx([.1, .55, 1, .6, .2])
    assert rates("start") == approx([.1, .55, .9236, .4764, .2], abs=1e-4)


def test_weight_decay_is_for_matrices():
    vit = V.vit_micro(image_size=24, layer_scale=.1, pos="learned")
    model = objectives.make("mapet", vit, 6, cut=4)
    decayed, free = train.make_optimizer(model, settings("--weight-decay .07")).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (.07, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in (decayed, free))
    assert {"mask_token", "head.weight", "encoder.blocks.0.attn.qkv.weight"} <= decayed
    assert {"encoder.pos_embed", "encoder.cls_token", "encoder.blocks.0.ls1.gamma", "head.bias"} <= free
    assert len(decayed) + len(free) == len(names)


def test_gradients_are_clipped(folder, tmp_path):
    run(folder, tmp_path, "--clip-norm", 1e-6, "--steps", 1)
    moments = load(tmp_path / "last.pt")["optimizer"]["state"].values()
    assert 0 < max(moment["exp_avg"].norm() for moment in moments) < 2e-7


# --- recipes

def settings(flags, n=1_281_167):
    args = train.parse(flags.split())
    args.preset = args.preset or ("laptop" if args.data == "textures" else "paper")
    ds = train.Images("none", None, np.zeros(n), None, 224)
    train.complete(args, train.recipe(args.objective, args.preset, args.model), ds, torch.device("cpu"))
    return args


IMAGENET = "--data imagenet --objective "
RECIPES = {                                 # a command, and what it stands for
    IMAGENET + "mapet":
        "--model vit_base --batch-size 2048 --epochs 300 --lr 1.5e-3 --min-lr 1e-5 --warmup-lr 1e-6 "
        "--warmup-epochs 10 --clip-norm 3 --weight-decay .05 --beta2 .999 --drop-path .1 --layer-scale .1 "
        "--jitter .4 --crop 0 --features clip --vocab-size 8192 --image-size 224 --patch-size 16 "
        "--cosine start --mask-ratio .7",
    IMAGENET + "pim --model vit_small": "--mask-ratio .75 --batch-size 2048 --pos learned --init timm",
    IMAGENET + "mim": "--mask-ratio .3826530612244898 --epochs 300",
    IMAGENET + "beit": "--mask-ratio .3826530612244898 --pos learned",
    IMAGENET + "cae": "--mask-ratio .5 --pos sincos --init mae --decoder-depth 4 --epochs 300",
    IMAGENET + "clustermim --model vit_large":
        "--batch-size 4096 --epochs 200 --lr 2.4e-3 --min-lr 0 --warmup-lr 0 --warmup-epochs 40 "
        "--clip-norm 0 --weight-decay .05 --beta2 .95 --drop-path 0 --layer-scale 0 --jitter 0 --crop .2 "
        "--features pixel --vocab-size 50 --cosine warmup --mask-ratio .75 --decoder-depth 8 "
        "--pos sincos --init mae",
    IMAGENET + "mae --batch-size 2048": "--lr 1.2e-3 --features pixel --mask-ratio .75",
    IMAGENET + "mae --epochs 20": "--warmup-epochs 4",
    IMAGENET + "mae --epochs 800": "--warmup-epochs 40",
    IMAGENET + "maskfeat --base-lr 1e-3": "--features hog --lr 1.6e-2",
    IMAGENET + "vqkd":
        "--features dino_vitb16 --vocab-size 8192 --decoder-depth 3 --epochs 100 --batch-size 512 --lr 2e-4 "
        "--min-lr 1e-5 --warmup-epochs 10 --beta2 .99 --weight-decay 1e-4 --crop .08 --jitter 0 "
        "--clip-norm 0 --layer-scale 0 --drop-path 0 --cosine warmup",
    "--objective mapet":
        "--model vit_micro --image-size 48 --patch-size 8 --vocab-size 64 --out runs/mapet-textures",
    "--data photos/ --preset laptop --lr 3": "--lr 3 --model vit_micro --out runs/mapet-photos",
    "--data photos --preset laptop --objective peco": "--features hog --init mae --vocab-size 64",
}


@pytest.mark.parametrize("command", RECIPES)
def test_a_flag_beats_the_preset_and_the_preset_the_paper(command):
    args, wanted = settings(command), RECIPES[command].split()
    for flag in wanted[::2]:
        key = flag[2:].replace("-", "_")
        assert getattr(args, key) == approx(getattr(train.parse(wanted), key)), flag


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_the_laptop_does_the_same_work_on_any_number_of_pictures(name):
    few, many = (settings(f"--objective {name} --data d --preset laptop", n) for n in (400, 40_000))
    assert few.epochs == approx(100 * many.epochs)
    assert few.epochs * 400 <= 72_000
    assert few.warmup_epochs / few.epochs == approx(many.warmup_epochs / many.epochs)
    assert few.features in ("pixel", "hog")


# --- runs

def test_the_whole_way_from_textures_to_the_table(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train.TEXTURES, "train", (1, 500))
    monkeypatch.setitem(train.TEXTURES, "test", (2, 250))
    argv = f"--out {tmp_path} --epochs 2 --log-every 5 --device cpu".split()
    train.main(argv)
    table = capsys.readouterr().out
    train.main(argv)                                           # nothing is left to do
    assert "finished before" in capsys.readouterr().out
    *lines, summary = train.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 5, 10, 15, 20, 25, 30]
    assert summary["step"] == summary["steps"] == 30
    assert all(0 <= summary[key] <= 1 for key in ("linear", "linear_random", "knn", "knn_random"))
    assert train.read_summary(tmp_path) == (summary, None)
    assert f"{summary['linear']:.1%}\n" in table


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective_goes_from_pictures_to_predictions(name, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.dirname(pictures))
    lines = run(pictures, tmp_path, "--objective", name, "--epochs", 2)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert min(losses(lines[1:])) < losses(lines)[0]
    assert min(Image.open(tmp_path / "predictions.png").size) > 200
    learns = name in objectives.TOKENIZERS
    assert (tmp_path / "tokens.npy").exists() == (name not in objectives.TARGETS and not learns)
    if name not in objectives.TARGETS:
        assert kmeans.load_tokenizer(str(tmp_path / "tokenizer.pt")).vocab_size == 6
    parts = {key.split(".")[0] for key in load(tmp_path / "encoder.pt")}
    assert parts == {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}


@pytest.fixture
def seen(monkeypatch):
    """Fills with (normalized images, tokens or features) of each step."""
    pairs, forward = [], objectives.Objective.forward

    def note(self, images, tokens=None, order=None):
        pairs.append((images, tokens))
        return forward(self, images, tokens, order)
    monkeypatch.setattr(objectives.Objective, "forward", note)
    return pairs


@pytest.mark.parametrize("name, crop", [("clustermim", .3), ("mapet", .3), ("mapet", 0)])
def test_tokens_are_made_of_the_crop_or_stored_of_the_square(name, crop, folder, tmp_path, seen):
    run(folder, tmp_path, "--objective", name, "--crop", crop, "--jitter", 0 if crop else .4)
    tokenizer = kmeans.load_tokenizer(str(tmp_path / "tokenizer.pt"))
    ds = train.open_dataset(folder, "train", 24)
    squares = read_images(ds)
    whole, stored = V.normalize(squares, ds.mean, ds.std), tokenizer(squares)
    for images, tokens in seen[:5]:
        for image, row in zip(images, tokens):
            assert (image - whole).abs().amax((1, 2, 3)).min() > .01
            assert crop or (row == stored).all(1).any()
        if crop:
            assert torch.equal(tokenizer(images), tokens)
    assert os.path.exists(tmp_path / "tokens.npy") == (crop == 0)


def test_crops_and_jitter_are_a_function_of_seed_epoch_and_image(folder):
    ds = train.open_dataset(folder, "train", 24)
    flags = "--crop .2 --jitter .4 --image-size 24 --seed"
    one, same, other = (train.training_view(ds, settings(f"{flags} {seed}")) for seed in (3, 3, 4))
    jitter = one.transform.transforms[1]
    assert jitter.brightness == jitter.contrast == jitter.saturation == (.6, 1.4)
    image = one[0, 25][0]
    torch.manual_seed(99)
    assert torch.equal(image, same[0, 25][0])
    assert torch.rand(1) == torch.rand(1, generator=seeded(99))
    for x in (one[1, 25], one[0, 26], other[0, 25], ds[0, 25]):
        assert not torch.equal(image, x[0])
    square, mirrored = ds[0][0].float(), 0
    for seed in range(8):
        x = ds.view(train.random_crop(24, .99), seed=seed)[0, 0][0].float()
        mirrored += (x - square).abs().mean() > (x.flip(2) - square).abs().mean()
    assert 0 < mirrored < 8


@pytest.mark.parametrize("name, teacher", [("vqkd", "hog"), ("maskfeat", "encoder.pt")])
def test_features_are_those_that_the_teacher_sees_in_the_crop(name, teacher, folder, tmp_path, seen):
    if teacher != "hog":
        run(folder, tmp_path / "mae", "--objective", "mae", "--steps", 1)
        seen.clear()
        teacher = str(tmp_path / "mae" / teacher)
    run(folder, tmp_path, "--objective", name, "--features", teacher, "--crop", .3, "--steps", 3)
    nothing = torch.zeros(1, 1)
    tokenizer = KMeansTokenizer(teacher, nothing, nothing[0], 8, 24, None, None)
    for images, features in seen:
        assert_close(features, tokenizer.compute_features(images), atol=2e-3, rtol=1e-3)
    assert not [key for key in load(tmp_path / "last.pt")["model"] if "extract" in key or "perceptual" in key]


@on_gpu
@pytest.mark.parametrize("name", ["mae", *TOKEN_OBJECTIVES, "vq", "vqkd"])
def test_gpu_compiled_bfloat16_is_float32(name):
    model, *batch = (tokenizer_example if name in objectives.TOKENIZERS else example)(name)
    wanted, _ = model(*batch)
    model.cuda().compile()
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = model(*[x.cuda() for x in batch])
    loss.backward()
    assert_close(loss.cpu(), wanted, rtol=.02, atol=.02)


@on_gpu
def test_gpu_run_goes_on_and_is_probed(folder, tmp_path):
    for flags in (["--steps", 3], ["--probe", "--compile"]):
        lines = run(folder, tmp_path, "--device", "cuda", *flags)
    assert len(lines) == 21                                    # and the summary
    for what in ("knn", "linear", "finetune", "tokens"):
        assert probe.main([what, str(tmp_path)])[what] > .4


# --- the same run, whatever happens on the way

RANDOM = {
    "mapet": ["--drop-path", .2, "--jitter", .4],
    "cae": ["--drop-path", .2, "--crop", .3],
    "vqkd": ["--drop-path", .2, "--crop", .3],
    "dvae": [],
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_run_that_stops_and_goes_on_equals_an_unbroken_one(name, folder, tmp_path):
    flags = ["--objective", name, *RANDOM[name]]
    whole = run(folder, tmp_path / "whole", *flags)
    for more in (["--steps", 7], ["--steps", 8, "--workers", 1], []):
        parts = run(folder, tmp_path / "parts", *flags, *more)
    assert parts == whole
    assert same_files(tmp_path / "whole", tmp_path / "parts")


def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_happened(folder, tmp_path):
    flags = ["--epochs", 20, "--save-every", 3, "--drop-path", .2]
    process = launch(f"{HERE}/train.py", "--data", folder, "--out", tmp_path / "killed", *SMALL, *flags)
    whole = run(folder, tmp_path / "whole", *flags)
    wait_for(tmp_path / "killed" / "settings.json", process)
    seconds = random.SystemRandom().uniform(0, 2)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    assert run(folder, tmp_path / "killed", *flags) == whole, f"killed after {seconds} s"
    assert same_files(tmp_path / "whole", tmp_path / "killed")


def test_a_run_killed_before_its_first_checkpoint_begins_anew(folder, tmp_path):
    whole = run(folder, tmp_path, "--steps", 3)
    os.remove(tmp_path / "last.pt")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert run(folder, tmp_path, "--steps", 3) == whole


def test_sigterm_saves_and_exits_0_and_a_second_run_is_refused_meanwhile(folder, tmp_path, capsys):
    flags = ["--epochs", 4000, "--workers", 1, "--crop", .5]
    process = launch(f"{HERE}/train.py", "--data", folder, "--out", tmp_path, *SMALL, *flags)
    wait_for(tmp_path / "metrics.jsonl", process)
    refused(folder, tmp_path, capsys, [*flags, "--fresh"], tmp_path, "run-at-work")
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == 0 and "to go on: the same command" in printed, printed
    saved = load(tmp_path / "last.pt")["step"]
    assert len(run(folder, tmp_path, *flags, "--steps", saved + 1)) == saved + 1 > 1
    assert f"at step {saved}" in capsys.readouterr().out


def test_a_signal_to_another_process_stops_this_one(folder, tmp_path, monkeypatch):
    def add_theirs(*tensors):
        for tensor in tensors:
            tensor += tensor.dim() == 0                        # the number of signals
    monkeypatch.setattr(train, "all_reduce", add_theirs)
    run(folder, tmp_path)
    assert load(tmp_path / "last.pt")["step"] == 1


@pytest.mark.parametrize("name", ["mapet", "vqkd"])
def test_two_processes_are_one(name, folder, tmp_path, monkeypatch):
    small = {"train": (1, 80), "test": (2, 20)}
    script = tmp_path / "small.py"
    script.write_text(f"import sys\nsys.path.insert(0, {HERE!r})\n"
                      f"import train\ntrain.TEXTURES.update({small})\ntrain.main()")
    one, two = tmp_path / "one", tmp_path / "two"
    os.makedirs(two)
    (two / "settings.json").write_text('{"seed": 1}')          # of a run that --fresh removes
    argv = f"""--objective {name} --fresh --epochs 2 --batch-size 16 --micro-batch 4 --no-probe --log-every 1
               --device cpu --out""".split()
    process = launch(*TORCHRUN, script, *argv, two)
    for split in small:
        monkeypatch.setitem(train.TEXTURES, split, small[split])
    train.main([*argv, str(one)])
    printed, _ = process.communicate()
    assert process.returncode == 0 and printed.count("step 1/10") == 1, printed
    a, b = (losses(train.read_metrics(out / "metrics.jsonl")) for out in (one, two))
    assert a == approx(b, abs=1e-4)
    assert len(a) == 10
    assert_close(*[load(out / "tokenizer.pt")["weight"] for out in (one, two)],
                 atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["mapet", "mae"])
def test_accumulated_micro_batches_are_one_batch(name, folder, tmp_path):
    flags = "--objective", name, "--micro-batch"
    one, four = (losses(run(folder, tmp_path / str(size), *flags, size)) for size in (8, 2))
    assert four == approx(one, abs=1e-4)


def read_files(folder, pattern="*"):
    return {path: path.read_bytes() for path in folder.glob(pattern) if path.is_file()}


def test_paths_may_change_but_nothing_else_of_a_run_that_began(folder, tmp_path, capsys):
    out, moved = tmp_path / "run", tmp_path / "moved"
    refused(folder, out, capsys, ["--features", "nonsense"], "nonsense")
    run(folder, out, "--steps", 2)
    shutil.copytree(folder, moved)
    for data, steps in ((folder + "/", 3), (moved, 4)):
        run(data, out, "--steps", steps)
        printed = capsys.readouterr().out
        assert f"--data {folder}" in printed
        assert f"at step {steps - 1}" in printed
    before = read_files(out)
    for flag, here, there in (("--lr", .005, .0015), ("--mask-ratio", .7, .5)):
        refused(folder, out, capsys, [flag, here], "settings.json", f"{flag} {there}", here, "--fresh")
    os.remove(moved / "train" / "ant" / "000.png")
    refused(moved, out, capsys, [], "--images 40 there, 39 here")
    refused(folder, out, capsys, ["--features", "nonsense", "--fresh"], "nonsense")
    assert before == read_files(out)
    assert len(run(folder, out, "--lr", .005, "--fresh", "--steps", 1)) == 1
    given = "--tokenizer", shutil.copy(out / "tokenizer.pt", moved), "--fresh"
    refused(folder, tmp_path / "no", capsys, [*given, "--image-size", 16], moved, "--image-size 24")
    shutil.copy(moved / "tokenizer.pt", tmp_path / "no")
    refused(folder, tmp_path / "no", capsys, ["--image-size", 16], "--image-size 24")
    (out / "tokens.npy").write_text("of the old run, too")
    run(folder, out, *given, "--steps", 1)
    assert not (out / "tokenizer.pt").exists()                                # of the old run
    other = load(moved / "tokenizer.pt")
    other["weight"] += 1
    V.save(other, "other.pt")
    refused(folder, out, capsys, ["--tokenizer", "other.pt"], "--codes")


@pytest.mark.parametrize("room", [300, 3000, 1_000_000])
def test_a_full_disk_ends_in_one_line_and_what_was_there_is_whole(room, folder, tmp_path, capsys):
    """Too little for settings.json, for tokenizer.pt, for last.pt."""
    for ds in train.open_splits(folder, 24)[:2]:
        train.keep_squares(ds)
    if room > 3000:
        run(folder, tmp_path, "--steps", 3)
    before, limits = read_files(tmp_path, "*.pt"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        refused(folder, tmp_path, capsys, [], tmp_path, "cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == read_files(tmp_path, "*.pt")
    assert not read_files(tmp_path, "*.tmp")
    assert len(run(folder, tmp_path)) == 20


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(folder, tmp_path, capsys, monkeypatch):
    loss, calls = objectives.MaPeT.loss, []

    def broken(self, *given):
        calls.append(1)
        value, logs = loss(self, *given)
        return value * (math.inf if len(calls) == 8 else 1), logs

    flags = ["--save-every", 5]
    with monkeypatch.context() as patch:
        patch.setattr(objectives.MaPeT, "loss", broken)
        refused(folder, tmp_path / "a", capsys, flags, "step 8", "not finite", "--lr")
    assert load(tmp_path / "a" / "last.pt")["step"] == 5
    assert run(folder, tmp_path / "a", *flags) == run(folder, tmp_path / "b", *flags)


def test_train_main_works_in_a_thread_and_where_stdout_is_no_file(folder, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        thread = threading.Thread(target=run, args=(folder, tmp_path, "--steps", 2))
        thread.start()
        thread.join()
    assert (tmp_path / "encoder.pt").exists()
    assert "step 2/20" in printed.getvalue()


def test_laptop_squares_are_decoded_once_for_all_runs(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make_folder(tmp_path / "d", 4)
    squares = [train.open_dataset(data, "train", 24)[i][0].numpy() for i in range(8)]
    for size in (16, 24):
        run(data, "a", "--fresh", "--image-size", size, "--steps", 1)
    assert any(np.array_equal(np.load(kept), squares) for kept in tmp_path.glob("data/squares/*.npy"))
    for path in Path(data).rglob("*.png"):                     # from now on there is nothing to decode
        time_ns = os.stat(path).st_mtime_ns
        path.write_bytes(b"gone")
        os.utime(path, ns=(time_ns, time_ns))
    run(data, "b", "--objective", "mim", "--steps", 1)
    os.utime(path)
    refused(data, "c", capsys, [], "cannot be read", ".png")


# --- data sets

def touch(root, *names):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return str(root)


BOTH = "train/a/1.png train/b/2.png "
LAYOUTS = {                                 # files: images of train, classes, images of test or why none
    BOTH + "val/a/3.png val/b/3.png": (2, "a b", 2),
    "Train/a/1.jpg Validation/a/1.jpg Validation/a/2.JPG": (1, "a", 2),
    "TRAINING/a/1.webp Valid/a/1.tif": (1, "a", 1),
    "train/a/1.png test/a/deep/er/1.png": (1, "a", 1),
    "train/a/1.png train/.ipynb_checkpoints/1.png train/a/.x/2.png train/a/._1.png val/a/1.png": (1, "a", 1),
    BOTH + "val/1.png val/2.png": (2, "a b", "class folders"),
    BOTH + "val/images/1.JPEG val/annotations.txt": (2, "a b", "class folders"),
    BOTH + "val/a/1.png": (2, "a b", "class folders"),
    BOTH + "val/a/1.png val/b/labels.csv": (2, "a b", "class folders"),
    BOTH + "images/a/3.png": (2, "a b", "no val/"),
    "1.png sub/2.jfif sub/._2.jfif .hidden/3.png": (2, "", "no labels"),
    "train/1.bmp val/2.bmp": (1, "", "no labels"),
}


@pytest.mark.parametrize("files", LAYOUTS)
def test_folders_are_found_as_people_name_them(files, tmp_path):
    ds, test, why = train.open_splits(touch(tmp_path, *files.split()), 24)
    n, classes, wanted = LAYOUTS[files]
    assert (len(ds), " ".join(ds.classes or [])) == (n, classes)
    if isinstance(wanted, str):
        assert test is None
        assert wanted in why
    else:
        assert len(test) == wanted
        assert test.classes == ds.classes


def test_what_is_left_out_is_counted(tmp_path, capsys):
    files = BOTH + "train/loose.gif train/a/x.heic train/b/y.HEIC train/b/._2.bmp"
    train.open_dataset(touch(tmp_path, *files.split()))
    taken, left_out = capsys.readouterr().out.splitlines()[0].split("left out")
    assert "2 pictures" in taken
    assert "'.heic': 2" in left_out
    assert "'.bmp': 1" in left_out


@pytest.mark.parametrize("text, classes", [
    (b"\xef\xbb\xbfbee\nant\n", ["ant", "bee"]),
    (b"\xef\xbb\xbfbee\tant\r\n", ["ant", "bee"]),
    (b" red fox \r\n\r\nant\r\nant", ["ant", "red fox"]),
])
def test_class_lists_are_read_in_every_form(text, classes, tmp_path):
    names = [f"{split}/{name}/1.png" for split in ("train", "val") for name in ("ant", "bee", "red fox")]
    data, path = touch(tmp_path, *names), tmp_path / "keep.txt"
    path.write_bytes(text)
    ds, test, _ = train.open_splits(data, 24, path)
    assert ds.classes == test.classes == classes
    assert ds.labels.tolist() == list(range(len(classes)))
    for wrong in (b"", b"cow\nant", "ant\nbee".encode("utf-16")):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="keep.txt"):
            train.open_splits(data, 24, path)


def test_cifar_is_fetched_if_it_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cifar = train.NAMED["cifar100"]
    monkeypatch.setattr(cifar, "url", "file:///nowhere/x.tar.gz")
    with pytest.raises(ValueError, match="--data cifar100"):
        train.open_dataset("cifar100")
    pixels = np.arange(6144).astype(np.uint8).reshape(2, 3072)
    files = {"train": dict(data=pixels, fine_labels=[1, 0]), "test": dict(data=pixels[1:], fine_labels=[0]),
             "meta": dict(fine_label_names=["ant", "bee"])}
    for name, content in files.items():
        path = tmp_path / "data" / cifar.base_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        monkeypatch.setattr(cifar, f"{name}_list", [[name, None]], raising=False)     # any checksum will do
    monkeypatch.setitem(cifar.meta, "md5", None)
    ds, test, _ = train.open_splits("cifar100", 32)
    assert ds.classes == ["ant", "bee"]
    for part, row, label in ((ds, pixels[0], 1), (test, pixels[1], 0)):
        for view in (part, train.keep_squares(part)):          # which are kept apart
            image, found, *_ = view[0]
            assert (image.flatten().tolist(), found) == (row.tolist(), label)


def test_names_may_be_long_and_need_not_be_utf_8(folder, tmp_path, capfd):
    data = shutil.copytree(folder, os.fsdecode(os.fsencode(tmp_path) + 50 * b"/d\xffeep"))
    odd = f"{data}/train/caf\udce9"
    os.rename(f"{data}/train/ant", odd)
    run(data, tmp_path / "a", "--steps", 1)
    assert train.open_dataset(data, "train").classes == ["bee", "caf\udce9"]
    Path(odd, "000.png").write_bytes(b"")
    refused(data, tmp_path / "b", capfd, ["--crop", .5], "/000.png")


# --- decoding

X, Y = np.meshgrid(np.arange(80) * 3, np.arange(60) * 4)
COLOR = Image.fromarray(np.stack([X, Y, 255 - X], -1).astype(np.uint8))
GRAY = COLOR.convert("L")
DEEP = np.asarray(GRAY).astype(np.uint16) * 257
NOISE = Image.fromarray(np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8))


def encode(image, form, **how):
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def difference(data, image):
    """Of what is read and an image: of each value."""
    read = train.decode_picture(data).permute(1, 2, 0).numpy().astype(int)
    return np.abs(read - np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", """PNG-1 PNG-L PNG-LA PNG-P PNG-RGBA GIF-P TIFF-CMYK TIFF-YCbCr WEBP-RGBA
                                    JPEG-L JPEG-RGB JPEG-CMYK JPEG-YCbCr""".split())
def test_every_mode_is_read_as_pil_reads_it(kind):
    form, mode = kind.split("-")
    data = encode(COLOR.convert(mode), form)
    assert difference(data, Image.open(io.BytesIO(data))).max() <= 3


WHITE = Image.new("RGB", (8, 8), "white")
RED = Image.new("RGB", (8, 8), "red")


@pytest.mark.parametrize("image, how", [
    (Image.new("RGBA", (8, 8), (9, 0, 0, 0)), dict(icc_profile=bytes(2_000_000))),
    (Image.new("LA", (8, 8), (9, 0)), {}),
    (RED.quantize(), dict(transparency=0)),
    (RED.convert("L"), dict(transparency=76)),
    (RED, dict(transparency=(255, 0, 0))),
])
def test_what_is_transparent_is_white(image, how):
    assert difference(encode(image, "PNG", **how), WHITE).max() == 0


# 2 x 2 pixels of 12 bits: 0, 4095, 2048, 1024
TWELVE = bytes.fromhex(
    "49492a000e000000000fff8004000a0000010300010000000200000001010300010000000200000002010300010000000c000000"
    "03010300010000000100000006010300010000000100000011010400010000000800000015010300010000000100000016010300"
    "010000000200000017010400010000000600000053010300010000000100000000000000")
DEEPER = {
    "png": (encode(Image.fromarray(DEEP), "PNG"), GRAY),
    "pgm": (b"P5 80 60 65535\n" + DEEP.astype(">u2").tobytes(), GRAY),
    "pgm of 10 bits": (b"P5 80 60 1020\n" + (DEEP // 257 * 4).astype(">u2").tobytes(), GRAY),
    "ppm": (b"P6 80 60 65535\n" + (np.asarray(COLOR).astype(">u2") * 257).tobytes(), COLOR),
    "tiff of 12 bits": (TWELVE, Image.fromarray(np.array([[0, 255], [128, 64]], np.uint8))),
}


@pytest.mark.parametrize("name", DEEPER)
def test_more_than_8_bits_are_scaled(name):
    assert difference(*DEEPER[name]).max() <= 1


DAMAGED = {
    "float": (encode(Image.fromarray(DEEP.astype("f4")), "TIFF"), "32 bits"),
    "int32": (encode(Image.fromarray(DEEP.astype("i4")), "TIFF"), "32 bits"),
    "jpeg": (encode(NOISE, "JPEG")[:2000], "truncated"),
    "png": (encode(NOISE, "PNG")[:5000], "truncated"),
    "jpeg 2000": (encode(NOISE, "JPEG2000")[:5000], "broken"),
    "empty": (b"", "b''"),
    "html": (b"<!DOCTYPE html>", "<!DOCTYPE"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_picture_is_refused_with_its_reason(name):
    data, reason = DAMAGED[name]
    with pytest.raises(ValueError, match=reason):
        train.decode_picture(data)


@pytest.mark.parametrize("exif", [
    b"Exif\0\0junkjunk", b"Exif\0\0II*\0\xff\xff\xff\xff",
    b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x63\0\0\0\0\0\0"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_broken_metadata_costs_no_picture(form, exif):
    assert difference(encode(COLOR, form, exif=exif), COLOR).mean() < 3


@pytest.mark.parametrize("chunk", [b"\0\0\0\0pHYs\x96\x87\x65\x63", b"\0\0\0\4tEXtjunk\0\0\0\0"])
def test_a_png_with_a_broken_chunk_is_read(chunk):
    """Too short; with a wrong checksum: behind the header, which is 33 bytes."""
    data = encode(COLOR, "PNG")
    assert difference(data[:33] + chunk + data[33:], COLOR).max() == 0


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation, undo", [(3, "ROTATE_180"), (5, "TRANSPOSE"), (6, "ROTATE_90")])
def test_pictures_are_turned_as_exif_says(form, orientation, undo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = COLOR.transpose(Image.Transpose[undo])
    assert difference(encode(turned, form, exif=exif), COLOR).mean() < 3


def test_the_square_is_cut_before_it_is_resized(tmp_path):
    picture = Image.new("RGB", (20000, 2), "blue")
    picture.paste((255, 0, 0), (9999, 0, 10001, 2))
    picture.save(tmp_path / "1.png")
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "2.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ds = train.open_dataset(str(tmp_path), "train", 224)
    for i in range(2):
        red, green, blue = ds[i][0]
        assert red.min() == 255
        assert green.max() == blue.max() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.parametrize("ending", sorted(train.PICTURES))
def test_every_ending_is_read(ending, tmp_path):
    Image.init()
    form = Image.registered_extensions()[ending]
    mode, color = ("1", 1) if form in ("MSP", "XBM") else ("RGB", (200, 30, 60))
    if form in Image.SAVE:
        image = Image.new(mode, (64, 64), color)
        image.save(tmp_path / f"x{ending.upper()}", form)
        read = train.open_dataset(str(tmp_path), "train", 32)[0][0]
        wanted = torch.tensor(image.convert("RGB").getpixel((0, 0)))
        assert (read - wanted[:, None, None]).abs().max() < 5


def test_a_damaged_picture_is_named_and_its_neighbor_stands_in(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make_folder(tmp_path / "d", 60, ["train"])
    bee, ant = Path(data, "train/bee/007.png"), Path(data, "train/ant/059.png")
    bee.write_bytes(bee.read_bytes()[:1000])
    run(data, "a", "--steps", 1)
    error = capfd.readouterr().err
    assert str(bee) in error
    tokens = np.load("a/tokens.npy")
    assert np.array_equal(tokens[67], tokens[68])
    assert not np.array_equal(tokens[66], tokens[67])
    ant.write_bytes(b"")
    for flags in (["--crop", .2], []):
        refused(data, "b", capfd, flags, "2 of 120", "more than 1 %", ant)
    assert not os.path.exists("b/last.pt")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("crop", [0, .5])
def test_errors_of_the_machine_are_not_the_pictures(number, crop, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make_folder(tmp_path / "d", 10)

    def fail(path):
        if path.name == "005.png":
            raise OSError(number, os.strerror(number), path)
        return open(path, "rb").read()
    monkeypatch.setattr(Path, "read_bytes", fail)
    refused(data, "run", capsys, ["--crop", crop], os.strerror(number), "005.png")


# --- faults

FAULTS = {                                  # flags: what the line says
    "--data missing": "missing",
    "--data empty": "empty",
    "--classes missing.txt": "missing.txt",
    "--data textures --classes file.txt": "--classes",
    "--cut 10": "cutting point 10",
    "--cut 0": "cutting point 0",
    "--mask-ratio 0": "cutting point 10",
    "--lr nan": "--lr",
    "--batch-size 9 --micro-batch 2": "--micro-batch 2",
    "--batch-size 64": "--batch-size 64",
    "--image-size 25": "25",
    "--device nonsense": "--device nonsense",
    "--compile": "--no-compile",
    "--features nonsense": "nonsense",
    "--vocab-size 70000": "70000",
    "--out file.txt": "file.txt",
    "--tokens short.npy": "short.npy",
    "--tokens far.npy": "far.npy",
    "--tokenizer file.txt": "file.txt",
    "--tokens far.npy --crop .2": "--crop 0",
    "--objective mae --tokenizer t.pt": "--tokenizer",
    "--objective vq --cut 3": "--cut",
    "--objective vqkd --vocab-size 100": "100 clusters of 72",
    "--objective mae --features hog": "hog",
}


@pytest.mark.parametrize("flags", FAULTS)
def test_bad_input_is_one_line_that_names_it(flags, folder, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")                             # without a C compiler
    here = Path(folder).parent
    os.makedirs("empty", exist_ok=True)
    Path("file.txt").write_text("<html>")
    np.save("short.npy", np.zeros((39, 9), np.uint16))
    np.save("far.npy", np.full((40, 9), 6, np.uint16))
    before = read_files(here)
    refused(folder, "run", capsys, flags.split(), FAULTS[flags])
    assert before == read_files(here)
    assert not read_files(here, "run/*.pt")


@pytest.mark.parametrize("name", ["last.pt", "settings.json"])
def test_a_file_that_is_not_what_it_should_be_is_named_and_kept(name, folder, tmp_path, capsys):
    run(folder, tmp_path, "--steps", 1)
    for content in ((tmp_path / name).read_bytes()[:200], (tmp_path / "encoder.pt").read_bytes()):
        (tmp_path / name).write_bytes(content)
        refused(folder, tmp_path, capsys, [], name)
        assert (tmp_path / name).read_bytes() == content


# --- probe.py --------------------------------------------------------------------------------

CPU = torch.device("cpu")


FEW = {"train": (1, 200), "test": (2, 60), "val": (3, 60)}       # images of the embedded data


@pytest.fixture
def few_textures(monkeypatch):
    monkeypatch.setattr(train, "TEXTURES", FEW)


@pytest.fixture
def probe_textures(few_textures):
    return train.open_dataset("textures"), train.open_dataset("textures", "test")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of train.py: two steps, and the closing table."""
    out = str(tmp_path_factory.mktemp("probe") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "TEXTURES", FEW)
        train.main(["--steps", "2", "--epochs", "1", "--vocab-size", "8", "--device", "cpu", "--out", out])
    return out


@pytest.fixture
def trained(run_folder, few_textures):
    return run_folder


@pytest.fixture(scope="module")
def probe_pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"), 12, size=(60, 80))


def probed(*argv):
    return probe.main([*map(str, argv), "--device", "cpu"])


def probe_refuses(capsys, argv, *words):
    """The command ends in one line that holds the words."""
    line = refusal(capsys, probed, *argv)
    assert all(word in line for word in words), line


def blobs(n, spread, seed=0):
    """Three clouds in 8 dimensions, and their labels."""
    generator = seeded(seed)
    y = torch.randint(3, (n,), generator=generator)
    return 4 * torch.eye(3, 8)[y] + spread * torch.randn(n, 8, generator=generator), y


def layered(n, seed=0):
    """Features (n, 3 layers, 2, 8) of which only the patch mean of the second layer knows the label."""
    x = torch.randn(n, 3, 2, 8, generator=seeded(9 + seed))
    x[:, 1, 1], y = blobs(n, .5, seed)
    return x, y


# --- reference: an equation beside its literal version ------------------------------------------------------

@pytest.mark.parametrize("k, chunk", [(1, 1), (7, 256), (20, 32)])
def test_knn_is_brute_force(k, chunk):
    x, y = blobs(150, 3.)
    asked, wanted = blobs(70, 3., seed=1)
    correct = 0
    for point, label in zip(asked, wanted):
        similarity = F.cosine_similarity(point, x)
        votes = torch.zeros(3)
        for j in similarity.argsort(descending=True)[:k]:
            votes[y[j]] += math.exp(similarity[j] / .07)
        correct += int(votes.argmax() == label)
    assert .4 < correct / 70 < 1
    assert probe.knn(x, y, asked, wanted, k, chunk=chunk) == approx(correct / 70)


def test_heads_trained_together_are_each_trained_alone():
    x, y = torch.randn(70, 3, 2, 5), torch.randint(4, (70,))
    choices = [(1, "class token", .01, .1), (3, "patch mean", .03, 1.), (2, "both", .01, 0.)]
    logits = probe.train_heads(choices, x, y, torch.arange(70), epochs=4, batch_size=16, seed=3)(x)
    parts = x[:, 0, 0], x[:, 2, 1], x[:, 1].flatten(1)
    for found, part, (_, _, lr, decay) in zip(logits, parts, choices):
        head = nn.Linear(part.shape[1], 4)
        order = seeded(3)
        for p in head.parameters():
            nn.init.zeros_(p)
        optimizer = torch.optim.AdamW(head.parameters(), lr, weight_decay=decay)
        for step in range(16):
            if step % 4 == 0:                                              # the last 6 of 70 are left out
                rows = torch.randperm(70, generator=order)
            batch = rows[16 * (step % 4):][:16]
            optimizer.param_groups[0]["lr"] = lr * .5 * (1 + math.cos(math.pi * step / 16))
            optimizer.zero_grad()
            F.cross_entropy(head(part[batch]), y[batch]).backward()
            optimizer.step()
        assert_close(found, head(part), atol=1e-5, rtol=0)


def test_features_are_class_token_and_patch_mean_of_every_block(probe_textures):
    """Standardized by the training images; the last block's after the final norm."""
    vit, features = V.vit_micro(drop_path=.5).train(), []
    vit.norm.weight.data[0] = 0                                           # one feature is constant
    x, y, test_x, test_y = probe.extract(vit, probe_textures, CPU, 0, slice(None))
    for ds, labels in zip(probe_textures, (y, test_y)):
        assert labels.tolist() == ds.labels.tolist()
        images = V.normalize(read_images(ds), ds.mean, ds.std)
        with torch.no_grad():
            outputs = [vit.embed(images)]
            for block in vit.blocks:
                outputs.append(block(outputs[-1]))
            normed = vit.norm(outputs[-1])
        pooled = [torch.stack([x[:, 0], x[:, 1:].mean(1)], 1) for x in (*outputs[1:-1], normed)]
        features.append(torch.stack(pooled, 1))
    std, mean = torch.std_mean(features[0], 0)
    for found, wanted in zip((x, test_x), features):
        assert_close(found.float(), (wanted - mean) / (std + 1e-9), atol=.02, rtol=0)
    found = probe.pool_features(vit, images, final_norm=False)
    assert_close(found[:, 3, 0], outputs[-1][:, 0])
    assert probe.pool_features(tiny(cls_token=False), torch.randn(2, 3, 24, 24)).shape == (2, 2, 1, 32)


def test_lars_by_hand():
    w = torch.tensor([[3., 4.]], requires_grad=True)
    b = torch.tensor([1.], requires_grad=True)
    optimizer = probe.LARS([w, b], lr=.5, momentum=.9)
    w.grad = torch.tensor([[.6, 0.]])
    b.grad = torch.tensor([2.])
    optimizer.step()
    # |w| = 5, |g| = .6: v = .001 * 5 / .6 * g = (.005, 0); w -= .5 v
    assert_close(w.detach(), torch.tensor([[3 - .0025, 4.]]))
    assert b.item() == 0
    w.grad = torch.zeros(1, 2)
    b.grad = torch.tensor([2.])
    optimizer.step()
    assert_close(w.detach(), torch.tensor([[3 - .0025 - .9 * .0025, 4.]]))
    assert b.item() == approx(-.5 * (.9 * 2 + 2))              # 1-D: plain momentum


def test_layer_decay_by_hand():
    model = probe.Classifier(tiny(layer_scale=.1), 4, drop_path=.2)
    assert model.encoder.blocks[1].drop_path.p == approx(.2)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["scale"], group["weight_decay"])
             for group in probe.layer_groups(model, .05, .65) for p in group["params"]}
    scales = {"encoder.cls_token": .274625, "encoder.pos_embed": .274625, "encoder.patch_embed": .274625,
              "encoder.blocks.0": .4225, "encoder.blocks.1": .65, "fc_norm": 1., "head": 1.}
    assert found.keys() == set(names.values())
    for name, (scale, decay) in found.items():                             # depth 2: L + 1 = 3
        wanted = next(scales[key] for key in scales if name.startswith(key))
        is_matrix = name.endswith("weight") and "norm" not in name
        assert (scale, decay) == (approx(wanted), .05 if is_matrix else 0), name


def test_token_mlp_is_a_bag_and_token_vit_is_not():
    tokens = torch.randint(6, (2, 9), dtype=torch.int32)
    mlp, net = (probe.token_network(name, 6, 3, 3, 0.).eval() for name in ("mlp", "vit_micro"))
    patches = F.relu(mlp.hidden(mlp.table(tokens)))                        # MaPeT Table 4, patch by patch
    assert_close(mlp(tokens)[:, 0], mlp.head(patches.mean(1)))
    assert_close(mlp(tokens), mlp(tokens.flip(1)))
    assert net(tokens).shape == (2, 1, 3)
    assert not torch.allclose(net(tokens), net(tokens.flip(1)))


# --- properties: what a wrong implementation would break ----------------------------------------------------

def chosen_head(capsys):
    """What the fast probe says: (the head that it chose, its % of the held-out images)."""
    return re.search(r"heads: (.*) \((.*) % of held-out", capsys.readouterr().out).groups()


def test_nothing_is_chosen_on_the_test_split(capsys):
    train_data, (x, y) = layered(400), layered(200, 1)
    assert probe.choose_head(*train_data, x, y) == [1]
    chosen, held_out = chosen_head(capsys)
    assert chosen.startswith("block 2, ")
    assert float(held_out) > 90
    accuracy, = probe.choose_head(*train_data, x, y.flip(0))
    assert accuracy < .6
    assert chosen_head(capsys) == (chosen, held_out)


def test_no_held_out_image_is_trained_on(capsys):
    """256 numbers tell 100 images apart: a head that had seen an image would know its random label."""
    x, y = torch.randn(100, 1, 2, 128), torch.randint(3, (100,))
    accuracy, = probe.choose_head(x, y, x, y)
    assert float(chosen_head(capsys)[1]) < 90
    assert accuracy == 1                                                   # in the end it is trained on all


class Normed(V.ViT):
    """A ViT with a buffer that moves in training mode."""

    def embed(self, images, order=None):
        return self.norm1d(super().embed(images, order).mT).mT


@pytest.mark.parametrize("argv", ["knn", "linear --epochs 1", "linear --protocol mae --epochs 1", "show",
                                  "linear --protocol beit --epochs 1 --batch-size 100"])
def test_no_probe_changes_a_frozen_encoder(argv, few_textures, tmp_path, monkeypatch):
    """Neither weights nor buffers, even if it comes in training mode."""
    vit = Normed(image_size=48, patch_size=16, width=32, depth=1, heads=2, drop_path=.5).train()
    vit.norm1d = nn.BatchNorm1d(32)
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    monkeypatch.setattr(probe, "from_weights", lambda *how: vit)
    what, *flags = argv.split()
    probed(what, "any.pt", *flags, "--out", tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    assert (tmp_path / ("show.png" if what == "show" else "probe.jsonl")).exists()


def test_heads_are_float32_under_autocast():
    images, vit = torch.randn(4, 3, 24, 24), tiny()
    mae, beit = probe.LinearProbe(vit, 5, True), probe.LinearProbe(vit, 5, False)
    for model in (mae, beit, probe.Classifier(tiny(), 5)):
        with torch.autocast("cpu", torch.bfloat16):
            assert model(images).dtype == torch.float32
    assert beit(images).shape == (4, 2, 5)
    assert_close(mae.eval()(images)[:, 0], mae.heads(vit(images)[:, 0]))   # of the class token
    assert len(beit.state_dict()) == 4                                     # two heads, and no encoder


def test_recipes_of_the_papers():
    """MaPeT Table 8 and Sec. D, by BEiT; MAE App. A.1, which ClusterMIM follows."""
    def values(recipe, keys):
        return [recipe[key] for key in keys.split()]
    mae, beit = probe.PROTOCOLS["mae"], probe.PROTOCOLS["beit"]
    wanted = [.1, 16384, 90, 10, 0]
    assert values(mae, "base_lr batch_size epochs warmup_epochs weight_decay") == wanted
    wanted = [4e-3, 1024, 50, 1e-4, "bilinear"]
    assert values(beit, "lr batch_size epochs weight_decay interpolation") == wanted
    for width, *wanted in ((192, 2.5e-4, 300, 1), (384, 5e-3, 200, .65), (768, 5e-4, 100, .65)):
        recipe = probe.RECIPES["mapet"] | probe.BY_WIDTH.get(("mapet", width), {})
        assert values(recipe, "lr epochs layer_decay") == wanted
        assert values(recipe, "warmup_epochs warmup_lr cosine test_crop") == [20, 1e-6, "start", .9]
    base = probe.RECIPES["mae"]
    large = base | probe.BY_WIDTH["mae", 1024]
    assert values(base, "base_lr epochs layer_decay drop_path head_std") == [5e-4, 100, .65, .1, 2e-5]
    assert values(large, "base_lr epochs layer_decay drop_path") == [1e-3, 50, .75, .2]
    for recipe in (base, large, probe.RECIPES["mapet"]):
        wanted = [.8, .1, .25, 9, .05]
        assert values(recipe, "mixup smoothing erase randaugment weight_decay") == wanted


def test_pictures_of_the_papers(probe_pictures):
    """Test pictures are the center 224 of 256, MaPeT's after fine-tuning of 248; trained on: random crops."""
    ds = train.open_dataset(probe_pictures, "test", 56)
    assert (ds.mean, ds.std) == ((.485, .456, .406), (.229, .224, .225))   # ImageNet's
    args = argparse.Namespace(**probe.RECIPES["mapet"], seed=0, data="pictures")
    for crop, larger in ((.875, 64), (.9, 62)):
        args.test_crop = crop
        with Image.open(ds.paths[0]) as image:
            square = image.crop((10, 0, 70, 60)).resize((larger, larger), Image.Resampling.BICUBIC)
        first = (larger - 56) // 2
        wanted = np.asarray(square, float)[first:first + 56, first:first + 56].transpose(2, 0, 1)
        assert np.abs(probe.test_view(ds, args)[0][0].numpy() - wanted).mean() < 1
    strong = probe.training_view(ds, args)
    augment, = strong.transform.transforms[3].transforms
    assert augment.magnitude == 27                             # timm's m9, of 31
    images = torch.stack([strong[epoch, 0][0] for epoch in (0, 0, 1)])
    assert images.shape == (3, 3, 56, 56)
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


# --- commands -----------------------------------------------------------------------------------------------

def test_knn_repeats_the_closing_table(trained, capsys):
    """Of the run's folder and of its file."""
    summary = train.read_metrics(f"{trained}/metrics.jsonl")[-1]
    found = probed("knn", trained)
    assert found["knn"] == summary["knn"]
    assert f"knn {100 * summary['knn']:.1f} % (" in capsys.readouterr().out
    assert train.read_metrics(f"{trained}/probe.jsonl")[-1] == found
    assert probed("knn", f"{trained}/encoder.pt")["knn"] == summary["knn"]


def test_the_name_of_a_size_is_an_untrained_network(trained, tmp_path, monkeypatch, capsys):
    """That of the closing table; its results go where those of other names go; of any size that is asked."""
    summary = train.read_metrics(f"{trained}/metrics.jsonl")[-1]
    monkeypatch.chdir(tmp_path)
    assert probed("knn", "vit_micro")["knn"] == summary["knn_random"]
    assert probed("linear", "vit_micro", "--image-size", 24, "--seed", 1, "--epochs", 1)["linear"] < .4
    assert [line["seed"] for line in train.read_metrics("runs/vit_micro/probe.jsonl")] == [0, 1]
    probe_refuses(capsys, ["knn", "vit_nano"], "vit_nano", "such file")


def test_linear_protocols(trained, tmp_path, monkeypatch, capsys):
    """What they report; how often the encoder runs, which is what "fast" saves; their own file names."""
    seen, pool_features = [], probe.pool_features

    def counted(vit, images, *how, **more):
        seen.append(len(images))
        return pool_features(vit, images, *how, **more)
    monkeypatch.setattr(probe, "pool_features", counted)
    same = ["--out", tmp_path, "--epochs", 2]
    probed("linear", trained, *same)
    assert sum(seen) == 260
    assert chosen_head(capsys)[0].startswith("block ")
    beit = probed("linear", trained, *same, "--protocol", "beit", "--batch-size", 50)
    assert sum(seen) == 260 + 2 * 200 + 60
    assert beit["heads"][-1] == beit["linear"]
    assert " ".join(f"{100 * accuracy:.1f}" for accuracy in beit["heads"]) in capsys.readouterr().out
    probed("linear", trained, *same, "--protocol", "mae")
    saved = load(tmp_path / "linear-mae-textures.pt")["model"]
    wanted = "0.num_batches_tracked 0.running_mean 0.running_var 1.bias 1.weight"
    assert sorted(saved) == [f"heads.{name}" for name in wanted.split()]
    lines = train.read_metrics(tmp_path / "probe.jsonl")
    assert [line["protocol"] for line in lines] == ["fast", "beit", "mae"]


def test_finetune_resumes_exactly_and_keeps_its_head(trained, tmp_path, capsys):
    how = ["--batch-size", 40]
    whole = probed("finetune", trained, *how, "--epochs", 2, "--out", tmp_path / "whole")
    with pytest.raises(SystemExit) as stop:
        probed("finetune", trained, *how, "--epochs", 2, "--out", tmp_path / "parts", "--steps", 2)
    assert not stop.value.code
    assert "step 2 of 10" in capsys.readouterr().out
    probed("finetune", trained, *how, "--epochs", 2, "--out", tmp_path / "parts")
    files = [tmp_path / name / "finetune-textures-textures.pt" for name in ("whole", "parts")]
    a, b = (load(file)["model"] for file in files)
    assert all(torch.equal(a[key], b[key]) for key in a)                   # bit for bit
    again = ["finetune", trained, *how, "--out", tmp_path / "parts"]
    probe_refuses(capsys, [*again, "--epochs", 3], "finetune-textures-textures.json", "--epochs", "--fresh")
    state = load(f"{trained}/encoder.pt")
    shutil.copytree(trained, tmp_path / "other")
    torch.save({key: value + .1 for key, value in state.items()}, tmp_path / "other" / "encoder.pt")
    again[1] = tmp_path / "other"
    probe_refuses(capsys, [*again, "--epochs", 2], "finetune-textures-textures.json", "--weights", "--fresh")
    kept = probed("finetune", files[0], "--epochs", 0, "--out", tmp_path)
    assert kept["finetune"] == whole["finetune"]


def test_a_head_of_other_classes_is_not_taken_for_this_data(trained, probe_pictures, tmp_path, capsys):
    """Two folders of one name and size: checkpoint and tokens of the first are not those of the second."""
    other = shutil.copytree(probe_pictures, tmp_path / "b" / Path(probe_pictures).name)
    for split in ("train", "val"):
        os.rename(other / split / "ant", other / split / "cow")
    how = ["--epochs", 1, "--out", tmp_path, "--data"]
    for command in ("linear", trained, "--protocol", "beit"), ("tokens", trained):
        probed(*command, *how, probe_pictures)
        probe_refuses(capsys, [*command, *how, other], ".json", "--labels", "--fresh")
    assert len(list(tmp_path.glob("tokens-*.npy"))) == 4


def test_released_networks_are_scored_by_their_own_head(trained, tmp_path, capsys):
    """MaPeT's layout: q apart from k and v, fc_norm and head; other classes are refused."""
    model = probe.Classifier(V.vit_micro(), 10, head_std=1.)
    state = split_qkv(model.state_dict(), bias=False)
    state = {key.removeprefix("encoder."): value for key, value in state.items()}
    torch.save({"state_dict": state}, tmp_path / "mapet.tar")
    ds = train.open_dataset("textures", "test")
    images = V.normalize(read_images(ds), ds.mean, ds.std)
    with torch.no_grad():
        right = model.eval()(images)[:, 0].argmax(1) == torch.tensor(ds.labels)
    argv = ["finetune", tmp_path / "mapet.tar", "--epochs", 0, "--out", tmp_path]
    assert probed(*argv)["finetune"] == approx(right.float().mean().item(), abs=.02)
    no_head = ["finetune", f"{trained}/encoder.pt", *argv[2:]]
    probe_refuses(capsys, no_head, "encoder.pt", "--epochs 0", "fc_norm")
    state["head.weight"], state["head.bias"] = state["head.weight"][:7], state["head.bias"][:7]
    torch.save({"state_dict": state}, tmp_path / "mapet.tar")
    probe_refuses(capsys, argv, "mapet.tar", "head for the classes")


def test_strong_augmentation_trains(probe_pictures, tmp_path):
    """MAE's recipe with MixUp, CutMix, RandAugment and erasing, on files; its rate is per 256 images."""
    torch.save(V.vit_micro().state_dict(), tmp_path / "encoder.pt")
    argv = ["--data", probe_pictures, "--recipe", "mae", "--workers", 0, "--epochs", 1, "--batch-size", 12]
    with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as loss:
        probed("finetune", tmp_path / "encoder.pt", *argv, "--out", tmp_path)
    assert loss.call_args.kwargs == {"label_smoothing": .1}
    optimizer = load(next(tmp_path.glob("finetune-mae-*.pt")))["optimizer"]
    rates = [group["lr"] / group["scale"] for group in optimizer["param_groups"]]
    assert 1e-6 < max(rates) <= 5e-4 * 12 / 256


def test_tokens_alone(trained, tmp_path):
    """Of a run, whose tokenizer makes them, or of a tokenizer: the same tokens, the same result."""
    how = ["--epochs", 2, "--batch-size", 50, "--out"]
    found = probed("tokens", trained, *how, tmp_path)
    made = {len(tokens): tokens for tokens in map(kmeans.load_tokens, tmp_path.glob("tokens-*.npy"))}
    assert np.array_equal(made[200], kmeans.load_tokens(f"{trained}/tokens.npy"))
    again = probed("tokens", f"{trained}/tokenizer.pt", *how, f"{tmp_path}/again")
    assert again["tokens"] == found["tokens"]
    other = kmeans.load_tokenizer(f"{trained}/tokenizer.pt")
    other.weight = other.weight.flip(0)
    other.save(f"{tmp_path}/other")
    probed("tokens", f"{tmp_path}/other", "--head", "vit_micro", *how, tmp_path)
    assert len(list(tmp_path.glob("tokens-*.npy"))) == 4                   # its tokens are its own


def test_compare_groups_runs_by_what_they_did(tmp_path, capsys):
    """Seeds of one setting are a group, whatever their folders are called; differences are paired by seed."""
    def write(name, seed, linear, steps=2, **settings):
        (tmp_path / name).mkdir()
        settings["seed"] = seed
        end = dict(summary=True, step=2, steps=steps, seed=seed,
                   linear=linear, knn=.25, settings=settings)
        (tmp_path / name / "metrics.jsonl").write_text(f"{json.dumps(end)}\n")
    write("a", 0, .5, cut=1)
    write("b", 1, .7, cut=1)
    write("c", 1, .8, cut=2)
    write("d", 0, .58, cut=2)
    write("e", 0, .9, steps=3, cut=2)
    write("f", 1, .6, cut=3)
    probed("compare", *[tmp_path / name for name in "abcdef"])
    out = capsys.readouterr().out
    rows = [re.split("  +", line.strip()) for line in out.splitlines() if "left out" not in line]
    a, c, f = (str(tmp_path / name) for name in "acf")
    assert rows[2:7] == [
        [a, "2", "25.0 ± 0.0", "60.0 ± 14.1"], [c, "2", "25.0 ± 0.0", "69.0 ± 15.6"],
        [f"minus {a}", "2", "0.0 ± 0.0", "9.0 ± 1.0"],                    # 8 and 10
        [f, "1", "25.0", "60.0"], [f"minus {a}", "1", "0.0", "-10.0"]]    # of one seed there is no deviation
    assert f"{tmp_path / 'e'}: left out, it stopped at step 2 of 3" in out
    probed("compare", tmp_path / "e")                                      # nothing is left to compare
    assert "left out" in capsys.readouterr().out


DRIVER = """
import sys
import torch.distributed as dist
sys.path.insert(0, {here!r})
import probe, train
train.TEXTURES = {textures!r}
end, dist.destroy_process_group = dist.destroy_process_group, list                # one group for all commands
for argv in {commands!r}:
    probe.main(argv)
end()
"""


def test_two_processes_give_the_result_of_one(trained, tmp_path, monkeypatch):
    """An odd number of test images, so that a padded or a lost one would show."""
    few = {"train": (1, 99), "test": (2, 61)}
    monkeypatch.setattr(train, "TEXTURES", few)
    commands = [["knn"], ["linear", "--epochs", "1"], ["finetune", "--epochs", "1"]]
    one, two = ([[what, trained, *more, "--device", "cpu", "--out", str(tmp_path / out)]
                 for what, *more in commands] for out in ("one", "two"))
    for argv in one:
        probe.main(argv)
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(here=HERE, textures=few, commands=two))
    process = launch(*TORCHRUN, driver)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    one, two = (train.read_metrics(tmp_path / out / "probe.jsonl") for out in ("one", "two"))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        for line in (a, b):                                                # of 61 images, each counted once
            assert line[line["what"]] * 61 == approx(round(line[line["what"]] * 61))
        assert a[a["what"]] == approx(b[a["what"]], abs=.04)        # a near-tie may fall otherwise


# --- faults -----------------------------------------------------------------------------------------------

def test_wrong_input_is_refused_in_one_line(trained, probe_pictures, tmp_path, capsys):
    probe_refuses(capsys, ["knn", tmp_path / "no.pt"], "no.pt", "such file")
    probe_refuses(capsys, ["linear", trained, "--data", f"{probe_pictures}/train/ant"], "--data", "labels")
    for flag, value in (("--lr", -1), ("--heads", 0), ("--epochs", 0)):
        probe_refuses(capsys, ["linear", trained, flag, value], flag)
    probe_refuses(capsys, ["finetune", trained, trained], "takes one RUN")
    torch.save(tiny(width=40, heads=5, image_size=48).state_dict(), tmp_path / "wide.pt")
    probe_refuses(capsys, ["knn", tmp_path / "wide.pt", "--out", tmp_path], "wide.pt", "--heads")
    assert probed("knn", tmp_path / "wide.pt", "--out", tmp_path, "--heads", 5)["knn"] >= 0
    assert not list(tmp_path.glob("finetune*"))


# --- README.md, results/README.md, and how the files hang together ----------------------------------------


ROOT = Path(__file__).parent
PAGES = ["README.md", "results/README.md"]
IMPORTS = {
    "vit": [],
    "kmeans": ["vit"],
    "tcas": [],
    "objectives": ["vit"],
    "train": ["kmeans", "objectives", "tcas", "vit"],
    "probe": ["kmeans", "train", "vit"]}
PACKAGES = {"torch", "torchvision", "numpy", "einops", "tqdm", "matplotlib", "triton", "PIL", "filelock"}


def list_commands(page):
    """Every command of ours in a page: in fenced blocks, loops expanded by a shell, and in code spans.

    The shell is a restricted one: what a page shows as output, "5 -> 3", writes no file "3".
    """
    text = (ROOT / page).read_text()
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        block = re.sub(r"^(#|python3|srun|>).*$|^timm.*$", "", block, flags=re.M)
        if "python " in block or "torchrun " in block:
            shadow = 'python() { printf "%q " "$@"; echo; }; torchrun() { shift 2; python "$@"; }\n'
            shell = subprocess.run(["bash", "-rc", shadow + block], capture_output=True, text=True)
            yield from shell.stdout.splitlines()
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for span in re.findall(r"`((?:python|torchrun --nproc_per_node \d) \w+\.py[^`]*)`", text):
        yield span.split(" ", 3 if span.startswith("torchrun") else 1)[-1]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_parses(page):
    parsed = 0
    for line in list_commands(page):
        script, *argv = shlex.split(line, comments=True)
        module = sys.modules.get(script[:-3])
        if module and hasattr(module, "parse"):
            assert module.parse(argv), line
            parsed += 1
    assert parsed > 15


def test_the_map_from_the_papers_names_code_and_tests_that_exist():
    text = (ROOT / "README.md").read_text()
    rows = [line for line in text.splitlines() if "`test_" in line]
    here = Path(__file__).read_text()
    assert len(rows) > 20
    for row in rows:
        for name in re.findall(r"`((?:vit|kmeans|tcas|objectives|train|probe)\.[A-Za-z0-9_.]+)", row):
            assert pkgutil.resolve_name(name), name
        for name in re.findall(r"`(test_\w+)`", row):
            assert f"def {name}(" in here, name


@pytest.mark.parametrize("page", PAGES)
def test_pictures_and_links_of_a_page_exist(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / page).read_text()):
        assert (folder / target).exists(), target


def test_the_python_example_runs():
    block, = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    names = {}
    exec(block, names)
    assert names["loss"].item() > 0
    assert names["tokens"].shape == (64, 36)


@pytest.mark.parametrize("name", IMPORTS)
def test_files_import_what_the_design_allows(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())

    def list_modules(nodes):
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                yield node.module.split(".")[0]
            elif isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)

    assert set(list_modules(tree.body)) & set(IMPORTS) == set(IMPORTS[name])
    anywhere = set(list_modules(ast.walk(tree)))
    assert anywhere <= PACKAGES | set(IMPORTS) | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", IMPORTS)
def test_functions_fit_a_screen(name):
    text = (ROOT / f"{name}.py").read_text()
    assert max(map(len, text.splitlines())) <= 110
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < (90 if node.name == "train" else 60), node.name


# --- the course: exercises, hand-outs, points -------------------------------------------------------------

Exercise = collections.namedtuple("Exercise", "title minutes points functions tests sheet")
EXERCISES = {
    1: Exercise("K-means: assign and update", 40, 2, "kmeans.lloyd", "lloyd tol_says", """
ClusterMIM Sec. 3.2: `t(x) = argmin_k ||x - c_k||^2`, then `c_k = mean of the rows with t(x) = k`.
**Predict first.** Two centroids start at the same place: where are they next? Can a pass raise the inertia?
1. `add_up` assigns: sums, counts n_k. `compute_moments`: mean, scatter sum ||x - mean||^2. Show: inertia =
   scatter - sum_k n_k ||m_k - mean||^2 + sum_k n_k ||m_k - c_k||^2, m_k the mean of cluster k.
2. Update: the means; `split_empty`, a step of 1/100 standard deviation of a column, where no row is; unit
   length for cosine. n_iter updates take n_iter + 1 assignments: return counts of the centroids returned.
**Two questions.**
    import torch, kmeans
    x = torch.randn(8, 2)[torch.randint(8, (4000,))] * 4 + torch.randn(4000, 2)
    for _ in range(5): print(kmeans.lloyd(x, x[torch.randperm(4000)[:8]], 100)[2][-1])
1. There are 8 groups and 8 centroids. Why do the five sums differ, and do 1000 passes help?
2. Take 16, 32 and 64 centroids. How does the sum fall, and can it say how many groups there are?"""),
    2: Exercise("K-means: seeds by k-means++", 45, 2, "kmeans.kmeans_plusplus", "plusplus", """
Arthur & Vassilvitskii 2007. With D_i from row i to the nearest seed so far, the next seed is row i with
probability `D_i^2 / sum_j D_j^2`. *Greedy*: of 2 + ln k such rows keep the one that leaves the least sum.
**Predict first.** Six tight groups, six seeds: how often does each get one by chance (6! / 6^6)? And here?
1. Squared distances: ||a||^2 + ||b||^2 - 2 a.b, never below 0; 0 from a seed to itself.
2. All draws: `torch.rand(k, 2 + int(math.log(k)), generator=generator, dtype=torch.float64)`, a line a seed.
   The first seed: row int(u m), u the first of line 0. Then each u of a line draws the first row where the
   running sum of D^2, in float64, is greater than u times all of it.
**Two questions.**
    import torch, kmeans
    x = (torch.arange(6.)[:, None] * 100 + torch.randn(6, 50)).reshape(300, 1)
    for draw in (lambda: torch.randperm(300)[:6], lambda: kmeans.kmeans_plusplus(x, 6)):
        print(sum(len((x[draw(), 0] / 100).round().unique()) == 6 for _ in range(500)))
1. Groups 5 apart (both 100 become 5): which loses more? And if you keep any trial instead of the best?
2. Put one row at 10,000. How often is it a seed, greedy or not? Is that good?"""),
    3: Exercise("Patches and positions", 40, 2, "vit.patchify vit.unpatchify vit.sincos_positions",
                "row_column_channel sincos", """
ViT Eq. 1, MAE's code. A patch is p x p pixels, p p 3 values, line by line. Its position is added: half of it
for the column i, half for the row i, of sin(i w_j), then cos(i w_j), w_j = 10000^(-j / J), j < J = width / 4.
**Predict first.** Does the dot product of two positions hang on where they are, or only on their distance?
1. `patchify`, `unpatchify`: a line each by `einops.rearrange`. A convolution's weights have another order.
2. `sincos_positions`: one axis, (grid, width / 2), in float64; columns and rows; `prefix` zeros in front.
**Two questions.**
    import torch, vit
    pos = vit.sincos_positions(14, 64, prefix=0)[0]
    print((pos @ pos.T)[7 * 14 + 7].view(14, 14).round().int())
    net, images, order = vit.vit_micro(), torch.randn(1, 3, 48, 48), torch.randperm(36)[None]
    print((net(images)[0, 1:][order[0]] - net.encode(net.embed(images, order))[0, 1:]).abs().max())
1. Which neighbors does the first print call alike, and what changes with 10 or 1e8 for 10000?
2. The patches come in another order. Why is the second number nearly 0? And if positions did not?"""),
    4: Exercise("Attention with rows that only ask", 45, 3, "vit.Attention.forward",
                "attention_with last_rows_only", """
`head(x)_i = sum_j softmax_j(q_i . k_j / sqrt(width of a head)) v_j` over keys j that row i may see (Vaswani
et al. 2017, Eq. 1). Rows from `n_keys` on only ask, no row looks at them: MaPeT's second stream (Eq. 3).
**Predict first.** Remove a row that only asks. Do outputs of the others change? And if you remove a key?
1. Split weight and bias of `qkv` in three, q, k and v into heads; a softmax; heads back together; `proj`.
2. Keys and values of the first n_keys rows, queries and lines of the mask of the last n_out: no other work.
**Two questions.**
    import timeit, torch, vit
    attention, x = vit.Attention(192, 3).requires_grad_(False), torch.randn(8, 2000, 192)
    for rows in (250, 500, 1000, 2000):
        print(rows, [timeit.timeit(lambda: attention(x[:, :rows], n_keys=n), number=9) for n in (rows, 125)])
1. How does the time grow with the rows if all are keys, if 125 are? From where on does softmax take most?
2. A line of the mask is all False: what comes out, with which gradient? Why never in MaPeT and PIM?"""),
    5: Exercise("The mask of two streams", 60, 3, "objectives.two_stream_mask", "stream_mask", """
MaPeT Eq. 3 and Fig. 2. Keys, in the order z: visible rows, content of targets, mask tokens (positions of
targets). Rows: the same, then a query for each target. PIM has no mask tokens. All see visible rows, and
    content of target i    sees the content of targets <= i, the positions of targets > i
    query of target i      sees the content of targets < i, the positions of targets >= i
    all others             see the positions of all targets, as in MIM
**Predict first.** On paper: 2 visible rows, 3 targets. Which lines are equal? How many keys does a row see?
1. PIM: 8 rows, 5 keys, lower triangles. MaPeT: 11 rows, 8 keys; a row sees each target once.
**Two questions.** Two minutes each on two CPU cores. `python objectives.py mapet` draws what you made.
    for o in mapet pim; do python train.py --objective $o --steps 600 --no-probe --out runs/$o; done
1. Let queries see the content of their own targets: what of the loss? Which tests notice (`-k leaks`)?
2. Mend it. PIM knows where its target is, and no other. Whose loss is lower, and since which step?"""),
    6: Exercise("MIM, PIM and MaPeT from one forward", 60, 3, "objectives.MaPeT.predict",
                "permuted_rows mim_equals target_leaks first_query", """
MaPeT Eqs. 1 and 2, with z an order of the patches, c the cutting point, m_j = mask token + position j:
    PIM     sum_{i >= c} log p(t_{z_i} | x_{z_<i})
    MaPeT   sum_{i >= c} log p(t_{z_i} | x_{z_<i}, m_{z_>=i})        MIM: no content of predicted targets
**Predict first.** 36 patches, c = 19: how many rows and keys has each of the three? What of their time?
1. `self.split` gives visible and hidden patches, in the order z; `vit.embed(images, patches)` class token and
   these. The docstring of the class has the rows; queries begin as mask tokens do. Then `vit.encode`.
**Two questions.** One minute, then four on two CPU cores:
    for o in mim pim mapet; do python train.py --objective $o --cut 19 --steps 150 --no-probe; done
    for c in 2 19 34; do python train.py --cut $c --steps 400 --no-probe --out runs/cut$c; done
1. Are the images per second of the three (their last line) as you predicted? What else takes time?
2. Three cutting points: is a low loss a good sign here? Say what one target knows with each of them."""),
    7: Exercise("The masked autoencoder and its token head", 60, 4,
                "objectives.MaskedAutoencoder.predict objectives.Objective.loss",
                "autoencoders_equal hidden_pixel untrained_loss", """
ClusterMIM Sec. 3.2: MAE, but what is predicted at a hidden patch is its token t(x), and not its pixels:
    latent = encoder([cls ; visible patches + pos])
    logits = decoder([W latent ; mask tokens] + pos)           at the mask tokens; pos of cls is 0
    loss   = - mean over hidden patches of log softmax(logits)[t(x)]
**Predict first.** The loss of an untrained network, K = 64? Of one that has learned how frequent tokens are?
1. W: `self.decoder_embed`; the decoder's pos: `self.pos`. Return predictions and `self.compute_target` in z.
2. `Objective.loss`: the mean over the targets, and accuracy, or `explained`. Should these have a gradient?
**Two questions.** A minute each on two CPU cores:
    run() { python train.py --objective clustermim --steps 600 --no-probe --out runs/$1 ${@:2}; }
    for k in 8 64 512; do run k$k --vocab-size $k; done
    for r in .4 .75 .95; do run r$r --mask-ratio $r; done
1. Can losses of different K be compared? Say what you compare instead, and where more tokens do not help.
2. What do images per second and loss do as more is hidden? Which encoder is better (`probe.py linear`)?"""),
    8: Exercise("TCAS, a score of tokenizers", 45, 3, "tcas.tcas_terms", "test_tcas", """
ClusterMIM Eq. 8. R[k, c]: how many patches of class c have token k; R': its rows, of norm 1; C = R' R'^T.
`TCAS = 1/K sum_i (1 - C_ii)^2 + 1/K^2 sum_{i != j} C_ij^2`, before any training.
**Predict first.** What is TCAS of labels as tokens? Of random ones, K = 64? Of one token for every patch?
1. R' in float64, by the norm that is asked for, without codes that no patch has. K: how many are left.
2. Both terms: impurity, confusion. Then without C, which is (K, K): R'^T R' has the same sum of squares.
**Two questions.** Two minutes:
    for p in .1 9; do python -c "from tcas import *; print(tcas(torch.poisson($p * torch.ones(99, 9))))"; done
    for k in 16 64 256; do python kmeans.py fit --k $k --out runs/k$k; done
    python tcas.py score --tokenizer runs/k16/tokenizer.pt runs/k64/tokenizer.pt runs/k256/tokenizer.pt
1. Random tokens, p patches a cell of R: why is TCAS low where p is small? What of large K?
2. Does TCAS fall because a larger codebook is better, or for another reason? Find the number that tells."""),
    9: Exercise("A graph, and a claim to refute", 180, 5, "tcas.augmentation_graph tcas.closed_form",
                "app_b algebra toy_numbers test_ring beats_mae", """
ClusterMIM Eq. 4, Secs. 2.1, 2.2. M(x1, x2) draws two views; those that may have the same token S are linked:
    M(x, S)  = sum of M(x, x2) over x2 in S        A(x, x') = sum_S M(x, S) M(x', S) / d(S)
    d(S) = sum_x M(x, S),  d(x) = sum_x2 M(x, x2)    normalized: A(x, x') / sqrt(d(x) d(x'))
Sec. 2.2: tokens of classes raise weights inside a class above those of MAE, where each point is a token.
**Predict first.** Two classes of 10 points share 2. Do MAE's tokens link points of different classes?
1. `augmentation_graph`: a matrix product and a division. All of A adds up to 1.
2. `closed_form`, with pencil and paper: A by the matrix T of the docstring. mu for MAE (kappa = 1 - C overlap
   / (2 n)); for labels as tokens, shared points half and half; for two tokens, each half of every class. Then
   w_in, w_x; sum, of squared eigenvalues; alpha: linked views have different labels (shared: each with 1/2).
**Two questions.** A few seconds:
    python tcas.py toy --n 10 --overlap 2 --n-classes 2
    python tcas.py toy --n 12 --ring 1
1. Whose mu is larger? Draw 1000 tokenizers (`tcas.toy_model`): has any more weight in a class than MAE's?
2. In the ring, views are neighbors. What do class-wise tokens win there, not above? And if it is wider?"""),
    10: Exercise("A run that goes on exactly", 90, 4, "train.schedule train.load_checkpoint",
                 "schedule should_be goes_on_equals", """
A killed run goes on as if it had not been, bit for bit: step s hangs on (seed, s) and what step s - 1 left.
**Predict first.** It goes on after step 7 with a new AdamW. Which loss is the first to differ, 8 or 9?
1. `schedule`: epoch and place from s; a generator for each epoch, by `derive_seed`; then the micro-batches.
2. `load_checkpoint` reads what `fit` saves. No file: step 0; of another kind: ValueError that names it. When
   all have read (`barrier`), rank 0 drops later lines of `metrics` (`read_metrics`, `write_atomically`).
**Two questions.** Half a minute:
    for s in 20 40; do python train.py --steps $s --log-every 1 --no-probe --out runs/parts; done
    python train.py --steps 40 --log-every 1 --no-probe --out runs/whole
    diff <(cut -d, -f1-4 runs/whole/metrics.jsonl) <(cut -d, -f1-4 runs/parts/metrics.jsonl) && echo equal
1. Leave out the optimizer's state, remove runs/parts, do it again. Where do the losses part? Do they meet?
2. What takes the room in `runs/whole/last.pt`? Compare it with `encoder.pt`: what is each part for?"""),
    11: Exercise("For the fast: K-means on many processes", 60, 4, "kmeans.add_up kmeans.sample_rows",
                 "slow_lloyd streams kmeans_of_two", """
Each process has its own rows; all are to end with the same centroids. Sums and counts move, rows do not.
**Predict first.** How many bytes does a process send in a pass, K = 100, d = 768? What are 3 million rows?
1. `add_up`: `find_nearest` by the `linear_layer` for each of `blocks`. Sums in a fixed order, unlike a GPU's
   `index_add_`: rows sorted by label, then `F.embedding_bag`. One `all_reduce`, at the end: why?
2. `sample_rows`: `torch.randperm` of all rows, rank 0's first (`compute_moments`: start); of others', zeros.
**Two questions.** A minute:
    for n in 1 2; do torchrun --nproc_per_node $n kmeans.py fit --out runs/p$n; done
    python -c "import torch; print([torch.load(f'runs/p{n}/tokenizer.pt')['weight'].sum() for n in '12'])"
1. Are the two codebooks equal to the last bit? If not, which sum is another? Does a second run repeat?
2. Drop the `all_reduce` of `add_up`. Which test notices? What would a user see who has no test?"""),
}

# From these words on a docstring gives an answer away: a hand-out has what is before.
HIDDEN = {"two_stream_mask": "keys (columns) ", "closed_form": "mae   ", "tcas_terms": "Few patches"}

# Wrong answers that look right: what stands in a function, what a student might write. No hand-out has them.
WRONG = {
    "kmeans.lloyd": [(" - (means - c).square()", ""), ("range(n_iter + 1)", "range(n_iter)")],
    "kmeans.kmeans_plusplus": [("closest.double()", "closest.sqrt()"), ("distances.sum(1).argmin()", "0")],
    "vit.unpatchify": [("(p q c)", "(c p q)")], "vit.sincos_positions": [("[column, row]", "[row, column]")],
    "vit.Attention.forward": [("x[:, :n_keys]", "x"), ("mask[-n_out:]", "~mask[-n_out:]")],
    "objectives.two_stream_mask": [("target - 1]", "target]"), ("target > limit", "target > 0 * limit")],
    "objectives.MaPeT.predict": [("self.mask_token + ", ""), ("tokens, hidden", "tokens, hidden.flip(1)")],
    "objectives.MaskedAutoencoder.predict": [("[visible, hidden]", "[hidden, visible]")],
    "objectives.Objective.loss": [("target.flatten())", "target.flatten(), reduction='sum')")],
    "tcas.tcas_terms": [(" - c_ii.square().sum()", ""), ("[counts.sum(1) > 0]", "")],
    "tcas.augmentation_graph": [("to_token / to_token.sum(0)", "to_token")],
    "tcas.closed_form": [("kappa ** 2, ", "kappa, ")],
    "train.schedule": [("derive_seed(seed, epoch)", "seed")],
    "train.load_checkpoint": [('optimizer.load_state_dict(state["optimizer"])', "pass")],
    "kmeans.add_up": [("counts += sizes", "counts = sizes")], "kmeans.sample_rows": [(" - start]", "]")],
}

for name, value in list(globals().items()):                    # pytest -k exercise_03 finds the tests of it
    for number, exercise in EXERCISES.items():
        if name.startswith("test_") and any(words in name for words in exercise.tests.split()):
            setattr(value, f"exercise_{number:02}", True)


def remove_answer(text, name, number):
    """A text in which the function or Class.method `name` is to be done: its signature and docstring stay."""
    node = ast.parse(text)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    doc, lines = node.body[0], text.splitlines(True)
    indent = " " * doc.col_offset
    shown = "".join(lines[doc.lineno - 1:doc.end_lineno])
    if HIDDEN.get(node.name, "nothing is hidden") in shown:
        shown = f'{shown.partition(HIDDEN[node.name])[0].rstrip()}\n{indent}"""\n'
    todo = f'{indent}raise NotImplementedError("exercise {number}")\n'
    return "".join([*lines[:doc.lineno - 1], shown, todo, *lines[node.end_lineno:]])


def fence(block):
    return f"\n```\n{textwrap.dedent(block[0])}```\n"


def write_sheet(number):
    title, minutes, points, functions, _, sheet = EXERCISES[number]
    sheet = re.sub(r"(?m)(^    .*\n)+", fence, sheet).replace("\n**", "\n\n**")
    return (f"# Exercise {number}: {title}\n\nWrite {functions}. {minutes} minutes, {points} points.\n{sheet}"
            f"\n\nDone when `pytest test_all.py -k exercise_{number:02}` is green. The points:\n"
            f"`python test_all.py grade . --exercise {number}`\n\n")


def hand_out(numbers, folder):
    """A copy of the repository without the answers; its README has the sheets."""
    if folder.exists():
        raise ValueError(f"--out {folder} is there already: name a new folder")
    texts = {name: (ROOT / f"{name}.py").read_text() for name in [*IMPORTS, "test_all"]}
    texts["test_all"] = re.sub(r"^WRONG = {.*?^}", "WRONG = {}", texts["test_all"], flags=re.M | re.S)
    for number in numbers:
        for path in EXERCISES[number].functions.split():
            module, name = path.split(".", 1)
            texts[module] = remove_answer(texts[module], name, number)
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    for name in ("requirements.txt", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("".join(map(write_sheet, numbers)))


def choose_tests(number, folder):
    """What pytest is told: the tests of an exercise, and to write results.xml."""
    options = "-p no:cacheprovider -p no:unraisableexception --tb=line".split()          # the fast ones
    return ["test_all.py", "-k", f"exercise_{number:02}", f"--junitxml={folder}/results.xml", *options]


def read_results(folder):
    """{test: "", or why it failed}"""
    results = {}
    for case in ElementTree.parse(f"{folder}/results.xml").iter("testcase"):
        if case.find("skipped") is None:
            why = [child.get("message") for child in case.findall("failure")]
            why += [child.text.strip().splitlines()[-1] for child in case.findall("error")]
            results[case.get("name")] = "".join(why).partition("\n")[0]
    return results


def run_tests(folder, number):
    """Results of an exercise: this file's tests on the six files in a folder, in a process of its own."""
    with tempfile.TemporaryDirectory() as copy:
        for path in [*(folder / f"{name}.py" for name in IMPORTS), ROOT / "test_all.py"]:
            shutil.copy(path, copy)
        command = [sys.executable, "-m", "pytest", *choose_tests(number, copy)]
        with contextlib.suppress(subprocess.TimeoutExpired, FileNotFoundError):
            subprocess.run(command, cwd=copy, timeout=300, capture_output=True)
            return read_results(copy)
        return {"all": "no result: it took more than 300 s, or crashed"}


def grade(folder, numbers):
    """Prints the points of each exercise, by the share of its tests that pass; are all reached?"""
    reached = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        several = pool.map(run_tests, [folder] * len(numbers), numbers)
    for number, results in zip(numbers, several):
        exercise, wrong = EXERCISES[number], [f"{test}: {why}" for test, why in results.items() if why]
        points = exercise.points * (1 - len(wrong) / len(results))
        reached += points
        print(f"{number:2} {exercise.title:48}{points:5.3g} of {exercise.points}", *wrong[:1])
    most = sum(EXERCISES[number].points for number in numbers)
    print(f"   {'all':48}{reached:5.3g} of {most}")
    return reached == most


def main(argv=None):
    parser = argparse.ArgumentParser(description="Exercises and their points. Tests: pytest test_all.py")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("handout", help="a copy of the repository without an answer")
    command.add_argument("exercise", metavar="N", choices=[*map(str, EXERCISES), "all"], help="1 to 11, all")
    command.add_argument("--out", required=True, type=Path, help="a new folder")
    command = commands.add_parser("grade", help="points; runs the code in FOLDER; exit code 0: all")
    command.add_argument("folder", type=Path)
    command.add_argument("--exercise", type=int, choices=EXERCISES, metavar="N", help="only this one")
    args = parser.parse_args(argv)
    with V.exit_on_error("test_all.py"):
        if args.command == "grade":
            sys.exit(not grade(args.folder, [args.exercise] if args.exercise else list(EXERCISES)))
        hand_out(list(EXERCISES) if args.exercise == "all" else [int(args.exercise)], args.out)
        print(f"{args.out}/README.md says what to do")


def judge(number, folder, functions, change, *options):
    """Results of an exercise in this process; `change` makes other functions of the texts of these."""
    with contextlib.ExitStack() as stack:
        for function in map(pkgutil.resolve_name, functions):
            stack.callback(setattr, function, "__code__", function.__code__)
            names = dict(function.__globals__)
            exec(change(textwrap.dedent(inspect.getsource(function))), names)
            function.__code__ = names[function.__name__].__code__            # wherever it was imported
        pytest.main([*choose_tests(number, folder), *options])
    return read_results(folder)


@pytest.mark.parametrize("number", EXERCISES)
def test_course_asks_for_what_is_to_be_done_and_catches_wrong_answers(number, tmp_path, monkeypatch):
    def remove(text):
        return remove_answer(text, ast.parse(text).body[0].name, number)

    def mistake(text):
        assert right in text
        return text.replace(right, wrong)

    monkeypatch.chdir(ROOT)
    assert all(words in " ".join(globals()) for words in EXERCISES[number].tests.split())
    functions = EXERCISES[number].functions.split()
    results = judge(number, tmp_path, functions, remove)
    assert set(results.values()) == {f"NotImplementedError: exercise {number}"}, results
    for function in functions:
        for right, wrong in WRONG.get(function, []):
            assert any(judge(number, tmp_path, [function], mistake, "-x").values()), wrong


def test_course_hands_out_all_but_the_answers(tmp_path, capsys):
    out = tmp_path / "all"
    main(["handout", "all", "--out", str(out)])
    todo = 'raise NotImplementedError("exercise '
    for name in IMPORTS:
        ours, theirs = ((folder / f"{name}.py").read_text() for folder in (ROOT, out))
        new = [line for line in theirs.splitlines() if line not in ours.splitlines()]
        assert all(line.strip().startswith(todo) for line in new)
        assert theirs.count(todo) == sum(row.functions.count(f"{name}.") for row in EXERCISES.values())
    assert "\nWRONG = {}\n" in (out / "test_all.py").read_text()
    with pytest.raises(SystemExit) as stop:
        main(["grade", str(out), "--exercise", "5"])
    assert stop.value.code == 1
    assert re.search(r"0 of 3 test_two_stream\S+: NotImplementedError: exercise 5\n", capsys.readouterr().out)


@pytest.mark.parametrize("argv, words", [
    (["handout", "1", "--out", "."], "name a new folder"), (["handout", "99", "--out", "new"], "'99'"),
    (["grade", "nowhere"], "nowhere/vit.py")])
def test_course_refuses_in_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


if __name__ == "__main__":
    main()
