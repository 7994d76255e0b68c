"""Tests, in the order of the files: vit, kmeans, tcas, objectives, train, probe, README.

pytest test_all.py                      everything, on the CPU
pytest test_all.py -k two_stream_mask   one idea; every function that a student may be asked to write has its own tests

For a course, at the end: ten exercises.
python test_all.py handout 3 --out FOLDER      a copy of the repository in which exercise 3 is to be done
python test_all.py grade FOLDER                points of such a copy, by the tests of this file
pytest test_all.py -k exercise_03              the tests of exercise 3

References are written out slowly and literally here, so that they can be compared with the paper line by line.
"""
import argparse
import ast
import collections
import contextlib
import copy
import functools
import glob
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import kmeans
import objectives
import probe
import tcas
import train
import vit as V
from kmeans import KMeans, KMeansTokenizer, assign

pytestmark = pytest.mark.filterwarnings("ignore:.*TorchCodec")

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = dict(image_size=24, patch_size=8, width=32, depth=2, heads=2)              # 9 patches


@pytest.fixture(autouse=True)
def fixed_random_numbers():
    """Torch seeds itself from the clock; a test must not hang on what it draws, nor on the tests before it."""
    torch.manual_seed(0)


def tiny(**over):
    torch.manual_seed(0)
    return V.ViT(**{**TINY, **over})


def state_of(module):
    """All parameters and buffers of a module, as bytes: equal before and after means that nothing was changed."""
    return {name: value.detach().numpy().tobytes() for name, value in module.state_dict().items()}


def refused(main, argv, capsys, *words):
    """main(argv) ends with exit code 2 and one line on stderr that holds all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    error = capsys.readouterr().err.strip()
    line = error.splitlines()[-1]
    assert stop.value.code == 2 and all(str(word) in line for word in words), error
    assert "Traceback" not in error
    assert len([part for part in error.splitlines() if "error:" in part]) == 1, error


# Scripts in the background are forks of a server process, which imports torch once for all of them.
SERVER = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
SERVER.set_forkserver_preload(["torch", "torchvision", "einops", "tqdm", "torch.distributed", "torch.utils.flop_counter"])
START = """
import multiprocessing, os, runpy, sys, torch
multiprocessing.set_start_method(None, force=True)              # loading processes start as they do elsewhere
os.environ.update(environment)
torch.set_num_threads(1)
sys.argv, sys.path = argv, [here, *sys.path]
for number, path in (1, out), (2, err):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
if session:
    os.setsid()
if room:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
code = 0
try:
    runpy.run_path(argv[0], run_name="__main__")
except SystemExit as stop:                                      # whose frames keep the loading processes
    code = stop.code
sys.exit(code)
"""


class Background:
    """One of the scripts, or as many processes of it as torchrun would start; to be used like subprocess.Popen."""

    def __init__(self, *argv, processes=1, session=False, room=None, **environment):
        self.folder, self.parts = tempfile.TemporaryDirectory(), []
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        argv = [os.path.join(HERE, argv[0]), *map(str, argv[1:])]
        for rank in range(processes):
            if processes > 1:
                environment.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                                   LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=port)
            given = dict(argv=argv, here=HERE, environment=environment, session=session, room=room,
                         out=f"{self.folder.name}/out{rank}", err=f"{self.folder.name}/err{rank}")
            self.parts.append(SERVER.Process(target=exec, args=(START, given)))
            self.parts[-1].start()
        self.pid, self.kill = self.parts[0].pid, self.parts[0].kill

    def poll(self):
        return self.parts[0].exitcode

    def wait(self, timeout=240):
        until = time.time() + timeout
        for part in self.parts:
            part.join(until - time.time())
            assert part.exitcode is not None, "still running"
        return next((part.exitcode for part in self.parts if part.exitcode), 0)

    def communicate(self, timeout=240):
        """(what all of them wrote to stdout, to stderr)."""
        self.returncode = self.wait(timeout)
        read = lambda name: "".join(open(path).read() for path in sorted(glob.glob(f"{self.folder.name}/{name}*")))
        return read("out"), read("err")


def torchrun(*argv, processes=2):
    """The same by torchrun itself, with new processes of Python."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", 0,
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", os.path.join(HERE, argv[0]), *argv[1:]]
    return subprocess.Popen([str(word) for word in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finished(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, out + err
    return out + err


# --- vit.py -------------------------------------------------------------------------------------------------------

TORCHVISION = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "conv_proj": "patch_embed.proj",
               "encoder.layers.encoder_layer_": "blocks.", "self_attention.in_proj_": "attn.qkv.",
               "self_attention.out_proj": "attn.proj", "ln_1": "norm1", "ln_2": "norm2", "mlp.0": "mlp.fc1",
               "mlp.3": "mlp.fc2", "encoder.ln": "norm"}


def test_vit_equals_torchvision():
    theirs, ours = torchvision.models.vit_b_16().eval(), V.vit_base().eval()
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in TORCHVISION.items():
            key = key.replace(old, new)
        state[key] = value
    ours.load_state_dict({key: value for key, value in state.items() if not key.startswith("heads")})
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        x = theirs._process_input(images)
        wanted = theirs.encoder(torch.cat([theirs.class_token.expand(2, -1, -1), x], 1))
        torch.testing.assert_close(ours(images), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [None, .1])
def test_state_dict_is_timms(scale):
    """Keys, order and shapes of timm's vit_small_patch16_224 (num_classes=0), written out."""
    d = 384
    wanted = {"cls_token": (1, 1, d), "pos_embed": (1, 197, d), "patch_embed.proj.weight": (d, 3, 16, 16),
              "patch_embed.proj.bias": (d,)}
    for i in range(12):
        block = {"norm1.weight": (d,), "norm1.bias": (d,), "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,),
                 "attn.proj.weight": (d, d), "attn.proj.bias": (d,), **({"ls1.gamma": (d,)} if scale else {}),
                 "norm2.weight": (d,), "norm2.bias": (d,), "mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,),
                 "mlp.fc2.weight": (d, 4 * d), "mlp.fc2.bias": (d,), **({"ls2.gamma": (d,)} if scale else {})}
        wanted.update({f"blocks.{i}.{key}": shape for key, shape in block.items()})
    wanted.update({"norm.weight": (d,), "norm.bias": (d,)})
    ours = {key: tuple(value.shape) for key, value in V.vit_small(layer_scale=scale).state_dict().items()}
    assert list(ours.items()) == list(wanted.items())


def test_patchify():
    images = torch.arange(2 * 3 * 4 * 6.).reshape(2, 3, 4, 6)
    patches = V.patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # patch 4 is in grid row 1, column 1; value 5 of it is row 0, column 1, channel 2 (row, column, channel)
    assert patches[1, 4, 5] == images[1, 2, 2, 3]
    for y, x, c in itertools.product(range(4), range(6), range(3)):
        assert torch.equal(images[:, c, y, x], patches[:, y // 2 * 3 + x // 2, (y % 2 * 2 + x % 2) * 3 + c])


def test_unpatchify():
    patches = torch.randn(2, 9, 12)
    images = V.unpatchify(patches, 2)
    assert images.shape == (2, 3, 6, 6)
    for y, x, c in itertools.product(range(6), range(6), range(3)):
        assert torch.equal(images[:, c, y, x], patches[:, y // 2 * 3 + x // 2, (y % 2 * 2 + x % 2) * 3 + c])


def test_hog_is_the_slow_loop():
    images, p = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)), 16
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect").double()
    out = torch.zeros(2, 2, 3, 9, 2, 2, dtype=torch.float64)         # image, patch, channel, bin, cell row and column
    for b in range(2):
        for c in range(3):
            for y in range(16):
                for x in range(32):
                    w = padded[b, c, y:y + 3, x:x + 3]
                    gx = (w[0, 0] + 2 * w[1, 0] + w[2, 0] - w[0, 2] - 2 * w[1, 2] - w[2, 2]).item()
                    gy = (w[0, 0] + 2 * w[0, 1] + w[0, 2] - w[2, 0] - 2 * w[2, 1] - w[2, 2]).item()
                    bin = math.floor(math.atan2(gx, gy) / math.pi * 9) % 9
                    out[b, x // 16, c, bin, y // 8, x % 16 // 8] += math.hypot(gx, gy)
    out = (out / out.norm(dim=3, keepdim=True)).flatten(2)
    torch.testing.assert_close(V.hog(images, p).double(), out, rtol=1e-4, atol=1e-5)
    assert out.shape == (2, 2, 108) and (V.hog(torch.zeros(1, 3, 16, 16), p) == 0).all()


@pytest.mark.parametrize("p, cells", [(4, 1), (8, 1), (12, 4), (14, 4), (16, 4)])
def test_hog_of_any_patch_size(p, cells):
    images = torch.randn(2, 3, 3 * p, 3 * p)
    x = V.hog(images, p)
    assert x.shape == (2, 9, 27 * cells)
    bins = x.view(2, 9, 3, 9, cells)
    torch.testing.assert_close(bins.square().sum(3), torch.ones(2, 9, 3, cells))


def test_mae_init():
    """Uniform in +-sqrt(6 / (in + out)); the patch projection counts as one linear layer of 3 p p inputs."""
    vit = V.ViT(**{**TINY, "init": "mae", "width": 64, "heads": 2})
    for weight, fan in ((vit.patch_embed.proj.weight, 3 * 64 + 64), (vit.blocks[0].mlp.fc1.weight, 64 + 256),
                        (vit.blocks[1].attn.qkv.weight, 64 + 192)):
        bound = math.sqrt(6 / fan)
        assert .98 * bound < weight.abs().max() <= bound and abs(weight.std() - bound / math.sqrt(3)) < .05 * bound
    assert not vit.blocks[0].mlp.fc1.bias.any() and .01 < vit.cls_token.std() < .03
    with pytest.raises(ValueError, match="init"):
        tiny(init="lecun")


def test_sincos_positions():
    pos = V.sincos_positions(14, 64)[0]
    assert pos.shape == (197, 64) and not pos[0].any()
    patch = pos[1:]
    assert torch.equal(patch[0, :32], patch[14, :32]) and not torch.equal(patch[0, 32:], patch[14, 32:])   # same column
    assert torch.equal(patch[0, 32:], patch[1, 32:]) and not torch.equal(patch[0, :32], patch[1, :32])     # same row
    with pytest.raises(ValueError):
        V.sincos_positions(3, 30)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_sincos_positions_value_by_value(prefix):
    pos = V.sincos_positions(5, 16, prefix)
    assert pos.shape == (1, prefix + 25, 16) and pos.dtype == torch.float32 and not pos[0, :prefix].any()
    for y, x, j in itertools.product(range(5), range(5), range(4)):
        w = 10000 ** (-j / 4)
        wanted = torch.tensor([math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)])
        torch.testing.assert_close(pos[0, prefix + 5 * y + x, j::4], wanted, atol=1e-5, rtol=0)


def slow_attention(attention, x, mask):
    """softmax(Q K^T / sqrt(head width)) V, one head and one row at a time; mask (b, rows, keys)."""
    b, rows, d = x.shape
    size = d // attention.heads
    q, k, v = (F.linear(x, w, c) for w, c in zip(attention.qkv.weight.split(d), attention.qkv.bias.split(d)))
    out = torch.zeros_like(x)
    for i, head, row in itertools.product(range(b), range(attention.heads), range(rows)):
        part = slice(head * size, (head + 1) * size)
        seen = mask[i, row].nonzero()[:, 0]
        weights = (k[i, seen, part] @ q[i, row, part] / size ** .5).softmax(0)
        out[i, row, part] = weights @ v[i, seen, part]
    return attention.proj(out)


def test_attention_mask_and_query_only_rows():
    attention, x = V.Attention(16, 2), torch.randn(2, 7, 16)
    mask = torch.rand(7, 5) < .5
    mask[:, 0] = True
    full = F.pad(mask, (0, 2))                                            # rows 5 and 6 are nobody's keys
    wanted = slow_attention(attention, x, full.expand(2, -1, -1))
    torch.testing.assert_close(attention(x, mask, n_keys=5), wanted)
    torch.testing.assert_close(attention(x, mask, n_keys=5, n_out=3), wanted[:, -3:])
    torch.testing.assert_close(attention(x), slow_attention(attention, x, torch.ones(2, 7, 7).bool()))
    wanted = slow_attention(attention, x, (torch.arange(7) < 5).expand(2, 7, 7))       # no mask: all see the first 5
    torch.testing.assert_close(attention(x, n_keys=5), wanted)
    torch.testing.assert_close(attention(x, n_keys=5, n_out=2), wanted[:, -2:])
    gamma = torch.rand(16)
    torch.testing.assert_close(attention(x, n_keys=5, n_out=2, gamma=gamma), gamma * wanted[:, -2:])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [["fc1", "fc2"], ["fc1"], ["fc2"], []])
def test_mlp_computes_gelu_again_instead_of_keeping_it(kind, trained):
    """The gradients of the plain formula, bit for bit, whatever is frozen, and one wide tensor for the backward pass."""
    mlp, x, grad = V.MLP(16, 64), torch.randn(2, 7, 16), torch.randn(2, 7, 16).to(kind)
    for name, p in mlp.named_parameters():
        p.requires_grad_(name[:3] in trained)
    plain, kept, own = copy.deepcopy(mlp), {}, {p.data_ptr() for p in mlp.parameters()}

    def keep(y):
        kept[y.data_ptr()] = y.numel() * (y.data_ptr() not in own)
        return y
    results = []
    for run in (mlp, lambda x: plain.fc2(F.gelu(plain.fc1(x)))):
        rows = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(
                keep if run is mlp else lambda y: y, lambda y: y):
            y = run(rows)
        y.backward(grad)
        results.append([y, rows.grad])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    for a, b in zip(mlp.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))
    if kind == torch.float32:
        assert sum(kept.values()) == 14 * (64 + 16 * ("fc1" in trained))


def test_mlp_derivatives():
    x, layer = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), nn.Linear(5, 4).double()
    assert torch.autograd.gradcheck(V.gelu_linear, (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(V.gelu_linear, (x, *layer.parameters()))


def test_layer_scale_is_part_of_the_layer_before_it():
    """Values and gradients of the plain formula; as much is kept for the backward pass as without LayerScale."""
    block, x = V.Block(16, 2, layer_scale=.3), torch.randn(2, 50, 16)
    for scale in (block.ls1, block.ls2):
        nn.init.normal_(scale.gamma)

    def plain(x):
        x = x + block.ls1.gamma * block.attn(block.norm1(x))
        return x + block.ls2.gamma * block.mlp(block.norm2(x))
    results = [[y, *torch.autograd.grad(y.square().sum(), block.parameters())] for y in (block(x), plain(x))]
    torch.testing.assert_close(*results)

    def count_kept(function):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.update({y.data_ptr(): y.numel()}) or y, lambda y: y):
            function(x)
        return sum(kept.values())
    without, folded, scaled = map(count_kept, (V.Block(16, 2), block, plain))
    assert without < folded < without + 2 * x.numel() < scaled         # only weights were added


def test_encode_of_the_last_rows_only():
    """n_out saves work in the last block and changes nothing else."""
    vit, x = tiny(layer_scale=.5).eval(), torch.randn(2, 10, 32)
    mask = torch.rand(10, 8) < .7
    mask[:, 0] = True
    torch.testing.assert_close(vit.encode(x, mask, 8, n_out=4), vit.encode(x, mask, 8)[:, -4:])


def test_embed_in_an_order():
    vit, images = tiny(), torch.randn(2, 3, 24, 24)
    order = torch.rand(2, 9).argsort(1)[:, :5]
    whole = vit.embed(images)
    wanted = torch.stack([whole[i][torch.cat([torch.zeros(1).long(), 1 + order[i]])] for i in range(2)])
    torch.testing.assert_close(vit.embed(images, order), wanted)
    with pytest.raises(ValueError, match="24"):
        vit.embed(torch.randn(1, 3, 32, 32))


def test_stochastic_depth():
    x, noise = torch.zeros(1000, 3, 2), torch.rand(1000, generator=torch.Generator().manual_seed(0))
    seen = []
    branch = lambda x, more: (seen.append(len(x)), x + more)[1]
    y = V.add_branch(x, branch, [x, torch.ones(1000, 1, 1)], .25, noise)
    assert torch.equal(y.amin((1, 2)), y.amax((1, 2)))                    # one draw for all rows of a sample
    assert torch.equal(y[:, 0, 0] > 0, noise >= .25) and y.max() == 1 / .75
    assert seen == [(noise >= .25).sum()]                                 # the others are not computed
    for rate, noise, wanted in ((.25, None, 1), (0, noise, 1), (.5, noise * 0, 0), (.5, noise * 0 + .5, 2)):
        y = V.add_branch(x[:, :2], branch, [x[:, 1:], torch.ones(1000, 1, 1)], rate, noise)
        assert torch.equal(y, torch.full((1000, 2, 2), float(wanted))), (rate, wanted)
    vit = tiny(drop_path=.5)
    assert [block.drop for block in vit.blocks] == [0, .5]
    images, fixed = torch.randn(4, 3, 24, 24), torch.tensor([[.9] * 4, [.9] * 4, [.1, .9, .1, .9], [.1, .9, .1, .9]])
    x = vit.encode(vit.embed(images), noise=fixed)
    vit.blocks[1].attn.proj.weight.data.fill_(9.)                         # samples 0 and 2 skip the second block
    changed = (vit.encode(vit.embed(images), noise=fixed) - x).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [False, True, False, True]
    gradients, vit, images = [], vit.double(), images.double()
    for compiling in (False, True):                                       # in one graph, as on a GPU, all are computed
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
            vit.zero_grad()
            vit.encode(vit.embed(images), noise=fixed, n_out=4).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in vit.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_weights_of_every_layout(tmp_path):
    source, images = tiny(layer_scale=.1).eval(), torch.randn(1, 3, 24, 24)
    source.blocks[0].attn.qkv.weight.data.mul_(3)
    flat, wanted = source.state_dict(), source(images)
    layouts = {
        "timm": {**flat, "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)},
        "mae": {"model": flat},
        "dino": {"student": {}, "teacher": {"module.backbone." + key: value for key, value in flat.items()}
                 | {"module.head.mlp.0.weight": torch.zeros(3)}, "epoch": 3},
        "ours": {"model": {"encoder." + key: value for key, value in flat.items()} | {"mask_token": torch.zeros(1, 1, 32)}},
    }
    for name, state in layouts.items():
        path = str(tmp_path / f"{name}.pth")
        torch.save(state, path)
        torch.testing.assert_close(V.load_weights(tiny(layer_scale=1.).eval(), path)(images), wanted)
    rebuilt = V.from_weights(path)
    assert rebuilt.grid == 3 and rebuilt.patch_size == 8 and rebuilt.depth == 2 and rebuilt.width == 32
    micro = V.vit_micro().eval()
    torch.save(micro.state_dict(), path)
    small = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(V.from_weights(path).eval()(small), micro(small))


def test_weights_resize_positions(tmp_path):
    path = str(tmp_path / "small.pt")
    torch.save(tiny().state_dict(), path)
    large = V.load_weights(tiny(image_size=48), path)
    assert large.pos_embed.shape == (1, 37, 32)
    assert torch.equal(large.pos_embed[:, 0], tiny().pos_embed[:, 0])
    ramp = torch.arange(9.).reshape(3, 3)[None, :, :, None].expand(1, 3, 3, 4).flatten(1, 2)
    again = V.resize_positions(F.pad(ramp, (0, 0, 1, 0)), 3)
    torch.testing.assert_close(again[:, 1:], ramp)                        # same grid: unchanged
    up = V.resize_positions(F.pad(ramp, (0, 0, 1, 0)), 6)[0, 1:, 0].reshape(6, 6)
    assert (up.diff(dim=0) > 0).all() and (up.diff(dim=1) > 0).all()      # still increases along rows and columns


def test_wrong_weights_are_refused(tmp_path):
    vit, path = tiny(), str(tmp_path / "w.pt")
    before = state_of(vit)
    for state, words in ((tiny(depth=3).state_dict(), "blocks.2.norm1.weight unknown"),
                         (tiny(layer_scale=.1).state_dict(), "blocks.0.ls1.gamma unknown"),
                         (tiny(width=16).state_dict(), r"cls_token \(1, 1, 16\) instead of \(1, 1, 32\)"),
                         ({"a": torch.zeros(1)}, "cls_token missing, pos_embed missing"),
                         ([1, 2], "no ViT weights")):
        torch.save(state, path)
        with pytest.raises(ValueError, match=words):
            V.load_weights(vit, path)
    open(path, "wb").write(open(path, "rb").read()[:50])
    for bad, words in ((path, "not a readable checkpoint"), (path + "x", "no such file")):
        with pytest.raises(ValueError, match=words) as error:
            V.load_weights(vit, bad)
        assert bad in str(error.value) and "\n" not in str(error.value)
    assert state_of(vit) == before


def test_download_checks_the_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    source = tmp_path / "weights.pth"
    source.write_bytes(b"weights")
    for wrong in (dict(sha256="0123"), dict(md5="0123")):
        with pytest.raises(ValueError, match="does not begin with 0123"):
            V.download(source.as_uri(), **wrong)
    path = V.download(source.as_uri(), md5=hashlib.md5(b"weights").hexdigest()[:6])
    assert open(path, "rb").read() == b"weights" and path.startswith(str(tmp_path / "hub"))
    open(path, "ab").write(b"more")                                       # the cached file is checked as well
    with pytest.raises(ValueError, match="md5"):
        V.download(source.as_uri(), md5=hashlib.md5(b"weights").hexdigest()[:6])
    with pytest.raises(ValueError, match="put the file at"):
        V.download((tmp_path / "missing.pth").as_uri())


def test_vit_table(capsys):
    V.main([])
    out = capsys.readouterr().out
    assert "vit_base" in out and "85.80M" in out and "35.13" in out       # 17.6 G multiply-adds, counted twice
    refused(V.main, ["--image-size", 50], capsys, "50", "multiple")


def test_ticks_are_round():
    assert V.choose_ticks(-.2, 6.2) == [0, 1, 2, 3, 4, 5, 6]
    assert V.choose_ticks(1.6, 4.3) == pytest.approx([2, 2.5, 3, 3.5, 4])
    assert V.choose_ticks(.0121, .0133) == pytest.approx([.0122, .0124, .0126, .0128, .013, .0132])
    assert V.choose_ticks(-3e4, 2e4) == [-3e4, -2e4, -1e4, 0, 1e4, 2e4]


def test_plot_shows_what_it_is_given(tmp_path):
    """A falling curve from corner to corner, dots above and below it, a level across: each in its color, in place."""
    fall, dots = ([0, 1, 2, 3], [4, 3, math.nan, 1]), ([0, 3], [1, 4])
    one = V.draw_plot("epoch", "loss", {"mapet": [fall]}, {"runs": [dots]}, {"ln K": 2})
    two = V.draw_plot("epoch", "loss", {f"a long name of some run, number {i}": [fall, fall] for i in range(9)})
    assert two.height > one.height                                          # rows of the legend
    picture = torch.from_numpy(np.array(one))[120:960].long()               # below the legend, above the numbers
    colors = [torch.tensor([int(c[i:i + 2], 16) for i in (1, 3, 5)]) for c in V.COLORS[:3]]
    curve, dot, level = [(picture == color).all(-1).nonzero().float() for color in colors]
    assert (torch.corrcoef(curve.T)[0, 1] > .99) and len(curve) > 5000      # (y, x): both grow, as y points down
    assert len(dot) > 500 and torch.corrcoef(dot.T)[0, 1] < -.99
    assert level[:, 0].max() - level[:, 0].min() < 10 and level[:, 1].max() - level[:, 1].min() > 1400
    share = 1 - level[:, 0].mean() / 840                                    # of the height: 2 between 1 and 4
    assert abs(share - (2 - 1 + .12) / 3.24) < .01
    V.save_plots([one, two], str(tmp_path / "new" / "p.png"))
    assert Image.open(tmp_path / "new" / "p.png").size == (900, (one.height + two.height) // 2)
    V.draw_plot("epoch", "loss", {"nothing yet": [([0], [math.nan])]}, levels={"flat": 0})


# --- kmeans.py ----------------------------------------------------------------------------------------------------

def rows_of(n, d, seed=0, kind=torch.float32):
    g = torch.Generator().manual_seed(seed)
    if kind == torch.uint8:
        return torch.randint(256, (n, d), generator=g, dtype=torch.uint8)
    centers = 3 * torch.randn(7, d, generator=g)
    return (centers[torch.randint(7, (n,), generator=g)] + torch.randn(n, d, generator=g)).to(kind)


def check_labels(x, c, labels, distances=None):
    """Labels may differ from the float64 brute force only where squared distances agree to 1e-4 (issue 3)."""
    d2 = torch.cdist(x.double(), c.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    mine, best = d2.gather(1, labels[:, None])[:, 0], d2.min(1).values
    assert (mine <= best * (1 + 1e-4) + 1e-12).all()
    assert (labels == d2.argmin(1)).float().mean() > .98
    if distances is not None:
        torch.testing.assert_close(distances.double(), mine, rtol=1e-5, atol=1e-9)


def check_scores(x, c):
    """Whatever x is made of, its products with the weights are as precise as float32's."""
    w, bias = kmeans.score_weights(c[None], c.double().mean(0), kmeans.Rows(x, len(c)))
    _, scores = kmeans.find_nearest(x, w, bias)
    x, w = x.double(), w[0].double()
    error = scores[0] - (x @ w.T + bias[0].double()).max(1).values
    assert (error.abs() / (x.norm(dim=1) * w.norm(dim=1).max())).max() < 5e-6


def check_flat_patches(device):
    """As of sky: nearer to each other than to the mean, where rounded centroids with the true ones' bias go wrong."""
    g = torch.Generator().manual_seed(8)                                  # no near-tie: the next is 1.6 % farther
    x = torch.randint(248, (200, 1), generator=g) + torch.randint(8, (200, 300), generator=g)
    c = x[:40] / 255 + .002 * torch.randn(40, 300, generator=g)
    check_labels(x.double() / 255, c, assign(x.byte().to(device), c.to(device))[0].cpu())


def slow_lloyd(x, c, iterations):
    """Float64, one centroid at a time, as in the docstring of kmeans.py."""
    x, c = x.double(), c.double().clone()
    for _ in range(iterations):
        labels = (x[:, None] - c).square().sum(-1).argmin(1)
        c = torch.stack([x[labels == k].mean(0) for k in range(len(c))])
    return c, (x[:, None] - c).square().sum(-1).min(1).values.sum()


class Toy(torch.utils.data.Dataset):
    """Images that are functions of their index; `reads` counts how many were asked for."""
    mean, std, name, classes = (.5, .4, .3), (.2, .25, .3), "toy/train", None

    def __init__(self, n=20, size=16, delay=0):
        self.n, self.image_size, self.delay, self.reads, self.labels = n, size, delay, 0, None

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.reads += 1
        time.sleep(self.delay)
        g = torch.Generator().manual_seed(i)
        return torch.randint(256, (3, self.image_size, self.image_size), generator=g, dtype=torch.uint8), -1, i


def toy_tokenizer(k=9, size=16, p=8, features="pixel"):
    ds = Toy(size=size)
    d = V.PatchFeatures(features, p, size)(torch.zeros(1, 3, size, size)).shape[-1]
    c = torch.randn(k, d, generator=torch.Generator().manual_seed(1))
    return KMeansTokenizer(features, c, "euclidean", p, size, ds.mean, ds.std)


@pytest.mark.parametrize("n,d,k", [(1, 1, 1), (5, 3, 5), (1000, 3, 2), (1025, 17, 33), (2049, 64, 130), (300, 257, 41)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_assign_is_the_brute_force(n, d, k, kind):
    x = rows_of(n, d, kind=kind)
    values = x.double() / 255 if kind == torch.uint8 else x.double()
    c = (values[torch.randperm(n)[:k].sort().values] + .01 * torch.randn(k, d)).float()
    check_labels(values, c, *assign(x, c))


def test_assign_far_from_the_origin():
    x = rows_of(500, 20) + 1000             # ||x||^2 is 10^6 times the distances: naive float32 loses them
    c = x[:40] + .1
    check_labels(x, c, *assign(x, c))


def test_ties_go_to_the_smallest_code():
    c = torch.tensor([[1., 0], [0, 1.], [1., 0], [0, 1.]])
    assert assign(torch.tensor([[5., 0], [0, 5.], [1., 1.]]), c)[0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("n,d,k", [(60, 2, 3), (500, 8, 7), (1500, 30, 20)])
def test_seven_lines_are_kmeans(n, d, k):
    """What the file opens with ends where the real one does; an empty cluster stays where it is."""
    x = rows_of(n, d)
    start = x[torch.randperm(n, generator=torch.Generator().manual_seed(3))[:k]]
    km = KMeans(k, init=start, max_iter=6, tol=0).fit(x)
    labels, centroids = kmeans.lloyd(x, start, km.n_iter)
    torch.testing.assert_close(km.centroids, centroids, rtol=1e-4, atol=1e-4)
    check_labels(x, centroids, labels)
    assert torch.bincount(labels, minlength=k).sub(km.counts).abs().sum() <= 2       # a near-tie may fall otherwise
    apart = torch.cat([start, torch.full((1, d), 1e4)])
    assert torch.equal(kmeans.lloyd(x, apart, 2)[1][-1], apart[-1])


def test_lloyd_by_hand():
    x, start = torch.tensor([[0.], [2.], [5.], [9.], [10.]]), torch.tensor([[0.], [4.], [99.]])
    steps = [([0, 0, 1, 1, 1], [0, 4, 99]),                               # 2 is as near to 0 as to 4: the first of the two
             ([0, 0, 1, 1, 1], [1, 8, 99]),
             ([0, 0, 1, 1, 1], [1, 8, 99])]
    for n_iter, (labels, centroids) in enumerate(steps):
        found = kmeans.lloyd(x, start, n_iter)
        assert found[0].tolist() == labels and found[0].dtype == torch.int64 and found[1].flatten().tolist() == centroids
    assert start.flatten().tolist() == [0, 4, 99]                         # what it was given stays
    x, start = torch.tensor([[0.], [4.], [5.], [6.], [20.]]), torch.tensor([[1.], [5.]])
    labels, centroids = kmeans.lloyd(x, start, 1)                         # means of {0} and {4, 5, 6, 20}: 0 and 8.75
    assert centroids.flatten().tolist() == [0, 8.75] and labels.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("n,d,k", [(60, 2, 3), (500, 8, 7), (1500, 30, 20)])
def test_fit_is_the_slow_lloyd(n, d, k):
    x = rows_of(n, d)
    start = x[torch.randperm(n, generator=torch.Generator().manual_seed(3))[:k]]
    km = KMeans(k, init=start, max_iter=6, tol=0).fit(x)
    c, inertia = slow_lloyd(x, start, km.n_iter)
    torch.testing.assert_close(km.centroids.double(), c, rtol=1e-4, atol=1e-4)
    assert km.inertia == pytest.approx(inertia.item(), rel=1e-5)
    assert km.counts.tolist() == torch.bincount(km.predict(x), minlength=k).tolist()
    assert all(b <= a * (1 + 1e-6) for a, b in zip(km.history, km.history[1:])) and len(km.history) == km.n_iter


def test_cosine_is_spherical_kmeans():
    x = rows_of(400, 6) * torch.rand(400, 1).mul(5).exp()                # lengths over two orders of magnitude
    km = KMeans(5, metric="cosine", restarts=2).fit(x)
    torch.testing.assert_close(km.centroids.norm(dim=1), torch.ones(5))
    labels = km.predict(x)
    unit = F.normalize(x, dim=1)
    check_labels(unit, km.centroids, labels)
    means = torch.stack([unit[labels == k].mean(0) for k in range(5)])
    torch.testing.assert_close(km.centroids, F.normalize(means, dim=1), rtol=1e-2, atol=1e-2)
    assert torch.equal(labels, km.predict(x * 7))
    # Were lengths left in, as in ClusterMIM's released code, the longest centroid would win nearly everywhere.
    assert (km.predict(x) != assign(x, km.centroids * torch.tensor([[9.], [1], [1], [1], [1]]))[0]).any()


def test_degenerate_data():
    x = rows_of(40, 5)
    assert KMeans(40).fit(x).inertia < 1e-9                              # K = n
    km = KMeans(30).fit(x[:12].repeat(10, 1))                            # K > distinct rows
    assert km.inertia < 1e-9 and (km.counts > 0).sum() == 12 and km.counts.sum() == 120
    km = KMeans(4).fit(torch.full((50, 3), 1e3))                         # constant
    assert km.inertia == 0 and km.counts.sum() == 50 and km.n_iter < 3
    assert KMeans(1).fit(x).centroids[0].allclose(x.mean(0), atol=1e-5)
    assert torch.isfinite(KMeans(5, metric="cosine").fit(torch.zeros(20, 3)).centroids).all()


def test_empty_clusters_move_to_the_farthest_rows():
    x = torch.cat([torch.randn(200, 2), torch.randn(200, 2) + 50, torch.tensor([[1000., 1000]])])
    km = KMeans(3, init=torch.zeros(3, 2)).fit(x)                        # two of three seeds win no row at first
    assert (km.counts > 0).all() and sorted(km.counts.tolist()) == [1, 200, 200]
    assert sorted(KMeans(3, init=torch.zeros(3, 2), restarts=2).fit(x).counts.tolist()) == [1, 200, 200]


@pytest.mark.parametrize("call,says", [
    (lambda: KMeans(5).fit(torch.randn(4, 3)), "5 clusters of 4 rows"),
    (lambda: KMeans(2).fit(torch.tensor([[0.], [float("nan")], [1.]])), "NaN"),
    (lambda: KMeans(2).fit(torch.tensor([[0.], [float("inf")], [1.]])), "infinite"),
    (lambda: KMeans(2).fit(torch.randn(5)), r"\(n, d\)"),
    (lambda: KMeans(2).fit(torch.randn(0, 3)), r"\(0, 3\)"),
    (lambda: KMeans(2).fit(lambda: iter([])), "empty stream"),
    (lambda: KMeans(2).fit(lambda: iter([torch.randn(9, 3), torch.randn(9, 4)])), r"\(9, 3\).*\(9, 4\)"),
    (lambda: KMeans(2, init=torch.zeros(3, 3)).fit(torch.randn(9, 3)), r"init is \(3, 3\)"),
    (lambda: KMeans(0), "at least 1"),
    (lambda: KMeans(2, metric="l1"), "l1"),
    (lambda: KMeans(2, init="best"), "best"),
    (lambda: assign(torch.randn(9, 3), torch.randn(2, 4)), r"\(9, 3\).*\(2, 4\)"),
    (lambda: V.PatchFeatures("pixel", 7, 16), "16 is not a multiple of patch size 7"),
    (lambda: V.PatchFeatures("clip", 8, 16), "16 pixels"),
    (lambda: V.PatchFeatures("no-such-file.pt", 8, 16), "no-such-file.pt"),
    (lambda: toy_tokenizer()(torch.zeros(1, 3, 24, 24)), r"\(b, 3, 16, 16\), not \(1, 3, 24, 24\)"),
])
def test_what_cannot_be_clustered_is_refused_in_one_line(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("metric,init", [("euclidean", "k-means++"), ("cosine", "random")])
def test_streams_and_memory_maps_are_the_tensor(tmp_path, metric, init):
    x = rows_of(2500, 9)
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, tuple(x.shape))
    file[:] = x
    options = dict(metric=metric, init=init, max_iter=5, seed=4)
    whole = KMeans(6, **options).fit(x)
    passes = []
    for other in (np.load(tmp_path / "x.npy", mmap_mode="r"), lambda: passes.append(1) or iter(x.split(701))):
        km = KMeans(6, **options, rows=333).fit(other)
        torch.testing.assert_close(km.centroids, whole.centroids, rtol=1e-5, atol=1e-5)
        assert km.inertia == pytest.approx(whole.inertia, rel=1e-5) and torch.equal(km.counts, whole.counts)
    # A first look, the survey, the seeds, one pass per iteration, the final count: nothing else may read the stream.
    assert len(passes) == 3 + km.n_iter + 1


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_uint8_pixels_are_standardized_on_the_fly(metric):
    x, mean, std = rows_of(700, 12, kind=torch.uint8), torch.tensor([.4, .5, .6]), torch.tensor([.2, .3, .25])
    values = ((x.view(700, 4, 3) / 255 - mean) / std).flatten(1)
    a = KMeans(8, metric, mean=mean.tolist(), std=std.tolist()).fit(x)
    b = KMeans(8, metric).fit(values)
    torch.testing.assert_close(a.centroids, b.centroids, rtol=1e-4, atol=1e-4)
    assert a.inertia == pytest.approx(b.inertia, rel=1e-5)
    assert torch.equal(a.predict(x), b.predict(values))


def test_restarts_run_side_by_side_and_the_best_is_kept():
    x = [rows_of(300, 4)]
    for init in ("random", "k-means++"):
        once, more = (KMeans(7, init=init, restarts=r, seed=2).fit(x[0]) for r in (1, 6))
        assert more.inertia <= once.inertia * (1 + 1e-6)
        again = KMeans(7, init=init, restarts=6, seed=2).fit(x[0])
        assert torch.equal(more.centroids, again.centroids) and more.history == again.history
    one, six = (KMeans(7, init="random", restarts=r, seed=2).fit(x[0]).inertia for r in (1, 6))
    assert six < one


def test_kmeans_plusplus_is_the_slow_loop():
    x, g = rows_of(90, 5).double(), torch.Generator().manual_seed(5)
    u = torch.rand(10, 3, generator=g, dtype=torch.float64)
    seeds = kmeans.kmeans_plusplus(x.float(), u).tolist()
    chosen = [int(u[0, 0] * 90)]
    for i in range(1, 10):
        closest = torch.stack([(x - x[j]).square().sum(1) for j in chosen]).min(0).values
        trials = [int((closest.cumsum(0) / closest.sum() > v).nonzero()[0]) for v in u[i].tolist()]
        left = [torch.minimum(closest, (x - x[j]).square().sum(1)).sum() for j in trials]
        chosen.append(trials[int(torch.stack(left).argmin())])
    assert seeds == chosen
    rows = torch.tensor([[0.], [0.], [1.], [0.], [3.]])                   # u = 0: the first row that is not at a seed
    assert kmeans.kmeans_plusplus(rows, torch.tensor([[0.], [0.], [0.]])).tolist() == [0, 2, 4]
    assert kmeans.kmeans_plusplus(rows, torch.tensor([[.99, 0.], [0., .2]])).tolist() == [4, 0]       # of 0 and 1: 0
    near = torch.cat([torch.zeros(9, 1), torch.tensor([[1.], [10.]])])    # squares: 1 of 101, not 1 of 11
    assert kmeans.kmeans_plusplus(near, torch.tensor([[0.], [.05]])).tolist() == [0, 10]
    assert kmeans.kmeans_plusplus(torch.full((5, 2), 7.), torch.rand(3, 2)).max() < 5             # all alike: any
    apart = torch.arange(6.).repeat_interleave(20)[:, None] * 100 + torch.randn(120, 1)
    assert sorted((KMeans(6, seed=9).fit(apart).centroids[:, 0] / 100).round().tolist()) == [0, 1, 2, 3, 4, 5]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made meanwhile."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.size = max(self.size, t.untyped_storage().nbytes() if torch.is_tensor(t) else 0)
        return out


def test_no_matrix_of_all_scores_is_ever_made():
    x, k = torch.randn(40000, 2), 50
    with Largest() as largest:
        km = KMeans(k, max_iter=2).fit(x)
        km.predict(x)
    assert largest.size < x.shape[0] * k                                 # bytes: not even one of a byte a score


def test_pixel_features():
    images = torch.randn(2, 3, 16, 16)
    x = V.PatchFeatures("pixel-norm", 8, 16)(images)
    torch.testing.assert_close(x.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var(-1), torch.ones(2, 4), atol=1e-4, rtol=0)
    assert torch.equal(V.PatchFeatures("pixel", 8, 16)(images)[1, 2, 5 * 24 + 3 * 3 + 1], images[1, 1, 8 + 5, 3])


def test_clip_trunk_has_the_names_and_sizes_of_rn50x64():
    with torch.device("meta"):
        state = {key: tuple(v.shape) for key, v in V.CLIPTrunk().state_dict().items()}
        assert V.CLIPTrunk().eval()(torch.empty(1, 3, 448, 448)).shape == (1, 4096, 14, 14)
    depths = {1: 3, 2: 15, 3: 36, 4: 10}
    wanted = {"conv1.weight": (64, 3, 3, 3), "conv2.weight": (64, 64, 3, 3), "conv3.weight": (128, 64, 3, 3),
              "layer1.0.downsample.0.weight": (512, 128, 1, 1), "layer1.2.conv3.weight": (512, 128, 1, 1),
              "layer2.0.downsample.1.running_var": (1024,), "layer3.35.conv2.weight": (512, 512, 3, 3),
              "layer4.0.conv1.weight": (1024, 2048, 1, 1), "layer4.9.bn3.bias": (4096,)}
    assert wanted.items() <= state.items()
    for layer, depth in depths.items():
        assert {int(key.split(".")[1]) for key in state if key.startswith(f"layer{layer}.")} == set(range(depth))
        assert [key for key in state if key.startswith(f"layer{layer}.") and "downsample.0" in key] == [
            f"layer{layer}.0.downsample.0.weight"]


def test_clip_block_averages_where_a_resnet_strides():
    block, x = V.Bottleneck(8, 4, 2).eval(), torch.randn(2, 8, 6, 6)
    for norm in (m for m in block.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(.5, 2)
    norm = lambda y, m: (y - m.running_mean.view(-1, 1, 1)) / (m.running_var.view(-1, 1, 1) + 1e-5).sqrt()
    y = norm(torch.einsum("oi,biyx->boyx", block.conv1.weight[:, :, 0, 0], x), block.bn1).relu()
    y = norm(F.conv2d(F.pad(y, (1, 1, 1, 1)), block.conv2.weight), block.bn2).relu()
    halve = lambda y: (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4
    y = norm(F.conv2d(halve(y), block.conv3.weight), block.bn3)
    shortcut = block.downsample[1](F.conv2d(halve(x), block.downsample[0].weight))
    torch.testing.assert_close(block(x), (y + shortcut).relu(), rtol=1e-4, atol=1e-5)


def test_clip_weights_come_from_a_torchscript_archive(tmp_path, monkeypatch):
    small = functools.partial(V.CLIPTrunk, width=8, layers=(1, 2, 1, 1))
    monkeypatch.setattr(V, "CLIPTrunk", small)

    class Archive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.token_embedding = small(), torch.nn.Embedding(3, 2)
            self.visual.attnpool = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.visual(x)

    archive, path = Archive().eval(), str(tmp_path / "RN50x64.pt")
    torch.jit.trace(archive, torch.randn(1, 3, 64, 64)).half().save(path)
    asked = {}
    monkeypatch.setattr(V, "download", lambda url, **check: asked.update(check, url=url) or path)
    features = V.PatchFeatures("clip", 16, 224)
    assert asked["sha256"] in asked["url"] and len(asked["sha256"]) == 64
    torch.testing.assert_close(features.encoder.layer2[1].conv2.weight, archive.visual.layer2[1].conv2.weight.float())
    assert not features.train().training and not any(p.requires_grad for p in features.parameters())
    tokenizer = KMeansTokenizer("clip", torch.randn(5, 256), "euclidean", 16, 224, *V.CLIP)
    assert tokenizer(torch.zeros(1, 3, 448, 448, dtype=torch.uint8)).shape == (1, 196)       # 14 x 14
    assert tokenizer(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).shape == (1, 196) and tokenizer.input_size == 448


def test_tokenizer_is_normalise_extract_assign_and_survives_a_round_trip(tmp_path):
    torch.save(V.vit_micro(image_size=16, width=24, heads=3, depth=1).state_dict(), tmp_path / "encoder.pt")
    for features in ("pixel", "pixel-norm", "hog", str(tmp_path / "encoder.pt")):
        tokenizer = toy_tokenizer(features=features)
        images = torch.stack([Toy()[i][0] for i in range(3)])
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (Toy.mean, Toy.std))
        normalized = (images / 255 - mean) / std
        tokens = tokenizer(images)
        assert tokens.dtype == torch.int64 and tokens.shape == (3, 4) and torch.equal(tokens, tokenizer(normalized))
        x = tokenizer.extract(normalized)
        assert torch.equal(tokens, torch.cdist(x.double(), tokenizer.centroids.double()).argmin(-1))
        tokenizer.save(tmp_path / "tokenizer.pt")
        torch.load(tmp_path / "tokenizer.pt", weights_only=True)
        again = kmeans.load_tokenizer(str(tmp_path / "tokenizer.pt"))
        assert torch.equal(tokens, again(images))
        kept = dict(features=features, vocab_size=9, patch_size=8, image_size=16, mean=tokenizer.mean)
        for key, value in kept.items():
            assert getattr(again, key) == value
    assert sorted(os.listdir(tmp_path)) == ["encoder.pt", "tokenizer.pt"]


def test_foreign_and_damaged_tokenizers_are_refused_in_one_line(tmp_path):
    toy_tokenizer().save(tmp_path / "good.pt")
    state = torch.load(tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"model": 1}, tmp_path / "other.pt")
    torch.save({**state, "vocab_size": 8}, tmp_path / "mismatch.pt")
    torch.save({**state, "color": 8}, tmp_path / "more.pt")
    for name in ("cut.pt", "text.pt", "other.pt", "mismatch.pt", "more.pt", "missing.pt"):
        with pytest.raises(ValueError, match=name) as error:
            kmeans.load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(error.value)
    for name in ("cut.pt", "text.pt", "missing.pt"):
        with pytest.raises(ValueError, match=name):
            kmeans.load_tokens(str(tmp_path / name))


def official_vqkd(width=96, depth=2, heads=3, k=50, grid=3, p=8):
    """A state dict with the names and shapes of BEiT v2's file: a small encoder, one decoder block, teacher, buffers."""
    vit = V.ViT(p * grid, p, width, depth, heads, init="mae")
    nn.init.normal_(vit.norm.weight, 1, .3)
    state = {}
    for part in ("encoder", "decoder"):
        for key, value in vit.state_dict().items():
            key, value = key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key, torch.randn_like(value) * .2 + value
            if key.endswith("qkv.bias"):
                state[f"{part}.{key}".replace("qkv.bias", "q_bias")], _, state[f"{part}.{key}".replace("qkv.bias", "v_bias")] = \
                    value.chunk(3)
            else:
                state[f"{part}.{key}"] = value
    for key, rows in (("encode_task_layer.0", width), ("encode_task_layer.2", 32), ("decode_task_layer.0", width)):
        state[f"{key}.weight"], state[f"{key}.bias"] = torch.randn(rows, width) / 9, torch.randn(rows) / 9
    state["quantize.embedding.weight"] = F.normalize(torch.randn(k, 32), dim=-1)
    state["quantize.cluster_size"], state["quantize.embedding.initted"] = torch.zeros(k), torch.ones(1)
    state["teacher_model.visual.proj"], state["scaling_layer.shift"] = torch.zeros(4, 4), torch.zeros(1, 3, 1, 1)
    return state


def test_official_vqkd_weights(tmp_path, monkeypatch):
    """BEiT v2's names and forward, written out from its state dict; by name, by file; as a tokenizer and as features."""
    state = official_vqkd()
    torch.save({"model": state, "epoch": 99, "args": argparse.Namespace(lr=1)}, tmp_path / "official.pth")
    pixels = torch.randint(256, (4, 3, 24, 24), dtype=torch.uint8)
    get = lambda key: state[f"encoder.{key}"]
    norm = lambda x, key: F.layer_norm(x, x.shape[-1:], get(f"{key}.weight"), get(f"{key}.bias"), 1e-6)
    x = pixels / 127.5 - 1                                                # its input: -1 to 1
    x = F.conv2d(x, get("patch_embed.proj.weight"), get("patch_embed.proj.bias"), stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([get("cls_token").expand(4, -1, -1), x], 1) + get("pos_embed")
    for i in range(2):
        at = f"blocks.{i}."
        bias = torch.cat([get(at + "attn.q_bias"), torch.zeros(96), get(at + "attn.v_bias")])
        q, k, v = F.linear(norm(x, at + "norm1"), get(at + "attn.qkv.weight"), bias).view(4, 10, 3, 3, 32).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-1, -2) / 32 ** .5).softmax(-1) @ v).transpose(1, 2).reshape(4, 10, 96)
        x = x + F.linear(y, get(at + "attn.proj.weight"), get(at + "attn.proj.bias"))
        y = F.gelu(F.linear(norm(x, at + "norm2"), get(at + "mlp.fc1.weight"), get(at + "mlp.fc1.bias")))
        x = x + F.linear(y, get(at + "mlp.fc2.weight"), get(at + "mlp.fc2.bias"))
    features = norm(x, "fc_norm")[:, 1:]
    z = F.linear(features, state["encode_task_layer.0.weight"], state["encode_task_layer.0.bias"]).tanh()
    z = F.normalize(F.linear(z, state["encode_task_layer.2.weight"], state["encode_task_layer.2.bias"]), dim=-1)
    wanted = torch.cdist(z, state["quantize.embedding.weight"]).argmin(-1)
    asked = {}
    for module in (V, kmeans):
        monkeypatch.setattr(module, "download", lambda url, **check: asked.update(check, url=url) or str(tmp_path / "official.pth"))
    for name in ("vqkd", str(tmp_path / "official.pth")):
        tokenizer = kmeans.load_tokenizer(name)
        assert torch.equal(tokenizer(pixels), wanted) and len(wanted.unique()) > 5
        assert (tokenizer.features, tokenizer.vocab_size, tokenizer.image_size, tokenizer.metric) == ("vqkd", 50, 24, "cosine")
    assert asked["sha256"] == "d5036aa7" and "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth" in asked["url"]
    tokenizer.save(tmp_path / "own.pt")
    assert torch.equal(kmeans.load_tokenizer(str(tmp_path / "own.pt"))(pixels), wanted)
    plain = kmeans.blank_tokenizer(Toy(), "vqkd", 8, 24)                  # its ViT alone: --features vqkd
    torch.testing.assert_close(plain.rows(pixels), features, atol=1e-4, rtol=1e-4)
    del state["quantize.embedding.weight"]
    torch.save({"model": state}, tmp_path / "official.pth")
    with pytest.raises(ValueError, match="official.pth: not a tokenizer"):
        kmeans.load_tokenizer("vqkd")


def test_fit_tokenizer_draws_the_same_patches_whatever_the_batch_and_from_all_classes(monkeypatch):
    ds = Toy(30)
    a, b = (kmeans.fit_tokenizer(ds, k=5, patch_size=4, fraction=.25, batch_size=size, seed=3) for size in (4, 30))
    torch.testing.assert_close(a.centroids, b.centroids)
    assert a.kmeans.counts.sum() == 30 * 4 and a.vocab_size == 5
    monkeypatch.setattr(kmeans, "available_memory", lambda device: 0)               # nothing fits: the images are streamed instead
    torch.testing.assert_close(kmeans.fit_tokenizer(ds, k=5, patch_size=4, fraction=.25, seed=3).centroids, a.centroids)
    some, _ = kmeans.stream_patches(toy_tokenizer(), ds, 1, 30, 0, 30, 0, torch.device("cpu"))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    own = [V.patchify(ds[int(i)][0][None], 8)[0] for i in order]
    places = {int((patches == row).all(1).nonzero()[0]) for row, patches in zip(next(some()), own)}
    assert places == {0, 1, 2, 3}                                       # not the same corner of every image
    every, n = kmeans.stream_patches(toy_tokenizer(), ds, 4, 30, 0, 7, 0, torch.device("cpu"))
    first = next(every())                                               # of a sorted folder: not its first class only
    early = torch.cat([V.patchify(ds[i][0][None], 8)[0] for i in range(7)])
    assert n == 120 and len(first) == 28 and not torch.equal(first, early)
    everything = torch.cat([V.patchify(ds[i][0][None], 8)[0] for i in range(30)])
    assert sorted(map(tuple, torch.cat(list(every())).tolist())) == sorted(map(tuple, everything.tolist()))


def test_tokenize_writes_the_tokens_and_refuses_those_of_others(tmp_path):
    tokenizer, ds, path = toy_tokenizer(), Toy(10), str(tmp_path / "tokens.npy")
    tokens = kmeans.tokenize(tokenizer, ds, path, batch_size=3)
    assert tokens.dtype == np.uint16 and tokens.shape == (10, 4) and os.listdir(tmp_path) == ["tokens.npy"]
    assert np.array_equal(tokens, tokenizer(torch.stack([ds[i][0] for i in range(10)])))
    ds.reads = 0
    kmeans.tokenize(tokenizer, ds, path)
    assert ds.reads < 10                                                # complete: only looked at
    for other, data in ((toy_tokenizer(), Toy(11)), (toy_tokenizer(p=4), Toy(10))):
        with pytest.raises(ValueError, match="another tokenizer"):
            kmeans.tokenize(other, data, path)
    other = toy_tokenizer()
    other.centroids = other.centroids.flip(0)
    with pytest.raises(ValueError, match="another tokenizer"):
        kmeans.tokenize(other, ds, path)


THIS = os.path.splitext(os.path.basename(__file__))[0]


def test_a_killed_tokenize_goes_on_and_writes_the_same_file(tmp_path, monkeypatch):
    path, whole = str(tmp_path / "tokens.npy"), str(tmp_path / "whole.npy")
    monkeypatch.setattr(kmeans, "SHARD", 8)
    text = f"from {THIS} import *; kmeans.SHARD = 8; kmeans.tokenize(toy_tokenizer(), Toy(60, delay=.05), sys.argv[1], 3)"
    (tmp_path / "slow.py").write_text(text)
    process = Background(tmp_path / "slow.py", path)
    deadline, shards = time.time() + 60, []
    while time.time() < deadline and process.poll() is None and len(shards) < 2:
        shards = [name for name in map(str, tmp_path.glob("tokens.npy.*/*.npy"))]
        time.sleep(.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL and shards and not os.path.exists(path), process.communicate()
    os.remove(tmp_path / "slow.py")
    ds = Toy(60)
    kmeans.tokenize(toy_tokenizer(), ds, path)
    assert 0 < ds.reads < 60                                            # what the first run did was not done again
    kmeans.tokenize(toy_tokenizer(), Toy(60), whole)
    assert open(path, "rb").read() == open(whole, "rb").read()
    assert sorted(os.listdir(tmp_path)) == ["tokens.npy", "whole.npy"]


DISTRIBUTED = f"""
import sys, torch, kmeans, torch.distributed as dist
from {THIS} import *
dist.init_process_group("gloo")
rank = dist.get_rank()
x = rows_of(3001, 6)
mine = x[:1300] if rank == 0 else x[1300:]
out = [KMeans(9, metric=m, init=i, restarts=2, max_iter=9).fit(mine) for m, i in
       (("euclidean", "k-means++"), ("cosine", "random"))]
far = torch.cat([x, torch.full((1, 6), 1e3)])
far = far[:1300] if rank == 0 else far[1300:]
out.append(KMeans(3, init=torch.zeros(3, 6), max_iter=9).fit(far))
tokenizer = kmeans.fit_tokenizer(Toy(15), k=5, patch_size=8, max_iter=5)
tokens = kmeans.tokenize(tokenizer, Toy(15), sys.argv[1] + "/tokens.npy", batch_size=2)
results = [(k.centroids, k.counts, k.inertia) for k in out + [tokenizer.kmeans]]
torch.save(results + [torch.from_numpy(tokens.astype(int))], f"{{sys.argv[1]}}/{{rank}}.pt")
dist.destroy_process_group()
"""


def test_two_processes_are_one(tmp_path):
    (tmp_path / "distributed.py").write_text(DISTRIBUTED)
    finished(Background(tmp_path / "distributed.py", tmp_path, processes=2))
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    x = rows_of(3001, 6)
    alone = [KMeans(9, metric=m, init=i, restarts=2, max_iter=9).fit(x) for m, i in
             (("euclidean", "k-means++"), ("cosine", "random"))]
    alone.append(KMeans(3, init=torch.zeros(3, 6), max_iter=9).fit(torch.cat([x, torch.full((1, 6), 1e3)])))
    tokenizer = kmeans.fit_tokenizer(Toy(15), k=5, patch_size=8, max_iter=5)
    for a, b, one in zip(first, second, alone + [tokenizer.kmeans]):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
        torch.testing.assert_close(a[0], one.centroids, rtol=1e-5, atol=1e-5)
        assert torch.equal(a[1], one.counts) and a[2] == pytest.approx(one.inertia, rel=1e-5)
    kmeans.tokenize(tokenizer, Toy(15), str(tmp_path / "alone.npy"))
    assert torch.equal(first[-1], second[-1])
    assert (tmp_path / "alone.npy").read_bytes() == (tmp_path / "tokens.npy").read_bytes()


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_rows_that_are_not_looked_at_would_not_have_changed(kind, monkeypatch):
    """The bounds spare products and nothing else: every row has its nearest centroid, sums are as if added up anew."""
    x = V.patchify(train.open_dataset("textures", "val").images[:100], 8).flatten(0, 1)
    x = x if kind == torch.uint8 else x.float() / 50
    data, looked_at, multiply = kmeans.Rows(x, 20, rows=1024), [], kmeans.multiply
    monkeypatch.setattr(kmeans, "multiply", lambda x, *w: looked_at.append(len(x)) or multiply(x, *w))
    rows = data.standardize(x).double()
    c = torch.stack([data.standardize(x[:20]), data.standardize(x[-20:])])                # two restarts
    clusters = kmeans.Clusters(data, 2, 20, len(x), rows.mean(0))
    shares = []
    for step in range(40):
        looked_at.clear()
        sums, counts = clusters.run_pass(c)
        for r, labels in enumerate(clusters.labels if step % 7 in (0, 1) else []):
            check_labels(rows, c[r], labels)
            anew = torch.zeros(20, x.shape[1]).double().index_add_(0, labels, x.double())
            torch.testing.assert_close(sums[r], anew, rtol=0, atol=0 if kind == torch.uint8 else 1e-2)
            assert torch.equal(counts[r], labels.bincount(minlength=20).double())
        means = data.scale * sums / counts[..., None] + data.shift
        c = torch.where(counts[..., None] > 0, means, c.double()).float()
        shares.append(sum(looked_at) / clusters.labels.numel())
    assert shares[0] == 1 and min(shares) < .6


def test_bounds_are_tried_on_a_part_of_the_rows():
    """Rows without clusters are near to many centroids: bounds spare nothing there, and must not cost much."""
    x = torch.randn(3200, 200, generator=torch.Generator().manual_seed(0))
    data, c, bounded = kmeans.Rows(x, 20, rows=50), x[None, :20], []
    clusters = kmeans.Clusters(data, 1, 20, len(x), x.double().mean(0))
    for _ in range(15):
        sums, counts = clusters.run_pass(c)
        c = (sums / counts[..., None]).float()
        bounded.append(clusters.candidates.bounded)
    assert set(bounded) == {0, 200} and bounded.count(200) <= 5           # blocks 0, 16, 32, 48; then a pause


TRITON = f"""
import torch, kmeans
from {THIS} import *
torch.manual_seed(0)
for n, d, k, kind in ((1, 3, 2, torch.float32), (130, 17, 33, torch.float32), (129, 40, 150, torch.float32),
                      (150, 260, 20, torch.uint8), (131, 257, 9, torch.bfloat16), (65, 5, 17, torch.float16),
                      (140, 5, 260, torch.uint8)):
    x = rows_of(n, d, kind=kind)
    assert kmeans.use_triton(x.device)
    values = x.double() / 255 if kind == torch.uint8 else x.double()
    c = (values[torch.arange(k) % n] + .1 * torch.randn(k, d)).float()
    labels, distances = assign(x, c)
    check_labels(values, c, labels, distances)
    check_scores(x, c)
check_flat_patches("cpu")
x = 1e5 * rows_of(60, 260, kind=torch.float64)                           # beyond float16
check_labels(x, x[:9].float(), assign(x, x[:9].float())[0])
x = rows_of(40, 4)
assert (assign(x, x.repeat(5, 1))[0] < 40).all()                        # ties between codes of different tiles
x = rows_of(140, 4)
km = KMeans(3, init=x[:3], max_iter=3, tol=0).fit(x)
torch.testing.assert_close(km.centroids.double(), slow_lloyd(x, x[:3], 3)[0], rtol=1e-4, atol=1e-4)
random = KMeans(3, init="random", restarts=3, seed=1)
assert random.fit(x).inertia <= 1.2 * KMeans(3).fit(x).inertia
"""


def test_the_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    process = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, timeout=240, cwd=HERE,
                             env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"})
    errors = process.stderr
    if "interpreter.py" in errors and "only 0-dimensional arrays can be converted" in errors:
        pytest.skip("this Triton's interpreter (3.6) does not work with numpy 2.4 and newer")
    assert process.returncode == 0, errors


def test_kmeans_command_line(tmp_path, capsys):
    images = pytest.importorskip("PIL.Image")
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        array = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        images.fromarray(array).save(tmp_path / "pictures" / f"{i:02}.png")
    data, out = ["--data", str(tmp_path / "pictures"), "--device", "cpu"], str(tmp_path / "out")
    fit = ["fit", *data, "--out", out, "--image-size", "32", "--patch-size", "8", "--k", "6"]
    kmeans.main(fit)
    assert "6 of 6 codes used" in capsys.readouterr().out
    kmeans.main(["tokenize", *data, "--tokenizer", out + "/tokenizer.pt"])      # beside the tokenizer
    kmeans.main(["show", *data, "--out", out, "--tokenizer", out + "/tokenizer.pt", "--rows", "4"])
    assert kmeans.load_tokens(out + "/tokens.npy").shape == (12, 16)
    assert images.open(out + "/codebook.png").size == (13 * 36 + 4, 4 * 36 + 4)        # a centroid and 12 patches a row
    assert images.open(out + "/tokens.png").size == (6 * 164 + 4, 3 * 164 + 4)          # images, token maps, rebuilt
    kmeans.main(["bench", "--n", "3000", "--d", "8", "--k", "4", "9", "--device", "cpu"])
    assert "not run" in (bench := capsys.readouterr().out) and "ratio" in bench and "peak memory" in bench
    names = [kmeans.name_folder(kmeans.parse(["fit", *more], train.check_numbers), 64) for more in (
        [], ["--features", "hog"], ["--metric", "cosine"], ["--features", "runs/a/encoder.pt"], ["--seed", "1"])]
    assert names[0] == "runs/tokenizer-textures-pixel-k64" and len(set(names)) == 5
    assert all(name.count("/") == 1 for name in names)
    before = open(out + "/tokenizer.pt", "rb").read()
    for words, says in (([*fit, "--k", "9999"], "9999 clusters"),
                        ([*fit, "--patch-size", "7"], "patch size 7"),
                        (["tokenize", *data, "--out", out, "--tokenizer", out + "/none.pt"], "none.pt"),
                        (["show", "--data", "nowhere", "--out", out, "--tokenizer", out + "/tokenizer.pt"], "nowhere")):
        with pytest.raises(SystemExit) as error:
            kmeans.main(words)
        message = capsys.readouterr().err
        assert error.value.code == 2 and says in message and message.count("error:") == 1
    assert open(out + "/tokenizer.pt", "rb").read() == before


# --- tcas.py ------------------------------------------------------------------------------------------------------

def random_counts(k=9, c=5, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 40, (k, c)))


def literal_tcas(counts, norm, weighted=False):
    """Eq. 8 with the (K, K) matrix C and explicit sums."""
    r = np.asarray(counts, float)
    r = r[r.sum(1) > 0]
    w = r.sum(1) / r.sum() if weighted else np.full(len(r), 1 / len(r))
    r = r / (np.sqrt((r ** 2).sum(1)) if norm == "l2" else r.sum(1))[:, None]
    c = r @ r.T
    first = sum(w[i] * (1 - c[i, i]) ** 2 for i in range(len(r)))
    second = sum(w[i] * w[j] * c[i, j] ** 2 for i in range(len(r)) for j in range(len(r)) if i != j)
    return first, second


def test_cooccurrence_is_a_count_whatever_holds_the_tokens(tmp_path):
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(7, size=(50, 6)), rng.integers(3, size=50)
    want = np.zeros((7, 3), np.int64)
    for row, label in zip(tokens, labels):
        for token in row:
            want[token, label] += 1
    np.save(tmp_path / "t.npy", tokens.astype(np.uint16))
    kinds = [tokens, torch.from_numpy(tokens), torch.from_numpy(tokens).to(torch.uint16),
             np.load(tmp_path / "t.npy", mmap_mode="r")]
    for kind in kinds:
        for chunk in (1 << 22, 20, 1):                          # all at once, three images at a time, one at a time
            counts = tcas.cooccurrence(kind, labels, 7, 3, chunk=chunk)
            assert counts.dtype == torch.int64 and (counts.numpy() == want).all()
    halves = [tcas.cooccurrence(tokens[part], torch.from_numpy(labels[part]), 7, 3)
              for part in (slice(20), slice(20, 50))]
    assert (sum(halves).numpy() == want).all()


@pytest.mark.parametrize("tokens, labels, what", [
    (np.full((4, 3), 8), [0, 1, 0, 1], "tokens from 8 to 8"),                    # beyond K
    (np.full((4, 3), -1), [0, 1, 0, 1], "tokens from -1"),
    (np.zeros((4, 3), int), [0, 1, 0], "4 images but 3 labels"),
    (np.zeros((4, 3), int), [0, 1, 0, 2], "labels from 0 to 2"),
    (np.zeros((4, 3), int), [0, 1, 0, -1], "labels from -1")])
def test_cooccurrence_refuses_what_does_not_fit(tokens, labels, what):
    with pytest.raises(ValueError, match=what) as error:
        tcas.cooccurrence(tokens, labels, 8, 2)
    assert "\n" not in str(error.value)


def test_tcas_refuses_one_class():
    for counts in (torch.ones(5, 1), torch.tensor([[3, 0], [2, 0]])):            # one column; one that is not empty
        with pytest.raises(ValueError, match="at least 2 classes"):
            tcas.tcas(counts)
    with pytest.raises(ValueError, match="norm"):
        tcas.tcas(torch.eye(3), "l3")


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("weighted", [False, True])
def test_tcas_is_eq_8(norm, weighted):
    for k, c in ((9, 5), (5, 9), (40, 3)):
        counts = random_counts(k, c)
        counts[2] = 0                                                            # a dead code
        first, second = literal_tcas(counts, norm, weighted)
        got = tcas.tcas_terms(counts, norm, weighted, chunk=4)
        assert abs(got["impurity"] - first) < 1e-12 and abs(got["confusion"] - second) < 1e-12
        assert abs(tcas.tcas(counts, norm, weighted) - first - second) < 1e-12
        assert got["used"] == k - 1 and got["dead"] == 1


def test_tcas_never_builds_the_matrix_c():
    counts = random_counts(3000, 4)
    with Largest() as largest:
        tcas.tcas(counts)
    assert largest.size < 3000 * 3000                                            # bytes: not even one an entry


def test_tcas_by_hand():
    """Rows (3, 1) and (0, 2): cosine 1/sqrt(10); as distributions (3/4, 1/4) and (0, 1)."""
    counts = torch.tensor([[3, 1], [0, 2]])
    assert math.isclose(tcas.tcas(counts), 2 / 4 * (1 / 10))                     # two ordered pairs, lambda_2 = 1/4
    assert math.isclose(tcas.tcas(counts, "l1"), (1 - 10 / 16) ** 2 / 2 + 2 / 4 * (1 / 4) ** 2)
    assert math.isclose(tcas.tcas(counts, weighted=True), 2 * (4 / 6) * (2 / 6) * (1 / 10))
    shares = np.array([4, 2]) / 6
    assert math.isclose(tcas.tcas_terms(counts)["perplexity"], math.exp(-(shares * np.log(shares)).sum()))


def test_tcas_values_that_are_known():
    k, c = 7, 5
    same = torch.arange(1, c + 1).repeat(k, 1)
    assert math.isclose(tcas.tcas(same), 1 - 1 / k)                                             # identical rows
    assert math.isclose(tcas.tcas(torch.ones(k, c), "l1"), (1 - 1 / c) ** 2 + (1 - 1 / k) / c ** 2)     # uniform rows
    assert tcas.tcas(torch.eye(c)) == tcas.tcas(torch.eye(c), "l1") == 0                        # labels as tokens
    shared = torch.eye(100).repeat(10, 1)                                                       # 1000 pure tokens
    assert math.isclose(tcas.tcas(shared), 1 / 100 - 1 / 1000) and math.isclose(tcas.tcas(shared, "l1"), .009)
    dead = torch.cat([random_counts(), torch.zeros(30, 5, dtype=torch.int64)])
    assert math.isclose(tcas.tcas(dead), tcas.tcas(random_counts()))                      # dead codes do not count
    # What l2 cannot see and l1 can: a token that lumps two classes together (the docstring's warning).
    lumped = torch.tensor([[1, 1, 0], [0, 0, 2]])
    assert tcas.tcas(lumped) < 1e-15 and tcas.tcas(torch.tensor([[1, 1, 2]])) < 1e-15 and tcas.tcas(lumped, "l1") > .1


def test_tcas_ignores_the_names_of_tokens_and_classes():
    counts = random_counts(20, 6)
    rng = np.random.default_rng(1)
    for norm in ("l2", "l1"):
        for _ in range(5):
            shuffled = counts[rng.permutation(20)][:, rng.permutation(6)]
            assert math.isclose(tcas.tcas(shuffled, norm), tcas.tcas(counts, norm), rel_tol=1e-12)
        assert math.isclose(tcas.tcas(counts * 7, norm), tcas.tcas(counts, norm), rel_tol=1e-12)   # the same, 7 times


def test_few_patches_look_like_alignment():
    """The warning of `tcas_terms`: random tokens, p patches per (token, class)."""
    for p in (.25, 1, 30):
        counts = torch.from_numpy(np.random.default_rng(0).poisson(p, (400, 50)))
        assert abs(tcas.tcas(counts) - (p / (1 + p)) ** 2) < .03


def test_codebook_in_words():
    """Random tokens of K = 50, 10 classes: TCAS near 1 - 1/K; none without labels of two classes."""
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(50, size=(2000, 100)), np.arange(2000) % 10              # 400 patches a cell
    (codebook, score), entropy = tcas.describe_codebook(tokens, labels, 50)
    assert codebook.startswith("codebook: 50 of 50 codes used, perplexity 5") and "ln 50 = 3.912" in codebook
    own, shuffled = map(float, re.findall(r"(?:TCAS|tokens) (\d\.\d+)", score))
    assert abs(own - .98) < .03 and abs(shuffled - .98) < .03
    aligned = labels[:, None].repeat(100, 1)
    assert tcas.describe_codebook(aligned, labels, 50)[0][1].startswith("TCAS 0.000, of random tokens 0.8")
    for unknown in (None, np.full(2000, -1), np.zeros(2000, int)):                         # none, none, one class
        assert tcas.describe_codebook(tokens, unknown, 50) == ([codebook], entropy)
    skewed = np.array([[0, 0, 0, 1]])                                                      # entropy of (3/4, 1/4)
    assert "2 of 8 codes used, perplexity 1.8; " in tcas.describe_codebook(skewed, None, 8)[0][0]
    assert "ln 8 = 2.079, one by code frequency 0.562" in tcas.describe_codebook(skewed, None, 8)[0][0]


def score_imagenet_sized():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(16384, (20000, 196), generator=generator).to(torch.uint16)
    labels = torch.randint(1000, (20000,), generator=generator)
    memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss          # the most so far, in kB
    before, start = memory(), time.time()
    value = tcas.tcas(tcas.cooccurrence(tokens, labels, 16384, 1000))
    return value, time.time() - start, memory() - before


def test_imagenet_sized_codebook_is_fast_and_small():
    with torch.multiprocessing.get_context("fork").Pool(1) as pool:              # a fresh process has its own maximum
        value, seconds, kilobytes = pool.apply_async(score_imagenet_sized).get(60)
    assert seconds < 10 and 1e5 < kilobytes < 1e6 / 2, (seconds, kilobytes)      # bar: 10 s, 1 GB
    assert .03 < value < .05                                                     # (p / (1 + p))^2, p = 0.24


def test_paper_table_7():
    """TCAS and linear probe of the paper's 16 tokenizers: the "r-value 0.85" is r^2, r itself is -0.92."""
    score = [.69, .60, .66, .56, .56, .21, .52, .34, .15, .09, .49, .39, .12, .77, .86, .69]
    linear = [42.7, 48.3, 47.2, 52.5, 52.7, 58.2, 50.1, 52.3, 59.7, 64.8, 50.8, 50.6, 56.9, 44.3, 41.2, 50.3]
    r, slope, intercept = tcas.fit_line(score, linear)
    assert abs(r + .920) < 5e-4 and abs(r * r - .8455) < 5e-4
    assert abs(slope + 23.96) < 5e-3 and abs(intercept - 62.94) < 5e-3
    with pytest.raises(ValueError, match="at least 3"):
        tcas.fit_line([.1, .2], [1, 2])


def test_bag_of_tokens():
    rng = np.random.default_rng(0)
    labels, held = rng.integers(4, size=800), rng.integers(4, size=400)
    noisy = lambda y: rng.integers(16, size=(len(y), 9))
    make = lambda y, noise: np.where(rng.random((len(y), 9)) < noise, noisy(y), y[:, None] * 4)
    right = lambda noise: tcas.bag_accuracy(make(labels, noise), labels, 16, 4, (make(held, noise), held))
    assert right(0) == 1 and .6 < right(.8) < .9
    assert abs(right(1) - .25) < .08                                             # tokens that know nothing: chance
    assert abs(tcas.bag_accuracy(make(labels, 1), labels, 16, 4) - .25) < .12    # also on the fifth that it holds out
    alone = np.arange(800)[:, None].repeat(9, 1)                                 # a token per image: learnt by heart,
    assert tcas.bag_accuracy(alone, labels, 800, 4) < .4                         # and no use for the fifth held out
    order = rng.permuted(make(held, .8), axis=1)                                 # a bag: the order of patches is lost
    fit = make(labels, .8)
    assert tcas.bag_accuracy(fit, labels, 16, 4, (order, held)) == tcas.bag_accuracy(
        rng.permuted(fit, axis=1), labels, 16, 4, (np.sort(order, 1), held))


# --- tcas.py: the toy model ---------------------------------------------------------------------------------------

WORLDS = [(2, 6, 2), (2, 10, 2), (2, 20, 4), (2, 40, 4), (3, 12, 2), (3, 20, 4), (4, 16, 2)]      # C, n, l


def test_mask_graph_is_the_drawing_of_app_b():
    """M by listing every draw (class, x1, x2); A by its sum over tokens; for a world with three classes."""
    classes, n, overlap = 3, 8, 2
    groups, z = tcas.populations(n, overlap, classes)
    assert len(z) == classes * n - overlap * 3 and (z.sum(0) == n).all() and ((z.T @ z)[0, 1:] == overlap).all()
    tokens = tcas.assignment("classwise", groups)
    mask = np.zeros((len(z), len(z)))
    for c in range(classes):
        members = [x for x in range(len(z)) if z[x, c]]
        for x1, x2 in itertools.product(members, members):
            mask[x1, x2] += 1 / (classes * n * n)
    a = np.zeros_like(mask)
    for s in range(classes):
        inside = [x for x in range(len(z)) if tokens[x] == s]
        d = mask[:, inside].sum()
        for x, y in itertools.product(range(len(z)), range(len(z))):
            a[x, y] += mask[x, inside].sum() * mask[y, inside].sum() / d
    toy = tcas.toy_model(n, overlap, "classwise", classes)
    assert np.allclose(tcas.mask_graph(z), mask, atol=1e-15) and np.allclose(toy["graph"], a, atol=1e-15)
    to_token = np.stack([mask[:, tokens.numpy() == s].sum(1) for s in range(classes)], 1)
    assert np.allclose(toy["to_token"], to_token, atol=1e-15)
    d = mask.sum(1)
    eigenvalues = np.linalg.eigvalsh(a / np.sqrt(np.outer(d, d)))
    assert np.allclose(toy["spectrum"], eigenvalues[::-1], atol=1e-12)
    assert math.isclose(toy["sum"], (eigenvalues ** 2).sum())
    label = z.numpy() / z.numpy().sum(1, keepdims=True)
    wrong = sum(a[x, y] * label[x, i] * label[y, j] for x, y in itertools.product(range(len(z)), range(len(z)))
                for i, j in itertools.permutations(range(classes), 2))
    assert math.isclose(toy["alpha"], wrong) and math.isclose(a.sum(), 1)


@pytest.mark.parametrize("classes, n, overlap", WORLDS)
def test_algebra_equals_brute_force(classes, n, overlap):
    c, r, kappa = classes, overlap / n, 1 - classes * overlap / (2 * n)
    closed = {      # sum, alpha, w_in C n^2, w_x C n^2
        "mae": (1 + (c - 1) * kappa ** 4, (c - 1) / c * (1 - kappa ** 3), 1 - (c - 1) * r / 2, r / 2),
        "classwise": (1 + (c - 1) * kappa ** 6, (c - 1) / c * (1 - kappa ** 4),
                      (1 - (c - 1) * r / 2) ** 2 + (c - 1) * r ** 2 / 4, r - c * r ** 2 / 4),
        "crossclass": (1, (c - 1) / c, 1 / c, 1 / c)}
    for name, (total, alpha, w_in, w_x) in closed.items():
        brute = tcas.toy_model(n, overlap, name, c)
        want = {"sum": total, "alpha": alpha, "w_in": w_in / (c * n * n), "w_x": w_x / (c * n * n)}
        algebra = tcas.closed_form(n, overlap, name, c)
        for key, value in want.items():
            assert abs(brute[key] - value) < 1e-9 and abs(algebra[key] - value) < 1e-9
        assert brute["tail"] < 1e-9                                              # C eigenvalues, no tail, in this graph
        assert math.isclose(brute["bound"], brute["sum"] + c * brute["alpha"])   # c1 = 1, c2 = C unless told


def test_toy_numbers():
    for (classes, n, overlap), want in {
            (2, 10, 2): {"mae": (1.4096, .244, .0045, .0005), "classwise": (1.262144, .2952, .0041, .0009),
                         "crossclass": (1, .5, .0025, .0025)},
            (3, 20, 4): {"mae": (1.4802, .4380), "classwise": (1.235298, .5066), "crossclass": (1, 2 / 3)}}.items():
        for name, numbers in want.items():
            toy = tcas.toy_model(n, overlap, name, classes)
            digits = 1e-9 if classes == 2 else 5e-5
            assert all(abs(toy[key] - value) < digits for key, value in zip(("sum", "alpha", "w_in", "w_x"), numbers))
    bounds = [round(tcas.toy_model(20, 2, name, c1=1, c2=2)["bound"], 4) for name in tcas.TOKENIZERS]
    assert bounds == [1.9271, 1.8753, 2]                                         # r = 0.1


def test_any_tokenizer_and_what_merging_tokens_does():
    """Random tokenizers of 2 classes: algebra = brute force; none has smaller w_x, larger w_in or smaller alpha than
    MAE; merging two tokens lowers every eigenvalue and raises alpha."""
    rng = np.random.default_rng(0)
    mae = tcas.toy_model(10, 2)
    for _ in range(40):
        tokens = rng.integers(rng.integers(2, 12), size=18)
        brute, algebra = tcas.toy_model(10, 2, tokens.tolist()), tcas.closed_form(10, 2, tokens.tolist())
        assert all(abs(brute[key] - algebra[key]) < 1e-9 for key in algebra)
        assert brute["w_x"] > mae["w_x"] - 1e-12 and brute["w_in"] < mae["w_in"] + 1e-12
        assert brute["alpha"] > mae["alpha"] - 1e-12
        coarser = tcas.toy_model(10, 2, np.where(tokens == tokens.max(), tokens.min(), tokens).tolist())
        assert (coarser["spectrum"] < brute["spectrum"] + 1e-12).all() and coarser["alpha"] > brute["alpha"] - 1e-12


@pytest.mark.parametrize("classes, n, overlap", WORLDS)
def test_windows_of_the_bounds(classes, n, overlap):
    kappa = 1 - classes * overlap / (2 * n)
    mae, own, cross = (tcas.toy_model(n, overlap, name, classes) for name in tcas.TOKENIZERS)
    low, high = tcas.window(mae, cross)
    assert math.isclose(low, classes * kappa) and high == math.inf
    low, high = tcas.window(own, mae)
    assert low == 0 and math.isclose(high, classes * kappa * (1 + kappa))
    for factor, better in ((.99, True), (1.01, False)):                          # the bound itself turns there
        own, mae = (tcas.toy_model(n, overlap, name, classes, c2=high * factor) for name in ("classwise", "mae"))
        assert (own["bound"] < mae["bound"]) == better


def test_partitions_are_all_and_once():
    for points, bell in enumerate((1, 1, 2, 5, 15, 52, 203)):
        found = [tuple(tokens) for tokens in tcas.partitions(points)]
        assert len(found) == len(set(found)) == bell
        assert all(tokens[i] <= max(tokens[:i], default=-1) + 1 for tokens in found for i in range(points))


def test_theorem_1_holds_from_a_ratio_on():
    """All 203 tokenizers of 3 + 3 points: the labels minimise c1 sum + c2 alpha if and only if c2/c1 >= 4 - 2/n."""
    _, z = tcas.populations(3, 0, 2)
    mask = tcas.mask_graph(z)
    found, tried = tcas.theorem1(mask, z)
    assert tried == 203 and math.isclose(found["sum"][0], 4 - 2 / 3) and found["sum"][1] == math.inf
    assert found["tail"] == (0, math.inf)                                        # with the tail: whatever c1, c2
    every = [tcas.describe(mask, z, torch.tensor(tokens)) for tokens in tcas.partitions(6)]
    label = tcas.describe(mask, z, z.argmax(1))
    best = lambda c2: min(one["sum"] + c2 * one["alpha"] for one in every)
    for c2, smallest in ((1, False), (3.3, False), (3.34, True), (10, True)):
        assert (label["sum"] <= best(c2) + 1e-9) == smallest
    pure = [one["sum"] for one in every if one["alpha"] < 1e-12]
    assert len(pure) == 25 and np.allclose(pure, 2)                              # 5 x 5 within-class ones, all tie
    _, z = tcas.populations(2, 0, 2)
    assert math.isclose(tcas.theorem1(tcas.mask_graph(z), z)[0]["sum"][0], 4 - 2 / 2)


def test_theorem_1_on_a_random_graph():
    """M > 0 inside the classes only, otherwise random: of the tokenizers without labelling error, labels are best."""
    weights = torch.rand(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, z = tcas.populations(3, 0, 2)
    mask = (weights + weights.T) * (z @ z.T)
    mask /= mask.sum()
    label = tcas.describe(mask, z, z.argmax(1))
    every = [tcas.describe(mask, z, torch.tensor(tokens)) for tokens in tcas.partitions(6)]
    pure = [one for one in every if one["alpha"] < 1e-12]
    assert len(pure) == 25 and label["sum"] <= min(one["sum"] for one in pure) + 1e-12 and abs(label["sum"] - 2) < 1e-9
    found, _ = tcas.theorem1(mask, z)
    assert 2 < found["sum"][0] < 4 and found["tail"] == (0, math.inf)


@pytest.mark.parametrize("width, name, total, tail, alpha, linked", [
    (1, "mae", 5.6296, 3.6296, 0, 5 / 12), (1, "classwise", 2, 0, 0, 1), (1, "crossclass", 1.0123, 0, .5, 1),
    (1, "pairs", 4.8889, 2.8889, 0, 1 / 2), (2, "mae", 3.264, 1.264, 0, 3 / 4), (2, "classwise", 2, 0, 0, 1),
    (2, "crossclass", 1.0016, 0, .5, 1)])
def test_ring(width, name, total, tail, alpha, linked):
    toy = tcas.toy_model(12, 0, name, graph="ring", width=width)
    for key, value in dict(sum=total, tail=tail, alpha=alpha, linked=linked).items():
        assert abs(toy[key] - value) < 5e-5, (key, toy[key])


def test_claims_in_words():
    def said(n, overlap, graph):
        toys = {name: tcas.toy_model(n, overlap, name, graph=graph) for name in tcas.TOKENIZERS}
        none = {"sum": (0, math.inf), "tail": (0, math.inf)}
        return {claim: tcas.verdict(*limits) for claim, limits in tcas.claims(toys, none, 203)}
    complete, ring = said(10, 2, "complete"), said(12, 0, "ring")
    raises = "class-wise tokens raise the weights inside a class above MAE's"
    assert complete[raises] == ring[raises] == "NOT TRUE"
    assert complete["class-wise tokens lower the weights between classes below MAE's"] == "NOT TRUE"
    assert complete["cross-class tokens have larger weights between classes than class-wise"] == "EXACTLY TRUE"
    assert complete["bound: class-wise < MAE < cross-class"] == "TRUE IF 1.6 < c2/c1 < 2.88"
    assert complete["tail bound: class-wise < MAE"] == "NOT TRUE"
    assert ring["tail bound: class-wise < MAE"] == "EXACTLY TRUE"
    assert ring["class-wise tokens link more pairs of one class than MAE"] == "EXACTLY TRUE"
    assert ring["tail bound: MAE < cross-class"] == "TRUE IF 7.259 < c2/c1"      # c2/2 > c1 tail_MAE


# --- tcas.py: the commands ----------------------------------------------------------------------------------------

def command(*argv):
    """Exit code, standard output and error of tcas.py with these flags, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            tcas.main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def test_toy_command(tmp_path):
    picture = tmp_path / "new" / "toy.png"
    code, out, err = command("toy", "--out", picture, "--assign", *[0] * 9, *[1] * 9)
    assert code == 0 and not err and "8 of class 0, 2 of class 0 and 1, 8 of class 1" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["mae"][:4] == ["0.0045000", "0.0005000", "1.4096000", "0.2440000"]
    assert rows["yours"] == rows["classwise"]
    assert out.count("algebra") == 4 and "TRUE IF 3.333 < c2/c1" in out
    panels = np.split(np.asarray(Image.open(picture).convert("RGB"), float), 4, axis=1)     # mae, class, cross, yours
    assert np.array_equal(panels[1], panels[3]) and not np.array_equal(panels[0], panels[1])
    corner = lambda panel: panel[-60:-20, 40:80].mean()             # weights between classes, darker = larger
    assert corner(panels[0]) > corner(panels[1]) > corner(panels[2])
    code, out, _ = command("toy", "--graph", "ring", "--n", 12, "--out", picture)
    assert code == 0 and "24 points" in out and "pairs" in out and "all 4140" in out


@pytest.mark.parametrize("flags, what", [
    (["--n", 9, "--overlap", 2], "halve groups"), (["--classes", 1], "2 classes"), (["--overlap", 10], "overlap < n"),
    (["--assign", 0, 1], "2 tokens for 18 points"), (["--graph", "ring", "--overlap", 2], "--overlap 0"),
    (["--graph", "ring", "--width", 6], "--width"), (["--n", 10 ** 9], "2000 points")])
def test_toy_command_refuses_in_one_line(tmp_path, flags, what):
    code, _, err = command("toy", "--out", tmp_path / "toy.png", *flags)
    assert code == 2 and what in err and err.count("\n") == 1 and err.startswith("tcas.py: error: ")
    assert not (tmp_path / "toy.png").exists()


def test_numbers_of_both_commands_are_checked(tmp_path, capsys):
    for flags, what in [(["toy", "--c2", -1], "--c2"), (["toy", "--c1", "nan"], "--c1"), (["toy", "--n", 0], "--n"),
                        (["toy", "--overlap", -1], "--overlap"), (["toy", "--assign", 0, -1], "--assign"),
                        (["score", "--images", 0], "--images"), (["score", "--batch-size", -2], "--batch-size")]:
        refused(tcas.main, flags + ["--out", tmp_path / "toy.png"] * (flags[0] == "toy"), capsys, what)
    for both in (dict(c1=0), dict(c2=-1)):
        with pytest.raises(ValueError, match="positive"):
            tcas.toy_model(10, 2, **both)


@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    """A folder of pictures, 2 classes (dark, bright), and pixel tokenizers of K = 2, 4 and 8 grey levels."""
    root, rng = tmp_path_factory.mktemp("dots"), np.random.default_rng(0)
    for split, m in (("train", 40), ("val", 20)):
        for i in range(m):
            folder = root / split / ("dark", "bright")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.kron(rng.integers(*((0, 160), (96, 256))[i % 2], (4, 4)), np.ones((4, 4)))
            Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(folder / f"{i}.png")
    for k in (2, 4, 8):
        gray = ((torch.arange(k) + .5) * 256 / k / 255 - .5) / .5   # normalized with mean and deviation 0.5
        tokenizer = kmeans.KMeansTokenizer("pixel", gray[:, None].expand(-1, 48), "euclidean", 4, 16, [.5] * 3, [.5] * 3)
        tokenizer.save(str(root / f"k{k}.pt"))
    return root


def table(out):
    """[(name, [K, used, perplexity, TCAS l2, TCAS l1, bag])] of the table that `score` prints."""
    rows = [line.split() for line in out.splitlines() if line and line.split()[-1].replace(".", "").isdigit()]
    return [(" ".join(row[:-6]), [float(value) for value in row[-6:]]) for row in rows if len(row) > 6 and "left" not in row]


def test_score_command(dots, tmp_path):
    np.save(tmp_path / "t.npy", (np.arange(40 * 16).reshape(40, 16) % 4).astype(np.uint16))
    code, out, err = command("score", "--data", dots, "--tokenizer", dots / "k2.pt", dots / "k8.pt",
                             "--tokens", tmp_path / "t.npy")
    assert code == 0, err
    k2, k8, file, labels, *random = table(out)
    assert [row[1][0] for row in random] == [2, 4, 8] and all(name == "random tokens" for name, _ in random)
    assert labels == ("labels as tokens", [2, 2, 2, 0, 0, 1])
    assert k8[1][0] == 8 and k8[1][5] > .9                          # bag of tokens: dark from bright
    assert abs(file[1][3] - (1 - 1 / 4)) < .01                      # the same counts in both classes: identical rows
    assert k2[1][3] < random[0][1][3] - .2 and k8[1][3] < random[2][1][3] - .2
    shutil.copytree(dots / "train", tmp_path / "swapped" / "train")
    for one, other in (("dark", "bright"), ("bright", "dark")):     # a test split of wrong labels: that is what scores
        shutil.copytree(dots / "val" / one, tmp_path / "swapped" / "val" / other)
    code, out, err = command("score", "--data", tmp_path / "swapped", "--tokenizer", dots / "k8.pt", "--images", 10)
    swapped, *_, random = table(out)
    assert code == 0 and swapped[1][5] < .1 and swapped[1][2:4] != k8[1][2:4]                  # 10 images, not 40
    assert random[1][1] == 8 and random[1][2] > 7                   # all K codes, evenly


def write_run(folder, tokenizer, linear, objective="mapet", **summary):
    """A folder as train.py leaves it: tokenizer.pt (unless it was given tokens) and metrics.jsonl."""
    folder.mkdir()
    if tokenizer:
        (folder / "tokenizer.pt").write_bytes(tokenizer.read_bytes())
    data = str(tokenizer.parent) if tokenizer else None
    given = dict(summary=True, linear=linear, knn=.3, objective=objective, seed=0, tokens=None, step=9, steps=9, data=data)
    lines = [{"step": 1, "loss": 2.}, {**given, **summary}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_probes(dots, tmp_path):
    """A point is a tokenizer: the mean of its runs (here two of k8.pt), or a token file that a run was given."""
    np.save(tmp_path / "given.npy", np.arange(640, dtype=np.uint16).reshape(40, 16) % 3)
    for i, (k, linear) in enumerate(((2, .5), (4, .7), (8, .9), (8, .7))):
        write_run(tmp_path / f"run{i}", dots / f"k{k}.pt", linear)
    write_run(tmp_path / "run4", None, .6, tokens=str(tmp_path / "given.npy"), data=f"{dots}/")
    write_run(tmp_path / "stopped", dots / "k2.pt", .1, step=5)
    write_run(tmp_path / "other", dots / "k2.pt", .1, data="textures")
    (tmp_path / "run5").mkdir()
    runs, picture = [tmp_path / f"run{i}" for i in range(6)], tmp_path / "pictures" / "tcas.png"
    runs += [tmp_path / "stopped", tmp_path / "other"]
    code, out, err = command("score", "--data", dots, "--probes", *runs[:4], *runs[5:], "--out", picture)
    assert code == 0, err
    assert "run5: left out" in out and "\nmapet, 9 steps: linear probe = " in out and f"drawn in {picture}" in out
    assert "stopped: left out, it stopped at step 5 of 9" in out and "other: left out, its data are textures" in out
    assert Image.open(picture).size[0] == 900
    x = [row[3] for name, row in table(out) if "run" in name]
    r = np.corrcoef(x, [50, 70, 80])[0, 1]
    printed = float(out.split("Pearson r = ")[1].split(",")[0])
    intercept = float(out.split("linear probe = ")[1].split()[0])   # in %; x is printed with three digits
    assert len(x) == 3 and abs(printed - r) < .02 and abs(intercept - np.polyfit(x, [50, 70, 80], 1)[1]) < 1, (out, r)
    code, out, err = command("score", "--data", dots, "--probes", *runs, "--out", picture)
    assert code == 0 and "4 tokenizers" in out, err
    code, _, err = command("score", "--data", dots, "--probes", runs[0], runs[2], runs[3], runs[5])
    assert code == 2 and "3 tokenizers" in err and err.count("\n") == 1


def test_probes_of_different_objectives_have_their_own_lines(dots, tmp_path):
    """mapet's accuracy falls with TCAS, mae's rises, cae has two runs, mim's three have one tokenizer."""
    for i, k in enumerate((2, 4, 8)):
        write_run(tmp_path / f"mapet{i}", dots / f"k{k}.pt", .3 + .1 * i, objective="mapet")
        write_run(tmp_path / f"mae{i}", dots / f"k{k}.pt", .9 - .1 * i, objective="mae")
        write_run(tmp_path / f"mim{i}", dots / "k4.pt", .1 * i, objective="mim")
    for i in range(2):
        write_run(tmp_path / f"cae{i}", dots / f"k{4 * i + 4}.pt", .2, objective="cae")
    (tmp_path / "mae0" / "metrics.jsonl").open("a").write('{"step": 7, "lo')              # killed while it wrote
    picture = tmp_path.parent / "lines.png"
    code, out, err = command("score", "--data", dots, "--images", 20, "--probes", *sorted(tmp_path.iterdir()),
                             "--out", picture)
    assert code == 0, err
    said = {line.split(",")[0]: line for line in out.splitlines() if re.match("(mapet|mae|cae|mim), 9 steps: ", line)}
    assert "left out" in said["cae"] and "2 tokenizers" in said["cae"] and "left out" in said["mim"]
    score = np.array([row[3] for name, row in table(out) if "mapet" in name])             # as printed, three digits
    for name, linear in (("mapet", [30, 40, 50]), ("mae", [90, 80, 70])):
        r = float(said[name].split("Pearson r = ")[1].split(",")[0])
        assert abs(r - np.corrcoef(score, linear)[0, 1]) < .02 and "3 tokenizers" in said[name]
    code, _, err = command("score", "--data", dots, "--probes", *[tmp_path / f"{name}{i}" for name in ("mapet", "mae")
                                                                  for i in range(2)])
    assert code == 2 and "3 tokenizers or more with runs of one objective" in err and err.count("\n") == 1


def test_score_of_some_classes(dots, tmp_path):
    """--classes FILE, as in train.py: of three class folders two count, and both splits have them only."""
    shutil.copytree(dots, tmp_path / "three")
    for split in ("train", "val"):
        shutil.copytree(dots / split / "dark", tmp_path / "three" / split / "aaa")
    (tmp_path / "keep.txt").write_text("dark\nbright\n")
    score = lambda *flags: table(command("score", "--tokenizer", dots / "k8.pt", *flags)[1])
    two = score("--data", dots)
    assert len(two) == 3 and score("--data", tmp_path / "three", "--classes", tmp_path / "keep.txt") == two
    assert score("--data", tmp_path / "three") != two
    code, _, err = command("score", "--data", dots, "--tokenizer", dots / "k8.pt", "--classes", tmp_path / "k")
    assert code == 2 and str(tmp_path / "k") in err and err.count("\n") == 1


def test_score_of_a_part_of_the_images(dots, tmp_path):
    """--images means the same ones for stored tokens as for a tokenizer."""
    ds = train.open_dataset(str(dots), "train", 16)
    kmeans.tokenize(kmeans.load_tokenizer(str(dots / "k8.pt")), ds, str(tmp_path / "tokens.npy"))
    some = "score", "--data", dots, "--images", 10
    (_, by_tokenizer), *_ = table(command(*some, "--tokenizer", dots / "k8.pt")[1])
    (_, by_tokens), *_ = table(command(*some, "--tokens", tmp_path / "tokens.npy", "--vocab-size", 8)[1])
    (_, by_all), *_ = table(command("score", "--data", dots, "--tokens", tmp_path / "tokens.npy", "--vocab-size", 8)[1])
    assert by_tokens[:5] == by_tokenizer[:5] != by_all[:5]


def test_score_reads_images_at_the_size_that_the_tokenizer_wants(dots, monkeypatch):
    """k-CLIP has image_size 224 and input_size 448; here a stand-in of 16 and 32 pixels."""
    class Wide(nn.Module):
        vocab_size, image_size, input_size = 4, 16, 32

        def forward(self, images):
            assert images.shape[1:] == (3, 32, 32)
            return images[:, 0, ::8, ::8].flatten(1).long() // 64
    monkeypatch.setattr(kmeans, "load_tokenizer", lambda path: Wide())
    code, out, err = command("score", "--data", dots, "--tokenizer", "wide.pt")
    assert code == 0 and table(out)[0][1][:2] == [4, 4], err


def test_score_command_refuses_in_one_line(dots, tmp_path):
    np.save(tmp_path / "short.npy", np.zeros((39, 16), np.uint16))
    np.save(tmp_path / "big.npy", np.full((40, 16), 9, np.uint16))
    (tmp_path / "one" / "train" / "only").mkdir(parents=True)
    (tmp_path / "one" / "train" / "only" / "0.png").write_bytes((dots / "train" / "dark" / "0.png").read_bytes())
    for flags, what in [
            ([], "nothing to score"),
            (["--tokens", tmp_path / "short.npy"], "39 images but 40 labels"),
            (["--tokens", tmp_path / "big.npy", "--vocab-size", 8], "outside 0..7"),
            (["--tokens", tmp_path / "missing.npy"], "missing.npy"),
            (["--tokenizer", tmp_path / "big.npy"], "big.npy"),
            (["--data", tmp_path / "one", "--tokenizer", dots / "k2.pt"], "2 classes"),
            (["--data", dots / "train" / "dark", "--tokenizer", dots / "k2.pt"], "no labels"),
            (["--data", tmp_path / "nowhere", "--tokenizer", dots / "k2.pt"], "nowhere")]:
        data = [] if "--data" in flags else ["--data", dots]
        code, out, err = command("score", *data, *flags)
        assert code == 2 and what in err and err.strip().count("\n") == 0, (flags, err)


@functools.cache
def some_textures():
    ds = train.open_dataset("textures", "val")
    ds.images, ds.labels = ds.images[:500], ds.labels[:500]
    return ds


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_of_tokenizers_on_textures(seed):
    """labels < K-means on HOG < K-means on pixels < random tokens, with room between them."""
    ds = some_textures()
    scores = [0.]
    for features in ("hog", "pixel"):
        tokenizer = kmeans.fit_tokenizer(ds, features, 16, patch_size=8, max_iter=10, seed=seed)
        scores.append(tcas.tcas(tcas.cooccurrence(tokenizer(ds.images), ds.labels, 16, 10)))
    labels = torch.from_numpy(ds.labels)
    random = torch.randint(16, (500, 36), generator=torch.Generator().manual_seed(seed))
    scores.append(tcas.tcas(tcas.cooccurrence(random, labels, 16, 10)))
    scores[0] = tcas.tcas(tcas.cooccurrence(labels[:, None].repeat(1, 36), labels, 10, 10))
    assert scores[0] == 0 and .1 < scores[1] < scores[2] - .1 < scores[3] - .2, scores


# --- objectives.py ------------------------------------------------------------------------------------------------

TOKEN_OBJECTIVES = ["clustermim", "cae", "beit", "mim", "pim", "mapet"]
# Every objective in every form: (name, target)
FORMS = [("mae", "pixel"), ("mae", "pixel-norm"), ("maskfeat", "hog"), ("maskfeat", "features")]
FORMS += [(name, None) for name in TOKEN_OBJECTIVES]


def example(name, target=None, b=2, k=11, **how):
    """A small objective, and images (b, 3, 24, 24), what it needs (tokens, features, nothing), and an order for it."""
    model = objectives.make(name, tiny(), k if model_needs(name, target) else None, target=target, **how)
    images, order = torch.randn(b, 3, 24, 24), objectives.random_order(b, 9)
    given = {"tokens": torch.randint(k, (b, 9)), "features": torch.randn(b, 9, k), None: None}[model.needs]
    return model, images, given, order


def model_needs(name, target):
    return "features" if target == "features" else None if target else "tokens"


def literal_blocks(rng, n, grid=14, least=16):
    """BEiT's Algorithm 1 and released code, patch by patch: the mask (grid, grid) and the number of blocks."""
    mask, blocks = np.zeros((grid, grid), bool), 0
    while mask.sum() < n:
        remaining, new = n - mask.sum(), 0
        for _ in range(10):
            area = rng.uniform(least, remaining) if remaining >= least else rng.uniform(remaining, least)
            aspect = math.exp(rng.uniform(math.log(.3), math.log(1 / .3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < grid and w < grid:
                top, left = rng.integers(0, grid - h + 1), rng.integers(0, grid - w + 1)
                cells = [(y, x) for y in range(top, top + h) for x in range(left, left + w) if not mask[y, x]]
                if 1 <= len(cells) <= remaining:
                    for y, x in cells:
                        mask[y, x] = True
                    new = len(cells)
                    break
        if not new:
            break
        blocks += 1
    return mask, blocks


def boundary(mask):
    """How many neighboring pairs of patches are parted by the edge of the mask (m, g, g): few, if it is made of blocks."""
    return float(((mask[:, 1:] != mask[:, :-1]).sum() + (mask[:, :, 1:] != mask[:, :, :-1]).sum()) / len(mask))


@pytest.mark.parametrize("n", [75, 98])
def test_block_masks_are_those_of_beit(n):
    """The same distribution as the literal algorithm: hidden patches, how often exactly n, where, and how ragged."""
    rng = np.random.default_rng(0)
    slow = torch.tensor(np.array([literal_blocks(rng, n)[0] for _ in range(1500)]))
    fast = objectives.blockwise_mask(6000, 14, n, generator=torch.Generator().manual_seed(0), exact=False).view(-1, 14, 14)
    count = lambda mask: mask.sum((1, 2)).float()
    assert abs(count(fast).mean() - count(slow).mean()) < .15 and abs(count(fast).mean() - (n - .5)) < .1
    assert count(fast).max() == n and n - 20 <= count(fast).min() <= n - 6
    share = lambda mask: float((count(mask) == n).float().mean())
    assert abs(share(fast) - share(slow)) < .045 and .64 < share(fast) < .73      # of the literal one: 68.5 and 71 % of 1500 draws
    assert (fast.float().mean(0) - slow.float().mean(0)).abs().max() < .06        # the centre is hidden more often
    assert abs(boundary(fast) - boundary(slow)) < .03 * boundary(slow)
    random = objectives.random_order(1500, 196).argsort(1).view(-1, 14, 14) < n
    assert boundary(fast) < .5 * boundary(random)


def test_block_masks_are_exact_on_every_grid():
    for grid, n in [(14, 75), (14, 98), (14, 1), (14, 196), (6, 18), (3, 5), (2, 3), (1, 1)]:
        mask = objectives.blockwise_mask(50, grid, n)
        assert mask.shape == (50, grid ** 2) and (mask.sum(1) == n).all()


def test_exact_block_masks_only_add_a_few_patches():
    """What is missing after the blocks is added one by one, so an edge grows by 4 pairs of neighbors at most."""
    blocks = objectives.blockwise_mask(3000, 14, 75, exact=False, generator=torch.Generator().manual_seed(1))
    exact = objectives.blockwise_mask(3000, 14, 75, generator=torch.Generator().manual_seed(2))
    missing = float(75 - blocks.sum(1).float().mean())
    ragged = [boundary(mask.view(-1, 14, 14)) for mask in (blocks, exact)]
    assert .3 < missing < .7 and ragged[0] < ragged[1] < ragged[0] + 4 * missing + 1


@pytest.mark.parametrize("name, count, most",
                         [("beit", 75, 100), ("cae", 98, 110), ("mim", 75, 400), ("clustermim", 147, 400)])
def test_orders_hide_blocks_or_not(name, count, most):
    model = objectives.make(name, V.ViT(image_size=112, patch_size=8, width=32, depth=1, heads=1), 8)
    order = model.draw_order(64, seed=3)
    assert torch.equal(order.sort(1).values, torch.arange(196).expand(64, -1)) and model.targets == count
    hidden = torch.zeros(64, 196).bool().scatter(1, order[:, model.cut - 1:], True)
    assert boundary(hidden.view(-1, 14, 14)) < most and (most < 200 or boundary(hidden.view(-1, 14, 14)) > 120)
    assert torch.equal(order, model.draw_order(64, seed=3)) and not torch.equal(order, model.draw_order(64, seed=4))


def literal_masks(n, cut, rank, positions=True):
    """MaPeT Eq. 3, cell by cell, in *raster* order: content (1+n+T, 1+n+T) and query (T, 1+n+T), True = may attend.

    rank[j]: place of token j in the order, the class token (token 0) at rank 0. Mask tokens stand in the raster order
    of the targets, as in the released code.
    """
    targets = [j for j in range(1 + n) if rank[j] >= cut]
    T = len(targets)
    content, query = torch.zeros(1 + n + T, 1 + n + T).bool(), torch.zeros(T, 1 + n + T).bool()
    for i in range(1 + n):
        for j in range(1 + n):
            if rank[i] < cut:
                content[i, j] = rank[j] < cut
            else:
                content[i, j] = rank[j] < cut or rank[j] <= rank[i]
        for t, j in enumerate(targets):
            content[i, 1 + n + t] = True if rank[i] < cut else rank[j] > rank[i]
    for t, i in enumerate(targets):
        for j in range(1 + n):
            content[1 + n + t, j] = rank[j] < cut
            query[t, j] = rank[j] < cut or rank[j] < rank[i]
        for s, j in enumerate(targets):
            content[1 + n + t, 1 + n + s] = True
            query[t, 1 + n + s] = rank[j] >= rank[i]
    if not positions:
        content, query = content[:1 + n, :1 + n], query[:, :1 + n]
    return content, query, targets


@pytest.mark.parametrize("n, cut", [(1, 1), (4, 1), (4, 4), (6, 3), (9, 5), (16, 12), (36, 19), (49, 10)])
@pytest.mark.parametrize("positions", [True, False])
def test_two_stream_mask_is_eq_3(n, cut, positions):
    z = torch.randperm(n, generator=torch.Generator().manual_seed(n)).tolist()
    rank = [0] + [1 + z.index(j) for j in range(n)]
    content, query, targets = literal_masks(n, cut, rank, positions)
    T = 1 + n - cut
    order = [0] + [1 + j for j in z]                                      # our rows, by raster token
    slots = [1 + n + targets.index(j) for j in order[cut:]] if positions else []
    ours = objectives.two_stream_mask(cut, T, positions)
    assert ours.dtype == torch.bool
    index = torch.tensor(order + slots)
    assert torch.equal(ours[:-T], content[index][:, index])
    assert torch.equal(ours[-T:], query[[targets.index(j) for j in order[cut:]]][:, index])
    if positions:
        assert (ours.sum(1) == 1 + n).all()                               # every position is seen exactly once


@pytest.mark.parametrize("cut, share", [(30, 85.2), (40, 80.1), (50, 75.), (60, 69.9), (98, 50.5)])
def test_cutting_points_of_table_6(cut, share):
    with torch.device("meta"):
        model = objectives.make("mapet", V.vit_tiny(), 8192, cut=cut)
    assert model.targets == 197 - cut and round(100 * model.targets / 196, 1) == share
    assert model.mask.shape == (197 + 2 * model.targets, 197 + model.targets)


def test_amount_of_masking():
    with torch.device("meta"):
        amount = lambda name, **how: objectives.make(name, V.vit_tiny(), 16, **how).targets
        assert amount("mapet") == amount("pim") == 147 and amount("mim") == 75
        assert amount("mapet", mask_ratio=.7) == 137                      # ViT-B: cutting point 60
        for how in (dict(cut=0), dict(cut=197), dict(cut=-1), dict(mask_ratio=0.), dict(mask_ratio=1.1),
                    dict(cut=50, mask_ratio=.5)):
            with pytest.raises(ValueError):
                amount("mapet", **how)
        assert amount("mae") == amount("clustermim", mask_ratio=.75) == amount("maskfeat") == 147
        assert amount("cae") == 98 and amount("beit") == 75
        with pytest.raises(ValueError, match="out of range"):
            amount("cae", cut=0)
    with pytest.raises(ValueError, match="class token"):
        objectives.make("mapet", tiny(cls_token=False), 16)
    for name in TOKEN_OBJECTIVES:
        with pytest.raises(ValueError, match="vocab_size"):
            objectives.make(name, tiny())
    for name, target, says in (("mae", "hog", "pixel-norm"), ("maskfeat", "pixel", "features"),
                               ("mim", "pixel", "choose from tokens")):
        with pytest.raises(ValueError, match=says):
            objectives.make(name, tiny(), 16, target=target)
    with pytest.raises(ValueError, match="mapet"):
        objectives.make("nonsense", tiny(), 16)


def test_random_order():
    orders = objectives.random_order(200, 5, torch.Generator().manual_seed(0))
    assert torch.equal(orders.sort(1).values, torch.arange(5).expand(200, -1))
    assert all(20 < (orders[:, 0] == j).sum() < 60 for j in range(5))     # 40 each on average
    same = objectives.random_order(200, 5, torch.Generator().manual_seed(0))
    assert torch.equal(orders, same)


def raster_loss(model, images, tokens, order):
    """MaPeT as in the released code: nothing permuted, a content and a query mask for every image, two separate streams."""
    vit, (b, n), cut = model.encoder, tokens.shape, model.cut
    T, losses = 1 + n - cut, []
    for i in range(b):
        rank = [0] + [1 + order[i].tolist().index(j) for j in range(n)]
        content_mask, query_mask, targets = literal_masks(n, cut, rank, model.positions)
        patches = torch.cat([vit.cls_token[0], vit.patch_embed(images[i:i + 1])[0]]) + vit.pos_embed[0]
        g = model.mask_token[0] + vit.pos_embed[0, targets]
        h = torch.cat([patches, g]) if model.positions else patches
        for block in vit.blocks:
            both = block.norm1(torch.cat([h, g]))
            mask = F.pad(torch.cat([content_mask, query_mask]), (0, T))   # nobody attends to a query
            attended = slow_attention(block.attn, both[None], mask[None])[0]
            both = torch.cat([h, g]) + block.ls1(attended)
            both = both + block.ls2(block.mlp(block.norm2(both)))
            h, g = both[:-T], both[-T:]
        logits = model.head(vit.norm(g))
        losses += [-logits[t].log_softmax(0)[tokens[i, j - 1]] for t, j in enumerate(targets)]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", ["mapet", "pim"])
@pytest.mark.parametrize("cut", [1, 4, 9])
def test_permuted_rows_equal_raster_order_with_masks(name, cut):
    model = objectives.make(name, tiny(layer_scale=.3), 11, cut=cut)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=.2)
    images, tokens = torch.randn(2, 3, 24, 24), torch.randint(11, (2, 9))
    order = objectives.random_order(2, 9)
    loss, _ = model(images, tokens, order)
    torch.testing.assert_close(loss, raster_loss(model, images, tokens, order), atol=1e-5, rtol=1e-5)


def test_mim_equals_masking_in_raster_order():
    """BEiT's way: the mask token replaces the embedding of a masked patch before positions are added."""
    model = objectives.make("mim", tiny(), 11, cut=4)
    nn.init.normal_(model.head.weight)
    images, tokens, order = torch.randn(2, 3, 24, 24), torch.randint(11, (2, 9)), objectives.random_order(2, 9)
    vit = model.encoder
    masked = torch.ones(2, 9).bool().scatter(1, order[:, :3], False)
    patches = torch.where(masked[..., None], model.mask_token, vit.patch_embed(images))
    x = torch.cat([vit.cls_token.expand(2, -1, -1), patches], 1) + vit.pos_embed
    logits = model.head(vit.encode(x))[:, 1:][masked]
    torch.testing.assert_close(model(images, tokens, order)[0], F.cross_entropy(logits, tokens[masked]))


def literal_autoencoder(model, images, given, order):
    """MAE, MaskFeat, ClusterMIM in raster order, image by image: the visible patches, a full-size decoder input, a loop."""
    vit, n, loss, entries = model.encoder, order.shape[1], 0., 0
    decoder_pos = V.sincos_positions(3, model.pos.shape[-1])
    for i in range(len(images)):
        visible = sorted(order[i, :model.cut - 1].tolist())
        x = vit.patch_embed(images[i:i + 1]) + vit.pos_embed[:, 1:]
        x = torch.cat([vit.cls_token + vit.pos_embed[:, :1], x[:, visible]], 1)
        for block in vit.blocks:
            x = block(x)
        x = model.narrow(vit.norm(x))
        full = model.mask_token.expand(1, n, -1).clone()
        full[:, visible] = x[:, 1:]                                       # unshuffle
        x = torch.cat([x[:, :1], full], 1) + decoder_pos
        for block in model.decoder.blocks:
            x = block(x)
        x = model.decoder.head(model.decoder.norm(x))[0, 1:]
        for j in set(range(n)) - set(visible):
            if model.needs == "tokens":
                loss, entries = loss - x[j].log_softmax(0)[given[i, j]], entries + 1
                continue
            y, z = divmod(j, 3)
            patch = images[i, :, 8 * y:8 * y + 8, 8 * z:8 * z + 8].permute(1, 2, 0).flatten()
            if model.target == "pixel-norm":
                patch = (patch - patch.mean()) / (patch.var() + 1e-6) ** .5
            elif model.target == "hog":
                patch = V.hog(images[i:i + 1], 8)[0, j]
            elif model.target == "features":
                patch = given[i, j] / given[i, j].norm()
            loss, entries = loss + (x[j] - patch).square().sum(), entries + len(patch)
    return loss / entries


@pytest.mark.parametrize("name, target", FORMS[:5])
def test_masked_autoencoders_equal_raster_order(name, target):
    model, images, given, order = example(name, target, cut=4, decoder_depth=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=.2)
    loss, logs = model(images, given, order)
    torch.testing.assert_close(loss, literal_autoencoder(model, images, given, order), atol=1e-5, rtol=1e-5)
    if target:                                                            # beside the mean of all hidden patches
        _, wanted = model.predict(images, given, order)
        constant = F.mse_loss(wanted.mean((0, 1)).expand_as(wanted), wanted)
        torch.testing.assert_close(logs["explained"], 1 - loss.detach() / constant)


def test_decoders_are_those_of_the_paper():
    """As in ClusterMIM's released code: ViT-S 256 wide, 8 heads; ViT-B and L 512, 16 heads; 8 blocks. CAE: 4 + 4 of the encoder's width."""
    with torch.device("meta"):
        for build, width, heads in ((V.vit_small, 256, 8), (V.vit_base, 512, 16), (V.vit_large, 512, 16)):
            model = objectives.make("clustermim", build(pos="sincos"), 50)
            assert model.narrow.weight.shape == (width, model.encoder.width) and len(model.decoder.blocks) == 8
            assert model.decoder.blocks[0].attn.heads == heads and model.decoder.head.weight.shape == (50, width)
        assert objectives.make("mae", V.vit_base()).decoder.head.out_features == 768
        assert objectives.make("maskfeat", V.vit_base()).decoder.head.out_features == 108
        assert objectives.make("maskfeat", V.vit_base(), 384, target="features").decoder.head.out_features == 384
        cae = objectives.make("cae", V.vit_small(), 50)
        assert len(cae.regressor) == len(cae.decoder.blocks) == 4
        assert cae.decoder.head.in_features == 384 and cae.regressor[0].heads == cae.decoder.blocks[0].attn.heads == 6


@pytest.mark.parametrize("name", ["mae", "clustermim", "cae"])
def test_encoder_runs_on_visible_patches_only(name):
    model, images, given, order = example(name, cut=4)
    rows = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[1]))
    model(images, given, order)
    assert rows == [4, 4]


def literal_cae(model, images, tokens, order):
    """CAE as its paper describes it, written out for one image at a time, heads and softmax by hand."""
    vit, losses, alignments = model.encoder, [], []
    layer = lambda norm, x: F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)
    for i in range(len(images)):
        visible, hidden = order[i, :model.cut - 1], order[i, model.cut - 1:]

        def encode(net, which):
            patches = net.patch_embed(images[i:i + 1])[0] + net.pos_embed[0, 1:]
            x = torch.cat([(net.cls_token + net.pos_embed[:, :1])[0], patches[which]])[None]
            for block in net.blocks:
                x = block(x)
            return net.norm(x)[0, 1:]
        latent, target = encode(vit, visible), encode(model.teacher, hidden).detach()
        pos, pos_visible = vit.pos_embed[0, 1 + hidden], vit.pos_embed[0, 1 + visible]
        x = model.mask_token[0].expand(len(hidden), -1)
        for block in model.regressor:
            both, where = torch.cat([latent, x]), torch.cat([pos_visible, pos])
            q = block.q(layer(block.norm_q, x + pos))
            k, v = block.k(layer(block.norm_k, both + where)), block.v(layer(block.norm_v, both))
            heads = []
            for q_h, k_h, v_h in zip(q.chunk(block.heads, 1), k.chunk(block.heads, 1), v.chunk(block.heads, 1)):
                heads.append((q_h @ k_h.T / math.sqrt(q_h.shape[1])).softmax(1) @ v_h)
            x = layer(block.norm2, x + block.ls1.gamma * block.proj(torch.cat(heads, 1)))
            x = x + block.ls2.gamma * block.mlp(x)                        # x, not what went into the norm
        guess = layer(model.regressor_norm, x)
        x = (guess + pos)[None]
        for block in model.decoder.blocks:
            x = block(x)
        logits = model.decoder.head(model.decoder.norm(x))[0]
        losses += [-logits[t].log_softmax(0)[tokens[i, j]] for t, j in enumerate(hidden.tolist())]
        alignments.append((guess - target).square().mean())
    return torch.stack(losses).mean(), torch.stack(alignments).mean()


def strong_cae(**how):
    torch.manual_seed(0)
    model = objectives.make("cae", V.ViT(**TINY, layer_scale=.3, pos="sincos"), 11, cut=5, decoder_depth=2, **how)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "teacher" not in name:
            nn.init.normal_(parameter, std=.2)
    return model


def test_cae_equals_its_description():
    """And its target is the encoder of one step before: at first the initial one, then that of the first step."""
    model = strong_cae()
    initial = copy.deepcopy(model.teacher)
    images, tokens, order = torch.randn(2, 3, 24, 24), torch.randint(11, (2, 9)), objectives.random_order(2, 9)
    for _ in range(3):
        cross_entropy, alignment = literal_cae(model, images, tokens, order)
        before = {key: value.clone() for key, value in model.encoder.state_dict().items()}
        loss, logs = model(images, tokens, order)
        torch.testing.assert_close(loss, cross_entropy + 2 * alignment)
        torch.testing.assert_close(logs["alignment"], alignment.detach())
        loss.backward()
        model.before_step()                                                # the loop's, before the optimizer's step
        assert all(torch.equal(value, before[key]) for key, value in model.teacher.state_dict().items())
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter += .05 * torch.randn_like(parameter)
    assert not torch.equal(initial.norm.weight, model.teacher.norm.weight)


def test_stochastic_depth_reaches_all_of_cae():
    """Noise 0 drops both branches of every block whose rate is above 0: here the last one's of all three networks."""
    model = objectives.make("cae", V.ViT(**TINY, layer_scale=.3, drop_path=.5), 11, cut=5, decoder_depth=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=.2)
    networks = model.encoder.blocks, model.regressor, model.decoder.blocks
    assert [[block.drop for block in blocks] for blocks in networks] == [[0, .5]] * 3
    given = torch.randn(2, 3, 24, 24), torch.randint(11, (2, 9)), objectives.random_order(2, 9)
    nothing_dropped, everything = (torch.full((model.noise_rows, 2), value) for value in (1., 0.))
    losses = [model(*given, noise=noise)[0] for noise in (nothing_dropped, everything)]
    assert not torch.isclose(*losses) and not torch.isclose(*[model(*given)[0] for _ in range(2)])      # drawn anew
    for number, blocks in enumerate(networks):                            # each network has draws of its own
        noise = nothing_dropped.clone()
        noise[4 * number:4 * number + 4] = 0
        assert not torch.isclose(model(*given, noise=noise)[0], losses[0])
    for blocks in networks:
        for scale in (blocks[-1].ls1, blocks[-1].ls2):
            nn.init.zeros_(scale.gamma)
    model.eval()
    torch.testing.assert_close(model(*given)[0], losses[1])


@pytest.mark.parametrize("init", ["timm", "mae"])
@pytest.mark.parametrize("name", ["mae", "clustermim", "cae"])
def test_initialization_reaches_decoders(name, init):
    """One initialization for all that is trained; only the head that ends in the loss starts small in both."""
    model = objectives.make(name, V.ViT(**{**TINY, "init": init, "width": 96, "heads": 3}), 300)
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, nn.Linear) and "teacher" not in key}
    for key, layer in layers.items():
        xavier = math.sqrt(2 / (layer.in_features + layer.out_features))
        wanted = .02 if init == "timm" or key == "decoder.head" else xavier
        assert layer.weight.std().item() == pytest.approx(wanted, rel=.1) and not layer.bias.any(), key


@pytest.mark.parametrize("name, target", [form for form in FORMS if form[0] in ("mae", "maskfeat", "clustermim", "cae")])
def test_no_hidden_pixel_reaches_encoder_or_gradient(name, target):
    model, images, given, order = example(name, target, b=1, cut=4, decoder_depth=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=.3)
    images.requires_grad_()
    wanted = torch.zeros(9).bool()
    wanted[order[0, :3]] = True
    seen = lambda output: V.patchify(torch.autograd.grad(output, images, retain_graph=True)[0], 8)[0].abs().sum(-1) > 0
    prediction, target = model.predict(images, given, order)
    for row in prediction[0]:
        assert torch.equal(seen(row.square().sum()), wanted)
    assert not target.requires_grad
    loss, _ = model(images, given, order)
    assert torch.equal(seen(loss), wanted)                                # the target does not lead back to the pixels
    loss.backward()
    if name == "cae":
        assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
        assert all(p.grad is not None for p in model.encoder.parameters() if p.requires_grad)


def test_label_smoothing():
    for name in TOKEN_OBJECTIVES:
        model, images, given, order = example(name, cut=4)
        nn.init.normal_((model.head if hasattr(model, "head") else model.decoder.head).weight)
        smooth = copy.deepcopy(model)
        smooth.smoothing = .1
        logits, wanted = model.predict(images, given, order)
        logp = logits.log_softmax(-1)
        right = logp.gather(-1, wanted[..., None])[..., 0]
        by_hand = -(.9 * right + .1 * logp.mean(-1)).mean()               # ClusterMIM's released code
        difference = smooth(images, given, order)[0] - model(images, given, order)[0]
        torch.testing.assert_close(difference, by_hand + right.mean(), atol=1e-5, rtol=1e-4)
        assert objectives.make(name, tiny(), 11, label_smoothing=.1).smoothing == .1


def strong(name, depth, cut):
    """An objective whose attention is far from uniform, so that a leak of any size shows."""
    model = objectives.make(name, tiny(depth=depth), 11, cut=cut)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=.3)
    return model.double()


@pytest.mark.parametrize("name", ["mapet", "pim", "mim"])
def test_no_target_leaks_through_12_layers(name):
    """Prediction t depends on the pixels of the visible patches and of targets before t, on all of them, on nothing else."""
    cut, n = 4, 9
    model, order = strong(name, 12, cut), objectives.random_order(1, n)
    images = torch.randn(1, 3, 24, 24, dtype=torch.float64, requires_grad=True)
    logits, _ = model.predict(images, torch.zeros(1, n).long(), order)
    for t in range(model.targets):
        gradient, = torch.autograd.grad(logits[0, t].sum(), images, retain_graph=True)
        seen = V.patchify(gradient, 8)[0].abs().sum(-1) > 0
        before = cut - 1 + t if name != "mim" else cut - 1
        wanted = torch.zeros(n).bool()
        wanted[order[0, :before]] = True
        assert torch.equal(seen, wanted), (t, seen, wanted)


def test_first_query_equals_its_mask_token_in_every_layer():
    model, cut = strong("mapet", 4, 5).eval(), 5
    rows, T = [], model.targets
    for block in model.encoder.blocks[:-1]:
        block.register_forward_hook(lambda module, args, out: rows.append(out))
    model.predict(torch.randn(2, 3, 24, 24, dtype=torch.float64), torch.zeros(2, 9).long())
    assert len(rows) == 3
    for x in rows:                                                        # [cls, visible, targets, mask tokens, queries]
        torch.testing.assert_close(x[:, -T], x[:, -2 * T])
        assert ((x[:, 1 - T:] - x[:, 1 - 2 * T:-T]).abs().amax(-1) > 1e-6).all()       # and no later one does


def drops_paths(name):
    """Does `noise` reach the encoder? 0 drops the branches of its last block, 1 keeps them; without, they are drawn anew."""
    model = objectives.make(name, tiny(drop_path=.5), 11, cut=4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=.2)
    given = torch.randn(2, 3, 24, 24), torch.randint(11, (2, 9)), objectives.random_order(2, 9)
    kept, again, dropped = (model.predict(*given, noise=torch.full((model.noise_rows, 2), draw))[0] for draw in (1., 1., 0.))
    return torch.equal(kept, again) and not torch.allclose(kept, dropped)


@pytest.mark.parametrize("name", ["mapet", "pim", "mim"])
def test_stochastic_depth_reaches_mapet(name):
    assert drops_paths(name)


@pytest.mark.parametrize("name", ["mae", "clustermim"])
def test_stochastic_depth_reaches_masked_autoencoders(name):
    assert drops_paths(name)


def test_mapet_contains_mim():
    """The first target's prediction is MIM's; the k-th is MIM's with k - 1 targets revealed. Same weights."""
    mapet, mim, n, cut = strong("mapet", 3, 5), strong("mim", 3, 5), 9, 5
    images, tokens = torch.randn(2, 3, 24, 24, dtype=torch.float64), torch.randint(11, (2, n))
    mim.load_state_dict(mapet.state_dict())
    order = objectives.random_order(2, n)
    torch.testing.assert_close(mapet.predict(images, tokens, order)[0][:, 0], mim.predict(images, tokens, order)[0][:, 0])
    # One layer: a target that is revealed looks at what MIM's visible patches look at, less its own mask token.
    shallow = strong("mapet", 1, 5)
    for k in range(n - cut + 1):
        revealed = objectives.make("mim", shallow.encoder, 11, cut=cut + k).double()
        revealed.load_state_dict(shallow.state_dict())
        torch.testing.assert_close(shallow.predict(images, tokens, order)[0][:, k],
                                   revealed.predict(images, tokens, order)[0][:, 0])


@pytest.mark.parametrize("name", TOKEN_OBJECTIVES)
def test_every_target_counts_once_and_untrained_loss_is_ln_k(name):
    model, images, tokens, order = example(name, b=64, k=50, cut=4)
    logits, wanted = model.predict(images, tokens, order)
    assert torch.equal(wanted, tokens.gather(1, order[:, 3:]))
    by_hand = -logits.log_softmax(-1).gather(-1, wanted[..., None]).sum() / (64 * 6)
    assert abs(by_hand.item() - math.log(50)) < .05
    loss, logs = model(images, tokens, order)
    torch.testing.assert_close(loss - 2 * logs.get("alignment", torch.zeros(())), by_hand)
    assert set(logs) == set(model.logs) and all(value.ndim == 0 and not value.requires_grad for value in logs.values())
    torch.testing.assert_close(logs["accuracy"], (logits.argmax(-1) == wanted).float().mean())


@pytest.mark.parametrize("name, target", FORMS)
def test_overfits_8_images(name, target):
    cut = 7 if name == "mae" else 4                        # 24 patches of noise: a head 32 wide cannot paint many more
    model, images, given, order = example(name, target, b=8, k=6, cut=cut, decoder_depth=1)
    kind = objectives.OBJECTIVES[name].kind
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, fused=True)
    for _ in range(120 if kind is objectives.MaPeT else 500 if target == "hog" else 300):
        loss, logs = model(images, given, order)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logs["explained"] > .9 if "explained" in logs else loss - 2 * logs.get("alignment", 0) < .1


@pytest.mark.parametrize("name, target", FORMS)
def test_every_parameter_learns(name, target):
    """DDP needs it, and a stream that is cut off would show here."""
    model, images, given, order = example(name, target, b=4, cut=4)
    model(images, given, order)[0].backward()
    idle = [key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == [key for key in idle if key.endswith("k.bias")]        # softmax cannot see a bias on keys


@pytest.mark.parametrize("name, target", FORMS)
def test_predictions_drawn(name, target, tmp_path, monkeypatch):
    """A perfect prediction draws the target; what was hidden is grey in the second row."""
    model, images, given, order = example(name, target, b=3, k=6, cut=5)
    pixels, mean, std, patch_of = images.sigmoid(), (.5, .4, .3), (.2, .3, .25), torch.rand(6, 192)
    order, predict = model.draw_order(3, 0), model.predict

    def perfect(*args):
        assert torch.equal(args[2], order)
        _, wanted = predict(*args)
        return (F.one_hot(wanted, 6).float() if model.needs == "tokens" else wanted), wanted
    monkeypatch.setattr(model, "predict", perfect)
    rows, labels = objectives.picture_predictions(model, pixels, mean, std, given, patch_of)
    V.draw_grid(rows, tmp_path / "p.png")
    picture = torch.from_numpy(np.asarray(Image.open(tmp_path / "p.png")) / 255).permute(2, 0, 1)
    rows, side = 3 if name == "mae" else 4, (picture.shape[2] - 4) // 3 - 4
    assert labels == ["image", "visible", "predicted", "target"][:rows] and model.training
    assert picture.shape == (3, 4 + rows * (side + 4), 4 + 3 * (side + 4)) and side % 24 == 0 and 3 * side >= 900
    tiles = [[picture[:, 4 + y * (side + 4):, 4 + x * (side + 4):][:, :side, :side][:, ::side // 24, ::side // 24]
              for x in range(3)] for y in range(rows)]
    hidden = torch.zeros(3, 9).bool().scatter(1, order[:, 4:], True)
    for x in range(3):
        near = lambda a, b: torch.testing.assert_close(a.float(), b.float(), atol=.6 / 255 + 1e-3, rtol=0)
        patches = [V.patchify(tiles[y][x][None], 8)[0] for y in range(rows)]
        own = V.patchify(pixels[x:x + 1], 8)[0]
        near(patches[0], own)
        near(patches[1], torch.where(hidden[x, :, None], torch.tensor(.5), own))
        if name == "mae":
            near(patches[2], own)
        else:
            near(patches[2], patches[3])
        if model.needs == "tokens":
            near(patches[3], torch.where(hidden[x, :, None], patch_of[given[x]], own))
        elif target:
            assert patches[-1].std() > .02


def test_hog_strokes_run_along_the_edges():
    """The picture of the HOG of stripes is a stroke along them: bright near the line of equal phase through the middle."""
    y, x = torch.meshgrid(torch.arange(24.) - 11.5, torch.arange(24.) - 11.5, indexing="ij")
    stripes = {"lying": y, "upright": x, "rising": (x + y) / 2 ** .5, "falling": (x - y) / 2 ** .5}
    for name, phase in stripes.items():
        image = torch.sin(1.1 * phase).expand(1, 3, -1, -1)
        middle = objectives.picture_hog(V.hog(image, 8), 8)[0, 4].view(8, 8, 3)[..., 0]
        width = {other: float((middle * v[8:16, 8:16] ** 2).sum()) for other, v in stripes.items()}
        assert min(width, key=width.get) == name


def test_masks_printed_and_drawn(tmp_path, capsys):
    objectives.main(["mapet", "--patches", "6", "--cut", "3", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    order = [int(word[1:]) for word in re.search(r"order z: (.*); cut", lines[0])[1].split()]
    (_, mask, rows, keys), = objectives.list_stages("mapet", order, 3)
    head = next(i for i, line in enumerate(lines) if line.endswith("keys"))
    assert lines[head].split()[:-1] == keys and len(rows) == 15
    for row, name, line in zip(mask, rows, lines[head + 1:]):
        assert line.split() == [name, *("#" if seen else "." for seen in row), "7"]
    # ranks: a query may not see its own content, may see its own mask token; the content may see itself
    first = order[2]
    seen = lambda row, key: mask[rows.index(row), keys.index(key)].item()
    assert seen(f"g{first}", f"m{first}") and not seen(f"g{first}", f"x{first}")
    assert seen(f"x{first}", f"x{first}") and not seen(f"x{first}", f"m{first}")
    picture = np.asarray(Image.open(tmp_path / "mapet.png"))
    cell = 26
    for y, x in itertools.product(range(len(rows)), range(len(keys))):
        white = (picture[2 * cell + y * cell + 6, 2 * cell + x * cell + 6] == 255).all()
        assert white != mask[y, x].item()
    refused(objectives.main, ["mapet", "--patches", 6, "--cut", 7], capsys, "--cut 7", "1 to 6")
    (tmp_path / "file").touch()
    refused(objectives.main, ["mapet", "--out", tmp_path / "file"], capsys, tmp_path / "file")
    objectives.main(["--out", str(tmp_path / "all")])
    stages = {name: ("encoder", "decoder") for name in ("mae", "maskfeat", "clustermim", *objectives.TOKENIZERS)}
    stages["cae"] = ("encoder", "regressor", "decoder")
    drawn = [f"{name}-{stage}.png" for name in stages for stage in stages[name]]
    assert sorted(os.listdir(tmp_path / "all")) == sorted(drawn + ["beit.png", "mim.png", "pim.png", "mapet.png"])
    capsys.readouterr()
    objectives.main(["cae", "--out", str(tmp_path / "cae")])
    blocks = [line.split() for line in capsys.readouterr().out.splitlines()[-14:]]
    assert sum(line.count("#") for line in blocks) == 98 and all(len(line) == 14 for line in blocks)
    objectives.main(["vqkd", "--out", str(tmp_path / "vqkd")])
    assert "hides nothing" in (printed := capsys.readouterr().out) and "'unit': True" in printed and " t0 " in printed


TOKENIZERS = ["dvae", "vq", "peco", "vqkd"]
alone = dict(all_reduce=lambda *tensors: None, all_gather=lambda tensor: tensor)         # of one process


def tokenizer_example(name, k=7, b=4, seed=0, **over):
    """A small learned tokenizer with strong weights, images, a teacher's features if it wants them, noise."""
    torch.manual_seed(seed)
    vit = V.ViT(**{**TINY, "width": 96, "heads": 3, "init": "mae", **over})
    model = objectives.make(name, vit, k, values=5, decoder_depth=1)
    model.layers = V.PatchFeatures("hog", 8, 24).layers if name == "peco" else None
    if name == "dvae":
        nn.init.normal_(model.classify.weight, std=.3)
    return model, torch.randn(b, 3, 24, 24), torch.randn(b, 9, 5) + 1, torch.rand(model.noise_rows, b)


def test_uniform_numbers_by_hashing():
    seeds = torch.rand(2, 300)
    u = V.hash_uniform(seeds, 400)
    assert u.shape == (300, 400) and u.dtype == torch.float32 and 0 < u.min() and u.max() < 1
    assert torch.equal(u[7:9], V.hash_uniform(seeds[:, 7:9], 400))        # an image's own, in any batch
    counts = torch.histc(u, 20) / 6000
    assert (counts - 1).abs().max() < .06                                 # flat: 4.5 standard deviations
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):                 # neighbors have nothing to do with each other
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < .015
    assert len(u[0].unique()) > 395 and not torch.equal(u[0], V.hash_uniform(seeds.flip(0), 400)[0])


@pytest.mark.parametrize("name", ["vq", "vqkd"])
def test_straight_through_and_commitment_gradients(name):
    """d/dz = the gradient at the code + beta 2 (z - C_t) / size of z; d/dC_k = sum 2 (C_k - z) / size, over its z; VQ-KD: none."""
    model, *_ = tokenizer_example(name)
    z = torch.randn(4, 9, model.codebook.shape[1])
    z = (F.normalize(z, dim=-1) if model.unit else z).requires_grad_()
    pull = torch.randn_like(z)                                            # a loss that is linear in the code
    code, tokens, loss = model.quantize(z)
    nearest = torch.cdist(z, model.codebook).argmin(-1)
    assert torch.equal(tokens, nearest)
    torch.testing.assert_close(code, model.codebook[nearest])
    ((code * pull).sum() + loss).backward()
    apart, beta = z.detach() - model.codebook.detach()[nearest], {"vq": .25, "vqkd": 1.}[name]
    torch.testing.assert_close(z.grad, pull + beta * 2 * apart / z.numel())
    wanted = torch.zeros_like(model.codebook)
    for i, j in itertools.product(range(4), range(9)):
        wanted[nearest[i, j]] -= 2 * apart[i, j] / z.numel()
    if name == "vqkd":
        assert model.codebook.grad is None and not model.codebook.requires_grad
        assert loss.item() == pytest.approx(apart.square().mean().item())
    else:
        torch.testing.assert_close(model.codebook.grad, wanted)


def test_gumbel_gradients():
    """y = softmax((s + g) / tau), dL/ds_k = y_k (C_k.p - y.Cp) / tau; KL: q_k (log q_k - sum q log q); annealed by the progress."""
    model, *_ = tokenizer_example("dvae")
    z, pull, seeds = torch.randn(4, 9, 96), torch.randn(4, 9, 96), torch.rand(2, 4)
    noise = -torch.log(-torch.log(V.hash_uniform(seeds, 63))).view(4, 9, 7)
    for progress, tau, weight in ((0, 1, 0), (.5, 1 - 15 / 32, .5), (1, 1 / 16, 1)):
        model.zero_grad()
        model.progress.fill_(progress)
        scores = model.score(z).detach()
        y, q = ((scores + noise) / tau).softmax(-1), scores.softmax(-1)
        code, tokens, loss = model.quantize(z, seeds)
        assert torch.equal(tokens, scores.argmax(-1))                     # the token is without noise
        torch.testing.assert_close(code, y @ model.codebook)
        kl = (q * (q * 7).log()).sum(-1)
        torch.testing.assert_close(loss, weight * kl.mean() / 192, atol=1e-7, rtol=1e-4)
        ((code * pull).sum() + loss).backward()
        worth = (pull @ model.codebook.T).detach()
        wanted = y * (worth - (y * worth).sum(-1, keepdim=True)) / tau
        wanted += weight / 192 / 36 * q * (q.log() - (q * q.log()).sum(-1, keepdim=True))
        torch.testing.assert_close(model.classify.bias.grad, wanted.sum((0, 1)), atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(model.codebook.grad, torch.einsum("bnk,bnd->kd", y, pull), atol=1e-4, rtol=1e-4)
    hard = model.eval().quantize(z)[0]
    assert torch.equal(hard, model.codebook[model.score(z).argmax(-1)])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_codes_follow_and_are_reseeded_as_in_a_literal_loop(name):
    """Two steps: the state of the codebook, of one batch, of two micro-batches, of two processes, by plain loops."""
    model, images, features, noise = tokenizer_example(name, k=7)
    with torch.no_grad():
        far = model.classify.bias if name == "dvae" else model.codebook
        far[[2, 5]] = -100. if name == "dvae" else -F.normalize(model.encode_patches(images).mean((0, 1)), dim=-1) * 99
        model.codebook[[2, 5]] = F.normalize(model.codebook[[2, 5]], dim=-1) if model.unit else model.codebook[[2, 5]]
    model.share[[2, 5]] = .1 / 7                                          # at the edge: this step, they die
    divided, first, second = (copy.deepcopy(model) for _ in range(3))
    for step in range(2):
        before = copy.deepcopy(model)
        with torch.no_grad():
            z = before.encode_patches(images, noise[:4])
            tokens = before.score(z).argmax(-1)
        for m, parts in ((model, [slice(0, 4)]), (divided, [slice(0, 2), slice(2, 4)]), (first, [slice(0, 2)]),
                         (second, [slice(2, 4)])):
            for part in parts:
                m(images[part], features[part], noise=noise[:, part])
        model.end_step(.3, **alone)
        divided.end_step(.3, **alone)
        both = {key: [getattr(m, key).clone() for m in (first, second)] for key in ("counts", "sums", "lots", "spare")}

        def all_reduce(counts, sums):
            counts.copy_(sum(both["counts"]))
            sums.copy_(sum(both["sums"]))
        for m in (first, second):
            m.end_step(.3, all_reduce, lambda own: torch.cat(both["lots" if own.ndim == 1 else "spare"], -1))

        # --- the literal loop
        codebook, counts = before.codebook.detach().clone(), torch.zeros(7)
        for k in range(7):
            own = [z[i, j] for i, j in itertools.product(range(4), range(9)) if tokens[i, j] == k]
            counts[k] = len(own)
            if own and model.unit:
                mean = sum(own) / len(own)
                code = .99 * codebook[k] + .01 * mean / mean.norm()
                codebook[k] = code / code.norm()
        share = .95 * before.share + .05 * counts / 36
        lots = V.hash_uniform(1 - noise[-2:], 9)
        ranking = sorted(itertools.product(range(4), range(9)), key=lambda at: -lots[at])
        dead = [k for k in range(7) if share[k] < .1 / 7]
        assert dead == [k for k in (2, 5) if counts[k] == 0 and step == 0] and (dead or step or model.unit)
        for k, at in zip(dead, ranking):
            share[k] = 1 / 7
            if name == "dvae":
                old = before.score(z[at]).argmax()
                logits = model.score(z[at]).detach()
                assert logits[k] - logits[old] == pytest.approx(.1, abs=1e-3)
                codebook[k] = before.codebook[old]
            else:
                codebook[k] = z[at]
        used = counts[counts > 0] / 36
        state = torch.tensor([len(used), math.exp(-(used * used.log()).sum()), len(dead)])
        for m in (model, divided, first, second):
            torch.testing.assert_close(m.codebook.detach(), codebook, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(m.share, share)
            torch.testing.assert_close(m.state, state)
            assert m.progress == pytest.approx(.3) and not m.counts.any() and (m.lots == -1).all()
        assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_a_learned_tokenizer_are_nearest_centroids(name, tmp_path):
    """Also the dVAE's argmax over logits, of random weights; through tokenizer.pt, of uint8 and of normalized images."""
    model, *_ = tokenizer_example(name, k=40)
    if name == "dvae":
        nn.init.normal_(model.classify.weight)
        nn.init.normal_(model.classify.bias, std=3)
    f, centroids, metric = model.export()
    mean, std = (.5, .4, .3), (.2, .3, .25)
    KMeansTokenizer(name, centroids, metric, 8, 24, mean, std, f).save(tmp_path / "tokenizer.pt")
    torch.load(tmp_path / "tokenizer.pt", weights_only=True)
    tokenizer = kmeans.load_tokenizer(str(tmp_path / "tokenizer.pt"))
    pixels = torch.randint(256, (6, 3, 24, 24), dtype=torch.uint8)
    images = V.normalize(pixels, tokenizer)
    model.eval()
    with torch.no_grad():
        scores = model.score(model.encode_patches(images))
    tokens = tokenizer(pixels)
    assert torch.equal(tokens, scores.argmax(-1)) and torch.equal(tokens, tokenizer(images))
    assert len(tokens.unique()) > 3 and tokenizer.vocab_size == 40 and tokenizer.features == name
    if name == "dvae":
        h = tokenizer.extract(images)
        assert h.shape[-1] == centroids.shape[1] == 97 and not h[..., -1].any()
        squared = (h[..., None, :].double() - centroids.double()).square().sum(-1)
        same = squared + 2 * scores                                       # for all k
        assert (same - same[..., :1]).abs().max() < 1e-3
    assert not any(p.requires_grad for p in tokenizer.parameters()) and not tokenizer.train().extract.training


@pytest.mark.parametrize("name", TOKENIZERS)
def test_learned_tokenizers_learn_and_draw(name, tmp_path):
    """Every weight gets a gradient; 8 images are learned by heart; noise decides all that is random; the picture."""
    model, images, features, noise = tokenizer_example(name, k=72, b=8)
    assert model.needs == {"peco": "layers", "vqkd": "features"}.get(name) and model.targets == 0 and model.cut == 10
    images = F.interpolate(torch.randn(8, 3, 3, 3), 24)                   # a color a patch
    loss, logs = model(images, features, noise=noise)
    assert torch.equal(loss, model(images, features, noise=noise)[0]) and set(logs) == set(model.logs)
    loss.backward()
    idle = [key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == [key for key in idle if key.endswith("k.bias")]
    first = logs["error"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(50):
        loss, logs = model(images, features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.end_step(step / 50, **alone)
    assert logs["error"] < .85 * first and 5 < logs["perplexity"] <= logs["used"] + 1e-3
    rows, labels = objectives.picture_predictions(model, images.sigmoid(), (.5,) * 3, (.2,) * 3, features)
    assert labels == ["image", "tokens"] + ["target"] * (name == "vqkd") + ["rebuilt"] and model.training
    assert all(row.shape == images.shape and 0 <= row.min() and row.max() <= 1 for row in rows)
    V.draw_grid(rows, tmp_path / "p.png", labels)


def test_perceptual_distances(tmp_path):
    """PeCo's: of the blocks 3, 6, 9 and 11 of 12; gradients reach the images, flat ones, too, and no weight of the network."""
    vit = V.ViT(**{**TINY, "width": 96, "heads": 3, "depth": 12}).eval()
    torch.save(vit.state_dict(), tmp_path / "encoder.pt")
    features, images = V.PatchFeatures(str(tmp_path / "encoder.pt"), 8, 24), torch.randn(2, 3, 24, 24, requires_grad=True)
    x, wanted = vit.embed(images), []
    for i, block in enumerate(vit.blocks):
        x = block(x)
        wanted += [(x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()] * (i in (2, 5, 8, 10))
    for a, b in zip(features.layers(images), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for network in (features, V.PatchFeatures("hog", 8, 24)):
        for x in (images, torch.zeros(1, 3, 24, 24, requires_grad=True)):
            rows = network.layers(x)
            gradient, = torch.autograd.grad(sum((row * torch.randn_like(row)).sum() for row in rows), x)
            assert gradient.isfinite().all() and (gradient.any() or not x.any())
    model, images, _, noise = tokenizer_example("peco")
    with_network, _ = model(images, noise=noise)
    prediction, _, _, codes = model.predict(images, noise=noise)
    seen, wanted = (model.layers(x)[0] for x in (V.unpatchify(prediction, 8), images))
    pixels = F.mse_loss(prediction, V.patchify(images, 8))
    torch.testing.assert_close(with_network, pixels + codes + (seen - wanted).square().mean())


# --- train.py -----------------------------------------------------------------------------------------------------

def make_folder(root, per_class=20, size=40, classes=("ant", "bee"), splits=("train", "val")):
    """A small data set in ImageNet's layout; ants are dark and bees are light."""
    rng = np.random.default_rng(0)
    for split, (c, name) in itertools.product(splits, enumerate(classes)):
        os.makedirs(os.path.join(root, split, name))
        for i in range(per_class):
            pixels = (rng.integers(0, 128, (size, size + 8, 3)) + 100 * c).astype(np.uint8)
            Image.fromarray(pixels).save(os.path.join(root, split, name, f"{i:03d}.png"))
    return str(root)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "images")


SMALL_RUN = ["--model", "vit_micro", "--image-size", 24, "--patch-size", 8, "--features", "pixel", "--vocab-size", 6,
             "--batch-size", 8, "--epochs", 4, "--warmup-epochs", 1, "--log-every", 1, "--lr", 1e-3, "--workers", 0,
             "--device", "cpu", "--cache", ""]                             # 40 images: 20 steps


def small(data, out, name, *more):
    """train.main in this process on a small folder, with objective `name`; returns the lines of metrics.jsonl."""
    argv = ["--data", data, "--out", out, *SMALL_RUN, "--objective", name, *more]
    if name in ("mae", "maskfeat"):                                        # these predict no tokens: no codebook
        for flag in ("--features", "--vocab-size"):
            at = argv.index(flag)
            argv = argv[:at] + argv[at + 2:]
    train.main([str(a) for a in argv])
    return [json.loads(line) for line in open(os.path.join(out, "metrics.jsonl"))]


def run_small(data, out, *more):
    return small(data, out, "mapet", *more)


def same_encoder(a, b):
    a, b = (torch.load(os.path.join(out, "encoder.pt"), weights_only=True) for out in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_textures_are_a_function_of_seed_and_index():
    images, labels = train.render_textures(1, range(40))
    assert images.shape == (40, 3, 48, 48) and images.dtype == np.float32
    again, label = train.render_textures(1, [7])
    assert np.array_equal(images[7], again[0]) and labels[7] == label[0]
    other, _ = train.render_textures(2, [7])
    assert not np.array_equal(other, again)
    many, labels = train.render_textures(3, range(600))
    assert abs(many.mean()) < .1 and abs(many.std() - 1) < .1
    assert np.bincount(labels, minlength=10).min() > 30                    # 60 each on average


def test_textures_class_is_orientation_and_period():
    """The strongest frequency inside the object, without noise to hide it, turns with the label's orientation."""
    images, labels = train.render_textures(1, range(2000))
    gray = images.mean(1)[:, 8:40, 8:40] * np.hanning(32)[:, None] * np.hanning(32)
    power = np.abs(np.fft.fftshift(np.fft.fft2(gray - gray.mean((1, 2), keepdims=True)), axes=(1, 2))) ** 2
    fy, fx = np.mgrid[-16:16, -16:16]
    ring = (np.hypot(fx, fy) > 1.5) & (np.hypot(fx, fy) < 8)
    for orientation in range(5):
        spectrum = power[labels % 5 == orientation].mean(0) * ring
        angle = np.angle((spectrum * np.exp(2j * np.arctan2(fy, fx))).sum()) / 2           # axis, modulo pi
        gap = (angle - orientation * np.pi / 5 + np.pi / 2) % np.pi - np.pi / 2
        assert abs(gap) < .3, (orientation, angle)


def test_any_mode_and_size_of_picture(tmp_path):
    ramp = np.linspace(0, 255, 60 * 80).reshape(60, 80).astype(np.uint8)
    color = Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], -1))
    pictures = {"rgb.png": color, "grey.png": Image.fromarray(ramp), "cmyk.jpg": color.convert("CMYK"),
                "palette.png": color.convert("P"), "alpha.png": color.convert("RGBA"), "one.png": color.convert("1"),
                "deep.png": Image.fromarray(ramp.astype(np.uint16) * 256), "tall.jpeg": color.resize((30, 200)),
                "tiny.PNG": color.resize((3, 2)), "la.png": color.convert("LA"), "anim.gif": color}
    os.makedirs(tmp_path / "deep" / "er")
    for i, (name, picture) in enumerate(pictures.items()):
        picture.save(tmp_path / ("deep/er" if i % 2 else ".") / name)
    (tmp_path / "readme.txt").write_text("not a picture")
    ds = train.open_dataset(str(tmp_path), "train", image_size=32)
    assert len(ds) == len(pictures) - 1 and ds.labels is None and ds.classes is None       # .gif is not in torchvision's list
    by_name = {os.path.basename(ds.path(i)): ds[i][0] for i in range(len(ds))}
    for name, image in by_name.items():
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert ds[0][1] == -1 and ds[0][2] == 0
    difference = lambda a, b: (by_name[a].float() - by_name[b].float()).abs().mean()
    assert difference("rgb.png", "alpha.png") < 1 and difference("rgb.png", "cmyk.jpg") < 20
    assert difference("grey.png", "deep.png") < 1.5                        # 16 bits scaled, not clipped


def jpeg_folder(root, per_class=4, size=(70, 50), **how):
    """train/ with two classes of smooth JPEGs."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        os.makedirs(root / "train" / name)
        for i in range(per_class):
            small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
            small.resize(size, Image.Resampling.BICUBIC).save(root / "train" / name / f"{i:02}.jpg", quality=90, **how)
    return str(root)


def test_jpegs_are_decoded_as_pil_does(tmp_path, monkeypatch):
    """By torchvision's decoder where there is one, gray, CMYK and turned ones too; a damaged one is refused by both."""
    picture = Image.open(os.path.join(jpeg_folder(tmp_path / "d"), "train", "cat", "00.jpg"))
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = {"plain": (picture, {}), "gray": (picture.convert("L"), {}), "cmyk": (picture.convert("CMYK"), {}),
             "turned": (picture, dict(exif=exif))}
    calls, decode = [], train.decode_jpeg
    for name, (form, how) in forms.items():
        path = str(tmp_path / f"{name}.jpg")
        form.save(path, quality=95, **how)
        monkeypatch.setattr(train, "decode_jpeg", lambda *a, **b: calls.append(name) or decode(*a, **b))
        ours = train.read_rgb(path)
        monkeypatch.setattr(train, "decode_jpeg", None)
        by_pil = train.read_rgb(path)
        assert ours.shape == by_pil.shape == ((3, 70, 50) if name == "turned" else (3, 50, 70))
        assert (ours.float() - by_pil.float()).abs().mean() < .5
    assert calls == list(forms)
    monkeypatch.setattr(train, "decode_jpeg", decode)
    with open(tmp_path / "plain.jpg", "r+b") as file:
        file.truncate(400)
    with pytest.raises(OSError):
        train.read_rgb(str(tmp_path / "plain.jpg"))


def test_the_listing_of_a_folder_is_kept_until_it_changes(tmp_path, monkeypatch):
    root, walks, walk = jpeg_folder(tmp_path / "d"), [], os.walk
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(os, "walk", lambda *a, **b: walks.append(a) or walk(*a, **b))
    listed = lambda: [ds.path(i) for ds in [train.open_dataset(root, "train", 24)] for i in range(len(ds))]
    first = listed()
    assert len(first) == 8 and first == sorted(first) and len(walks) == 2
    assert listed() == first and len(walks) == 2                           # not looked for again
    shutil.copy(first[0], os.path.join(root, "train", "dog", "new.jpg"))
    assert len(listed()) == 9 and len(walks) == 4
    for path in (tmp_path / "hub" / "listings").iterdir():
        path.write_bytes(b"damaged")
    assert len(listed()) == 9 and len(walks) == 6
    ds = train.open_dataset(root, "train", 24)
    assert ds.names.dtype.kind == "S" and ds.labels.tolist() == [0] * 4 + [1] * 5 and ds[8][1:] == (1, 8)
    os.makedirs(os.path.join(root, "train", "empty"))
    with pytest.raises(ValueError, match="empty: no pictures in it"):
        train.open_dataset(root, "train", 24)


def test_center_squares_are_decoded_once(tmp_path, monkeypatch, capsys):
    """By K-means, tokens and every epoch of every run together; half a row, or another folder's, is none."""
    root, reads, read = jpeg_folder(tmp_path / "d"), [], train.read_rgb
    monkeypatch.setattr(train, "read_rgb", lambda path: reads.append(path) or read(path))
    argv = ["--data", root, *SMALL_RUN, "--no-probe", "--epochs", 3, "--batch-size", 4, "--jitter", .4]
    for name, cache in (("plain", ""), ("kept", tmp_path / "cache"), ("again", tmp_path / "cache")):
        reads.clear()
        train.main([str(a) for a in (*argv, "--out", tmp_path / name, "--cache", cache)])
        assert len(set(reads)) == {"plain": 8, "kept": 8, "again": 3}[name]                # three are compared
        assert name == "plain" or len(reads) <= 16                         # once, and twice the three and the neighbors
        assert same_encoder(str(tmp_path / "plain"), str(tmp_path / name))
    path, = (tmp_path / "cache").iterdir()
    assert f"center squares are kept in {path}" in capsys.readouterr().out
    ds = train.open_dataset(root, "train", 24)
    squares = train.Squares(str(path), 8, 24)
    assert path.stat().st_size == 8 * 4096 and all(torch.equal(squares.read(i), ds[i][0]) for i in range(8))
    with open(path, "r+b") as file:
        file.seek(4096 * 5 + 100)
        file.write(bytes(300))                                             # a write that was cut off
    assert squares.read(5) is None and squares.read(8) is None and squares.read(4) is not None
    for i in range(4):                                                     # the same names, other pictures
        Image.new("RGB", (40, 40), "red").save(os.path.join(root, "train", "cat", f"{i:02}.jpg"))
    refused(train.main, [*argv, "--out", tmp_path / "other", "--cache", tmp_path / "cache"], capsys, path, "remove it")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: argparse.Namespace(free=10_000))
    train.main([str(a) for a in (*argv, "--out", tmp_path / "full", "--cache", tmp_path / "none", "--steps", 1)])
    assert "no room" in capsys.readouterr().out and not any((tmp_path / "none").iterdir())


def test_squares_on_a_disk_that_fails(tmp_path, monkeypatch, capsys):
    """No room after all, a folder that cannot be: decoded in every epoch, says one line. Half a write is no square."""
    ds, square = train.open_dataset(jpeg_folder(tmp_path / "d"), "train", 24), torch.full((3, 24, 24), 7, dtype=torch.uint8)
    squares = train.Squares(str(tmp_path / "own" / "x.squares"), 2, 24)
    squares.reserve()
    write = os.pwrite

    def no_space(*_):
        raise OSError(28, "No space left on device")
    for i, fault in enumerate((no_space, lambda file, row, at: write(file, row[:1000], at))):
        monkeypatch.setattr(os, "pwrite", fault)
        squares.write(i, square)
        assert squares.read(i) is None
    monkeypatch.setattr(os, "pwrite", write)
    squares.write(1, square)
    assert torch.equal(squares.read(1), square)
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    for cache, why in ((tmp_path / "full", "No space left"), (tmp_path / "own" / "x.squares" / "no", "Not a directory")):
        train.keep_squares(argparse.Namespace(crop=0, cache=str(cache)), ds)
        out = capsys.readouterr().out
        assert "decoded in every epoch" in out and why in out and out.count("\n") == 1
    assert ds.squares is None and not any((tmp_path / "full").iterdir())

    def denied(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.undo()
    theirs = argparse.Namespace(crop=0, cache=str(tmp_path / "theirs"))
    train.keep_squares(theirs, ds)
    monkeypatch.setattr(train.Squares, "reserve", denied)                   # another user's file is not removed
    train.keep_squares(theirs, ds)
    assert "Permission denied" in capsys.readouterr().out and len(list((tmp_path / "theirs").iterdir())) == 1
    monkeypatch.setattr(os, "preadv", denied)
    assert squares.read(1) is None


def test_plan_and_benchmark(tmp_path, monkeypatch, capsys):
    """Numbers that follow from each other; nothing is written, but squares where --cache says so."""
    monkeypatch.chdir(tmp_path)
    root = jpeg_folder(tmp_path / "d")
    argv = [str(a) for a in ("--data", root, *SMALL_RUN, "--batch-size", 4, "--objective", "mapet")]
    train.main([*argv, "--plan", "--rate", "10"])
    plan = capsys.readouterr().out
    assert "32 images in steps of 4;" in plan and "10 images/s a process (as given)" in plan     # 8 images, 4 epochs
    hours = [float(word) for word in re.findall(r"([\d.e-]+) hours on", plan)]
    assert hours == pytest.approx([32 / 10 / 3600, 32 / 80 / 3600, 32 / 640 / 3600], rel=.01)
    assert "1.44e-07 GB of tokens, 1.38e-05 GB of center squares" in plan                # 8 x 9 x 2, 8 x 3 x 24 x 24 bytes
    assert re.search(r"input: [\d.]+ ms an image", plan)
    gigaflop = float(re.search(r"([\d.]+) GFLOP an image", plan)[1])
    with torch.device("meta"):
        vit = V.vit_micro(image_size=24)
        whole = 3e-9 * V.count_flops(vit, torch.zeros(1, 3, 24, 24))
    assert whole < gigaflop < 4 * whole                                    # two streams: up to three times the rows
    for name in ("mapet", "clustermim", "mae"):
        crop = ["--crop", ".3"] * (name == "clustermim")
        more = [a for a in argv if a not in ("--features", "pixel", "--vocab-size", "6")] if name == "mae" else argv
        train.main([*more, "--objective", name, *crop, "--benchmark", "--steps", "3", "--epochs", "9"])
        out = capsys.readouterr().out
        shares = [float(share) for share in re.findall(r"(?:data|targets|forward|backward|optimizer|save) ([\d.]+)%", out)]
        assert len(shares) == 6 and sum(shares) == pytest.approx(100, abs=.5)
        assert re.search(r"peak memory of a process [\d.]+ GB; [\d.e-]+ TFLOP/s, [\d.]+% a process", out)
    assert sorted(os.listdir(tmp_path)) == ["d"]


def test_batched_jitter_is_that_of_torchvision():
    """Brightness, contrast, saturation, with the same factors in the same order; of (seed, epoch, image) alone."""
    functional = torchvision.transforms.v2.functional
    operations = functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation
    images = torch.randint(256, (6, 3, 9, 9), dtype=torch.uint8)
    factors, order = .6 + .8 * torch.rand(6, 3), torch.tensor(list(itertools.permutations(range(3))))
    jittered = train.jitter_colors(images, factors, order)
    for image, factor, turn, found in zip(images, factors, order, jittered):
        for operation in turn.tolist():
            image = operations[operation](image, factor[operation].item())
        assert (image.int() - found.int()).abs().max() <= 2 and (image == found).float().mean() > .9     # rounding
    jitter, index = train.ColorJitter(.4, 10, 1), torch.tensor([3, 5, 0])
    again = train.ColorJitter(.4, 10, 1)
    assert torch.equal(jitter(images[:3], 2, index)[1:2], again(images[1:2], 2, index[1:2]))
    assert not torch.equal(jitter(images[:3], 2, index), jitter(images[:3], 3, index))
    draws = torch.stack([train.ColorJitter(.4, 10, seed)(torch.full((1, 3, 2, 2), 100, dtype=torch.uint8), 0, [0]).float()
                         for seed in range(60)])
    assert 55 <= draws.min() < 75 and 125 < draws.max() <= 145              # gray: brightness only, 0.6 to 1.4
    assert torch.equal(train.ColorJitter(0, 10, 1)(images, 0, None), images)


def test_exif_rotation_and_centre_crop(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 100
    pixels[:10, 10:20] = 250                                               # top left of the centre square
    upright = Image.fromarray(pixels)
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6                                                       # "turn me 90 degrees clockwise to see me"
    os.makedirs(tmp_path / "x")
    upright.save(tmp_path / "x" / "a.png")
    turned.save(tmp_path / "x" / "b.png", exif=exif)
    a, b = (train.open_dataset(str(tmp_path / "x"), image_size=20)[i][0] for i in (0, 1))
    assert torch.equal(a, b)
    assert (a[:, :10, :10] == 250).all() and (a[:, 10:] == 100).all()      # the middle 20 columns, nothing resized


def test_folder_layout(folder, tmp_path):
    ds, test = (train.open_dataset(folder, split, 24) for split in ("train", "test"))
    assert len(ds) == len(test) == 40 and ds.classes == ["ant", "bee"] and "/val/" in test.path(0)
    assert ds.labels.tolist() == [0] * 20 + [1] * 20
    assert ds[0][0].float().mean() < ds[39][0].float().mean() - 50
    (tmp_path / "classes.txt").write_text("bee\n")
    assert train.open_dataset(folder, "train", 24, tmp_path / "classes.txt").classes == ["bee"]
    (tmp_path / "classes.txt").write_text("cow\n")
    with pytest.raises(ValueError, match="cow"):
        train.open_dataset(folder, "train", 24, tmp_path / "classes.txt")
    flat = os.path.join(folder, "train", "ant")
    assert train.open_dataset(flat, "test", 24) is None and train.open_dataset(flat, "train", 24).labels is None


def test_torchvision_data_set_by_name(tmp_path, monkeypatch):
    """The real loading code on a small CIFAR-10 in its own file format."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "data" / "cifar-10-batches-py"
    os.makedirs(base)
    for name in ["test_batch"] + [f"data_batch_{i}" for i in range(1, 6)]:
        entry = {"data": np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8), "labels": [3, 1, 0, 9]}
        pickle.dump(entry, open(base / name, "wb"))
    pickle.dump({"label_names": list("abcdefghij")}, open(base / "batches.meta", "wb"))
    with pytest.raises(ValueError, match="data/"):                         # not the real files, and no network
        train.open_dataset("cifar10", "train")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    ds = train.open_dataset("cifar10", "train")
    assert len(ds) == 20 and ds[0][0].shape == (3, 32, 32) and ds.labels[:4].tolist() == [3, 1, 0, 9]
    assert len(train.open_dataset("cifar10", "test")) == 4


def test_data_sets_that_cannot_be_fetched_say_what_to_do(monkeypatch, tmp_path):
    """Files that are there are read without a download; stanford_cars has no address any more, and needs scipy."""
    class Cars:
        classes, _samples = ["a", "b"], [("x.jpg", 0), ("y.jpg", 1)]

        def __init__(self, root, split, download=False):
            if download:
                raise ValueError("The original URL is broken")
            if not os.path.isdir("data/stanford_cars"):
                raise RuntimeError("Dataset not found.")

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return Image.new("RGB", (40, 30)), i
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.NAMED, "stanford_cars", (Cars, dict(split="train"), dict(split="test")))
    with pytest.raises(ValueError, match="URL is broken.*data/stanford_cars/.*pip install scipy") as error:
        train.open_dataset("stanford_cars")
    assert "\n" not in str(error.value)
    os.makedirs("data/stanford_cars")
    ds = train.open_dataset("stanford_cars", image_size=16)
    assert ds.labels.tolist() == [0, 1] and ds[1][0].shape == (3, 16, 16) and ds.classes == ["a", "b"]

    def needs_scipy(root, **_):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
    monkeypatch.setitem(train.NAMED, "flowers102", (needs_scipy, {}, {}))
    with pytest.raises(ValueError, match="--data flowers102: torchvision needs scipy"):
        train.open_dataset("flowers102")


def test_schedule_is_a_function_of_the_step():
    everything = list(train.schedule(21, 8, seed=3, start=0, stop=6, rows=slice(0, 8), accumulate=1))
    assert [len(step) for step in everything] == [8] * 6
    for epoch in range(3):
        images = [i for e, i in everything[2 * epoch] + everything[2 * epoch + 1] if e == epoch]
        assert len(set(images)) == 16 and max(images) < 21                 # each at most once an epoch
    assert everything[0] != [(0, i) for _, i in everything[2]]             # another order in another epoch
    assert list(train.schedule(21, 8, 3, 3, 6, slice(0, 8), 1)) == everything[3:]            # resumed
    parts = [list(train.schedule(21, 8, 3, 0, 6, slice(4 * r, 4 * r + 4), 2)) for r in range(2)]
    for step in range(6):                                                  # 2 processes x 2 micro-batches
        assert sum((parts[r][2 * step + m] for r in range(2) for m in range(2)), []) == everything[step]


def test_schedule_depends_on_its_arguments_only():
    """Not on random numbers drawn elsewhere, on other schedules or on where it starts; and it changes none of them."""
    draw = lambda seed, start, stop: list(train.schedule(21, 8, seed, start, stop, slice(0, 8), 1))
    states = lambda: (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before, wanted = states(), draw(3, 0, 6)
    assert states() == before
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    assert all(draw(3, start, 6) == wanted[start:] for start in range(6, -1, -1))
    at_once = list(zip(*[train.schedule(21, 8, seed, 0, 6, slice(0, 8), 1) for seed in (3, 4, 3)], strict=True))
    assert [step[0] for step in at_once] == [step[2] for step in at_once] == wanted != [step[1] for step in at_once]
    images = lambda steps: [i for step in steps for _, i in step]
    epochs = {(seed, epoch): tuple(images(draw(seed, 2 * epoch, 2 * epoch + 2))) for seed in range(4) for epoch in range(4)}
    assert len(set(epochs.values())) == 16                                 # (3, 1) is not (4, 0), nor (1, 3)


def test_schedule_shuffles_once_an_epoch():
    steps, seconds = train.schedule(2_000_000, 4, 0, 10, 10 ** 9, slice(0, 4), 1), []
    for count in (1, 100):
        start = time.process_time()
        seen = [next(steps) for _ in range(count)]
        seconds.append(time.process_time() - start)
    assert len(seen) == 100 and seconds[1] < 10 * seconds[0], seconds


def test_state_of_a_run_is_all_that_its_steps_depend_on(tmp_path):
    def start(seed):
        torch.manual_seed(seed)
        model = objectives.make("mapet", V.ViT(**TINY, drop_path=.2), 6, cut=4)
        model.register_buffer("steps", torch.zeros(()))
        return model, train.make_optimizer(model, args)

    def run(model, optimizer, steps):
        for _ in range(steps):                                             # images, orders, noise: torch's random numbers
            noise = torch.rand(model.noise_rows, 8)
            loss, _ = model(torch.randn(8, 3, 24, 24), torch.randint(6, (8, 9)), noise=noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.steps += 1
        return state_of(model)

    args = train.parse(["--lr", "0.01", "--weight-decay", "0.05", "--beta2", "0.9"])
    unbroken = run(*start(0), 5)
    broken = start(0)
    run(*broken, 3)
    torch.save(train.collect_state(*broken, args, 3, epoch=1), tmp_path / "last.pt")
    run(*broken, 1)                                                        # is lost: it was not saved
    state, again = torch.load(tmp_path / "last.pt", weights_only=True), start(1)
    assert state["step"] == 3 and state["epoch"] == 1 and state["args"]["lr"] == .01
    train.restore_state(state, *again)
    assert run(*again, 2) == unbroken


def test_learning_rate():
    rate = lambda step: train.learning_rate(step, steps=110, warmup=10, peak=1., start=.1, end=.2)
    assert rate(0) == .1 and rate(5) == pytest.approx(.55) and rate(10) == 1
    assert rate(60) == pytest.approx(.6) and rate(110) == pytest.approx(.2)


def test_the_cosine_begins_where_each_paper_has_it():
    """Fine-tuning of ViT-B, 20 of 100 epochs of warm-up: MaPeT's scheduler (timm's) starts the cosine at epoch 0."""
    rate = lambda epoch, cosine: train.learning_rate(epoch, 100, 20, 1., 0., 0., cosine)
    assert [rate(epoch, "warmup") for epoch in (10, 20, 60, 100)] == pytest.approx([.5, 1, .5, 0])
    assert [rate(epoch, "start") for epoch in (10, 20, 60, 100)] == pytest.approx([.5, .9045, .3455, 0], abs=1e-4)
    assert {name: settings["cosine"] for name, settings in probe.RECIPES.items()} == dict(
        mapet="start", mae="warmup", textures="warmup")
    for name in objectives.OBJECTIVES:
        published = "warmup" if name in ("mae", "maskfeat", "clustermim", *TOKENIZERS) else "start"
        assert train.recipe(name, "/imagenet")["cosine"] == published and train.recipe(name, "textures")["cosine"] == "warmup"


def test_weight_decay_groups():
    model = objectives.make("mapet", tiny(layer_scale=.1), 6, cut=4)
    args = train.parse(["--lr", "1", "--weight-decay", "0.05", "--beta2", "0.9"])
    decayed, free = train.make_optimizer(model, args).param_groups
    name = {id(p): key for key, p in model.named_parameters()}
    decayed_names = {name[id(p)] for p in decayed["params"]}
    free_names = {name[id(p)] for p in free["params"]}
    assert decayed["weight_decay"] == .05 and free["weight_decay"] == 0
    assert {"mask_token", "head.weight", "encoder.blocks.0.attn.qkv.weight"} <= decayed_names
    assert {"encoder.pos_embed", "encoder.cls_token", "encoder.blocks.0.ls1.gamma", "head.bias",
            "encoder.norm.weight"} <= free_names
    assert len(decayed_names) + len(free_names) == len(name)


def test_recipes_of_the_paper():
    """MaPeT Table 7, for an ImageNet folder with no other flag; ClusterMIM Sec. 4.1."""
    args = train.parse(["--data", "/imagenet", "--objective", "mapet"])
    train.resolve_args(args, 8, torch.device("cpu"))
    assert (args.model, args.batch_size, args.epochs, args.lr, args.min_lr) == ("vit_base", 2048, 300, 1.5e-3, 1e-5)
    assert (args.warmup_epochs, args.warmup_lr, args.clip_norm, args.weight_decay) == (10, 1e-6, 3, .05)
    assert (args.drop_path, args.layer_scale, args.jitter, args.beta2) == (.1, .1, .4, .999)
    assert (args.features, args.vocab_size, args.image_size, args.patch_size) == ("clip", 8192, 224, 16)
    assert train.recipe("mapet", "/imagenet", "vit_small")["mask_ratio"] == .75
    assert train.recipe("mapet", "/imagenet", "vit_base")["mask_ratio"] == .7
    assert train.recipe("mim", "/imagenet")["mask_ratio"] == 75 / 196
    assert {train.recipe(name, "/imagenet")["epochs"] for name in ("cae", "beit", "mim", "pim", "mapet")} == {300}
    cae, beit = train.recipe("cae", "/imagenet"), train.recipe("beit", "/imagenet")
    assert (cae["mask_ratio"], cae["pos"], cae["init"], cae["decoder_depth"]) == (.5, "sincos", "mae", 4)
    assert (beit["mask_ratio"], beit["pos"]) == (75 / 196, "learned")
    assert train.recipe("mapet", "cifar10")["mask_ratio"] == .75
    assert train.recipe("mapet", "cifar10", "vit_base")["mask_ratio"] == .7
    for name, features, k in (("clustermim", "pixel", 50), ("mae", "pixel", None), ("maskfeat", "hog", None)):
        for model in ("vit_small", "vit_base", "vit_large"):              # ClusterMIM Sec. 4.1: the same for all
            args = train.parse(["--data", "/imagenet", "--objective", name, "--model", model])
            train.resolve_args(args, 8, torch.device("cpu"))
            assert (args.batch_size, args.epochs, args.warmup_epochs, args.weight_decay) == (4096, 200, 40, .05)
            assert args.lr == pytest.approx(1.5e-4 * 16) and (args.min_lr, args.warmup_lr, args.beta2) == (0, 0, .95)
            assert (args.crop, args.jitter, args.clip_norm, args.drop_path, args.layer_scale) == (.2, 0, 0, 0, 0)
            assert (args.pos, args.init, args.mask_ratio, args.decoder_depth) == ("sincos", "mae", .75, 8)
            assert (args.features, args.vocab_size) == (features, k)
    halved = train.parse(["--data", "/imagenet", "--objective", "mae", "--batch-size", "2048"])
    train.resolve_args(halved, 8, torch.device("cpu"))
    assert halved.lr == pytest.approx(1.2e-3)                             # the base rate is per 256 images
    based = train.parse(["--base-lr", "1e-3", "--batch-size", "64"])
    train.resolve_args(based, 1, torch.device("cpu"))
    assert based.lr == pytest.approx(2.5e-4)
    for name, data in itertools.product(objectives.OBJECTIVES, ("textures", "cifar10", "stl10", "/imagenet")):
        args = train.parse(["--objective", name, "--data", data])
        train.resolve_args(args, 1, torch.device("cpu"))                      # every recipe says everything, and fits
        said = [key for key in train.SETTINGS if key != "base_lr" and (key != "vocab_size" or name in TOKEN_OBJECTIVES)]
        assert None not in [getattr(args, key) for key in said], (name, data)
    short = train.parse(["--data", "/imagenet", "--objective", "mae", "--epochs", "20"])
    train.resolve_args(short, 1, torch.device("cpu"))
    assert short.warmup_epochs == 4                                       # a fifth, as 40 of 200
    long = train.parse(["--data", "/imagenet", "--objective", "mae", "--epochs", "800"])
    train.resolve_args(long, 1, torch.device("cpu"))
    assert long.warmup_epochs == 40                                       # MAE's own command: never stretched
    for epochs, warmup in (("10", 2), ("400", 20)):
        args = probe.parse(["finetune", "x", "--epochs", epochs])
        assert probe.apply_flags(probe.RECIPES["mapet"], args).warmup_epochs == warmup
    explicit = train.parse(["--lr", "3", "--cut", "20"])
    train.resolve_args(explicit, 1, torch.device("cpu"))
    assert explicit.lr == 3 and explicit.cut == 20 and explicit.model == "vit_micro"


def test_flags_reach_the_objective():
    def built(*argv):
        args = train.parse(list(argv))
        needs = train.resolve_args(args, 1, torch.device("cpu"))
        model = train.build(args, 16)
        assert model.needs == needs
        return model
    assert built("--objective", "mae").target == "pixel" and built("--objective", "maskfeat").target == "hog"
    assert built("--objective", "mae", "--features", "pixel-norm").target == "pixel-norm"
    assert built("--objective", "maskfeat", "--features", "dino").needs == "features"
    for name in TOKEN_OBJECTIVES:
        assert built("--objective", name, "--label-smoothing", ".1").smoothing == .1
        assert built("--objective", name).smoothing == 0
    cae = built("--objective", "cae", "--decoder-depth", "3", "--layer-scale", ".2", "--pos", "learned")
    assert len(cae.regressor) == len(cae.decoder.blocks) == 3 and cae.regressor[0].ls1.gamma[0] == .2
    assert cae.encoder.pos_embed.requires_grad and not built("--objective", "cae").encoder.pos_embed.requires_grad
    spread = lambda model: model.encoder.cls_token.std()
    assert spread(built("--objective", "mae", "--init", "mae")) > .01 > spread(built("--objective", "mae"))


def test_a_run_from_pictures_to_table(folder, tmp_path, capsys):
    out = str(tmp_path / "run")
    lines = run_small(folder, out)
    printed = capsys.readouterr().out
    assert "TCAS" in printed and "random tokens" in printed and "random encoder" in printed and "ln K 1.792" in printed
    assert [line["step"] for line in lines[:-1]] == list(range(1, 21))
    assert all({"step", "epoch", "loss", "lr"} <= line.keys() for line in lines[:-1])
    summary = lines[-1]
    assert summary["summary"] and {"linear", "linear_random", "knn", "knn_random", "seconds"} <= summary.keys()
    assert summary["linear"] > .9                                          # dark and light: easy
    assert sorted(os.listdir(out)) == ["curves.png", "encoder.pt", "last.pt", "metrics.jsonl", "predictions.png",
                                       "tokenizer.pt", "tokens.npy"]
    state = torch.load(os.path.join(out, "encoder.pt"), weights_only=True)
    assert list(state) == list(V.vit_micro(image_size=24, layer_scale=.1).state_dict())
    last = torch.load(os.path.join(out, "last.pt"), weights_only=True)
    assert last["step"] == 20 and {"model", "optimizer", "epoch", "rng", "args"} <= last.keys()
    tokens = np.load(os.path.join(out, "tokens.npy"))
    tokenizer, ds = kmeans.load_tokenizer(os.path.join(out, "tokenizer.pt")), train.open_dataset(folder, "train", 24)
    assert tokens.dtype == np.uint16 and tokens.shape == (40, 9)
    assert np.array_equal(tokens[:8], tokenizer(torch.stack([ds[i][0] for i in range(8)])).numpy())
    # The curves: of the loss, with what two guesses would get, and of the accuracy.
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_plot", lambda *given, **more: drawn.append((*given, more)))
        patch.setattr(train, "save_plots", lambda plots, path: drawn.append(path))
        share = np.bincount(tokens.ravel(), minlength=6) / tokens.size
        train.draw_curves(argparse.Namespace(out=out, objective="mapet"), 6, -(share * np.log(share)).sum())
    (x, y, curves, levels), (_, name, accuracy, none), path = drawn
    assert (x, y, name, path) == ("epoch", "loss on tokens", "accuracy", f"{out}/curves.png") and not none["levels"]
    assert curves == {"mapet": [([line["epoch"] for line in lines[:-1]], [line["loss"] for line in lines[:-1]])]}
    assert accuracy["mapet"][0][1][-1] == lines[-2]["accuracy"]
    (uniform, ln_k), (frequent, entropy) = levels["levels"].items()
    assert uniform == "ln 6 = 1.792, a uniform guess" and ln_k == math.log(6) > entropy > 0
    assert f"one by code frequency {entropy:.3f}" in printed and frequent.startswith(f"{entropy:.3f}")
    # Once more: it is complete, so nothing is trained and the same table is printed.
    again = run_small(folder, out)
    assert again == lines


@pytest.mark.parametrize("name", ["mae", "clustermim", "maskfeat", "beit", "mim", "pim", "cae"])
def test_every_objective_from_pictures_to_table(folder, tmp_path, capsys, name):
    out = str(tmp_path / name)
    shallow = ["--decoder-depth", 1] * (name in ("mae", "clustermim", "maskfeat", "cae"))
    lines = small(folder, out, name, "--epochs", 6, *shallow)
    printed = capsys.readouterr().out
    assert lines[-1]["summary"] and lines[-1]["linear"] > .9 and "held-out" in printed
    first, last = lines[0], lines[-2]
    assert last["loss"] < first["loss"] and math.isfinite(last["loss"])
    assert ("explained" in last) == (name in ("mae", "maskfeat")) and ("alignment" in last) == (name == "cae")
    assert ("tokens.npy" in os.listdir(out)) == (name in ("beit", "mim", "pim", "cae"))     # clustermim: of each crop
    picture = Image.open(os.path.join(out, "predictions.png"))
    assert picture.size[1] == 4 + (3 if name == "mae" else 4) * (24 * 5 + 4)         # labelled rows of 8 images
    state = torch.load(os.path.join(out, "encoder.pt"), weights_only=True)
    assert not [key for key in state if key.split(".")[0] not in ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")]
    last = torch.load(os.path.join(out, "last.pt"), weights_only=True)["model"]
    assert not any("tokenizer" in key or "centroids" in key for key in last)


def seen_by_the_model(monkeypatch):
    """A list that fills with (normalized images, tokens or features) of each training step."""
    seen, forward = [], objectives.Objective.forward
    def noting(self, images, tokens=None, *rest, **how):
        seen.append((images, tokens))
        return forward(self, images, tokens, *rest, **how)
    monkeypatch.setattr(objectives.Objective, "forward", noting)
    return seen


@pytest.mark.parametrize("name, features", [("clustermim", "pixel"), ("mapet", "hog"), ("clustermim", "vit")])
def test_tokens_of_crops_are_made_as_they_come(folder, small_run, tmp_path, monkeypatch, name, features):
    """Every token objective with crops: the tokens are the tokenizer's of the very crop that the model gets."""
    seen, out = seen_by_the_model(monkeypatch), str(tmp_path / "run")
    features = os.path.join(small_run, "encoder.pt") if features == "vit" else features
    small(folder, out, name, "--crop", .3, "--jitter", .2, "--no-probe", "--epochs", 2, "--features", features)
    tokenizer, ds = kmeans.load_tokenizer(os.path.join(out, "tokenizer.pt")), train.open_dataset(folder, "train", 24)
    whole = train.normalize(torch.stack([ds[i][0] for i in range(len(ds))]), ds)
    for images, tokens in seen[:10]:
        pixels = (images * torch.tensor(ds.std).view(3, 1, 1) + torch.tensor(ds.mean).view(3, 1, 1)) * 255
        assert (tokenizer(pixels.round().to(torch.uint8)) == tokens).all() and tokens.shape == (8, 9)
        assert all((image - whole).abs().amax((1, 2, 3)).min() > .01 for image in images)      # no centre square
    assert "tokens.npy" not in os.listdir(out)


def test_crops_are_a_function_of_seed_epoch_and_image(folder):
    ds = train.open_dataset(folder, "train", 24)
    items, again = (train.Augmented(ds, train.random_crop(24, .2), 3) for _ in range(2))
    assert torch.equal(items[0, 5][0], again[0, 5][0]) and items[0, 5][0].shape == (3, 24, 24)
    assert not torch.equal(items[0, 5][0], items[1, 5][0]) and not torch.equal(items[0, 5][0], items[0, 6][0])
    assert items[0, 25][1:] == (1, 25, 25)                                 # label, index, index really read
    textures = train.Textures("val")
    mirror = train.random_crop(48, .99)
    flipped = [train.Augmented(textures, mirror, seed)[0, 0][0] for seed in range(8)]
    original = textures[0][0].float()
    nearer = [(f.float() - original).abs().mean() < (f.flip(2).float() - original).abs().mean() for f in flipped]
    assert 0 < sum(nearer) < 8                                            # some are mirrored, some are not


def test_features_of_a_teacher(folder, small_run, tmp_path, monkeypatch):
    """maskfeat with continuous features: the teacher's, of the crop, with its own normalization; unit length in the loss."""
    seen, out, teacher = seen_by_the_model(monkeypatch), str(tmp_path / "run"), os.path.join(small_run, "encoder.pt")
    lines = small(folder, out, "maskfeat", "--crop", .3, "--no-probe", "--features", teacher)
    assert lines[-1]["explained"] > lines[0]["explained"]
    vit, ds = V.from_weights(teacher), train.open_dataset(folder, "train", 24)
    for images, features in seen[:3]:
        torch.testing.assert_close(features, vit(images)[:, 1:].detach(), atol=2e-3, rtol=1e-3)
    last = torch.load(os.path.join(out, "last.pt"), weights_only=True)["model"]
    assert last["decoder.head.weight"].shape[0] == vit.width


def test_cae_and_crops_resume_accumulate_and_share(folder, tmp_path):
    """Killed and resumed, in micro-batches, on two processes: CAE's teacher and the tokens of crops stay the same."""
    how = ["--no-probe", "--crop", .3, "--jitter", .2, "--drop-path", .2, "--decoder-depth", 1]
    argv = ["train.py", "--data", folder, *SMALL_RUN, "--objective", "cae", *how]
    two = Background(*argv, "--out", tmp_path / "two", processes=2)
    whole = small(folder, str(tmp_path / "whole"), "cae", *how)
    for steps in (7, 20):
        parts = small(folder, str(tmp_path / "parts"), "cae", *how, "--steps", steps)
    assert [line["loss"] for line in whole] == [line["loss"] for line in parts]
    assert same_encoder(str(tmp_path / "whole"), str(tmp_path / "parts"))
    four = small(folder, str(tmp_path / "four"), "cae", *how, "--micro-batch", 2)
    finished(two)
    lines = [json.loads(line) for line in open(tmp_path / "two" / "metrics.jsonl")]
    for a, b, c in zip(whole, four, lines, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-4) and c["loss"] == pytest.approx(a["loss"], abs=2e-4)
        assert b["alignment"] == pytest.approx(a["alignment"], abs=2e-4)


@pytest.mark.parametrize("name", ["maskfeat", "cae", "mapet"])
def test_objectives_compile(name):
    """One of each class: torch.compile's tracing, in one graph, gives the same (its code generator takes minutes)."""
    model, images, given, order = example(name, dict(FORMS[::-1])[name], cut=4, decoder_depth=1)
    traced = copy.deepcopy(model)
    traced.compile(backend="aot_eager", fullgraph=True)
    for _ in range(3):                                                    # CAE's teacher lags one of these steps behind
        losses = [m(images, given, order)[0] for m in (model, traced)]
        for loss, m in zip(losses, (model, traced)):
            m.zero_grad()
            loss.backward()
            m.before_step()
        torch.testing.assert_close(*losses)
        for a, b in zip(model.parameters(), traced.parameters()):
            assert (a.grad is None) == (b.grad is None)
            torch.testing.assert_close(a, b)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            for a, b in zip(model.parameters(), traced.parameters()):
                if a.grad is not None:
                    step = .05 * torch.randn_like(a)
                    a += step
                    b += step


def test_learned_tokenizers_compile():
    """Noise by hashing, buffers that count, a network outside of the model: traced once, for every step, the same."""
    _, images, features, noise = tokenizer_example("peco")
    model = objectives.LearnedTokenizer(V.ViT(**{**TINY, "depth": 1}), 7, None, 1, soft=True, unit=False, features=False,
                                        perceptual=True, beta=1.)
    model.layers, noise = V.PatchFeatures("hog", 8, 24).layers, noise[-model.noise_rows:]
    traced = copy.deepcopy(model)
    traced.compile(backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    graphs = []
    for step in range(3):
        losses = [m(images, features, noise=noise)[0] for m in (model, traced)]
        torch.testing.assert_close(*losses)
        for loss, m in zip(losses, (model, traced)):
            m.zero_grad()
            loss.backward()
            m.end_step(step / 3, **alone)
        for a, b in zip(model.parameters(), traced.parameters()):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), traced.buffers()))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2]                                         # nothing is compiled anew


def test_stop_resume_equals_unbroken(folder, tmp_path):
    """--steps stops early; going on gives the same weights and the same log, bit for bit."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    a = run_small(folder, whole, "--no-probe", "--drop-path", .2, "--jitter", .4)
    for steps in (7, 8, 20):
        b = run_small(folder, parts, "--no-probe", "--drop-path", .2, "--jitter", .4, "--steps", steps)
    strip = lambda lines: [{key: line[key] for key in ("step", "loss", "lr", "epoch")} for line in lines]
    assert strip(a) == strip(b) and same_encoder(whole, parts)
    other = str(tmp_path / "other")
    run_small(folder, other, "--no-probe", "--drop-path", .2, "--jitter", .4, "--seed", 1)
    assert not same_encoder(whole, other)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_learned_tokenizers_resume_accumulate_and_share(folder, tmp_path, name):
    """From pictures to tokenizer.pt; stopped and resumed: the same to the last bit; in micro-batches, on two processes."""
    how = ["--crop", .3, "--drop-path", .2, "--decoder-depth", 1, "--init", "mae", "--no-probe", "--epochs", 2]
    features = {"peco": "hog", "vqkd": "hog"}.get(name, "pixel")
    argv = ["--data", folder, *SMALL_RUN, *how, "--objective", name, "--features", features]
    if name == "vqkd":                                                    # has all there is: K-means start, sums, features
        two = Background("train.py", *argv, "--out", tmp_path / "two", processes=2)
    runs = {"whole": [[]], "parts": [["--steps", 4], []], "four": [["--micro-batch", 2]]}
    for out, calls in runs.items():
        for more in calls:
            train.main([str(word) for word in (*argv, "--out", tmp_path / out, *more)])
    if name == "vqkd":
        finished(two)
        runs["two"] = None
    read = lambda out: [json.loads(line) for line in open(tmp_path / out / "metrics.jsonl")]
    keys = "loss", "error", "used", "perplexity", "reseeded"
    for out in list(runs)[1:]:
        for a, b in zip(read("whole"), read(out), strict=True):
            for key in keys:
                near = dict(abs=1e-3) if a["step"] < 3 else dict(rel=.1, abs=1)      # rounding may flip a token
                assert a[key] == b[key] if out == "parts" else a[key] == pytest.approx(b[key], **near), (out, key)
    assert same_encoder(str(tmp_path / "whole"), str(tmp_path / "parts"))
    files = ["curves.png", "encoder.pt", "last.pt", "metrics.jsonl", "predictions.png", "tokenizer.pt"]
    assert sorted(os.listdir(tmp_path / "whole")) == files
    a, b = (torch.load(tmp_path / out / "tokenizer.pt", weights_only=True) for out in ("whole", "parts"))
    assert torch.equal(a["centroids"], b["centroids"]) and a["encoder"].keys() == b["encoder"].keys()
    assert a["features"] == name and a["metric"] == ("cosine" if name == "vqkd" else "euclidean")


def test_a_learned_tokenizer_goes_wherever_one_of_kmeans_goes(folder, tmp_path, capsys):
    out, made = tmp_path / "dvae", lambda name: tmp_path / "dvae" / name
    base = ["--data", folder, "--device", "cpu"]
    run = ["--model", "vit_micro", "--image-size", 24, "--patch-size", 8, "--batch-size", 8, "--workers", 0, "--epochs", 1]
    train.main([str(w) for w in (*base, *run, "--objective", "dvae", "--vocab-size", 6, "--out", out, "--init", "mae",
                                 "--decoder-depth", 1)])
    printed = capsys.readouterr().out
    assert "of 6 codes used" in printed and "TCAS" in printed and "rows image, tokens, rebuilt" in printed
    assert "dvae" in printed and "random encoder" in printed              # its encoder is probed like any other
    os.remove(made("encoder.pt"))                                         # tokenizer.pt is all that is needed
    shutil.copy(made("tokenizer.pt"), tmp_path / "t.pt")
    kmeans.main(["tokenize", *base, "--tokenizer", str(tmp_path / "t.pt"), "--out", str(tmp_path)])
    kmeans.main(["show", *base, "--tokenizer", str(tmp_path / "t.pt"), "--out", str(tmp_path), "--images", "20"])
    tcas.main(["score", *base, "--tokenizer", str(tmp_path / "t.pt")])
    probed("tokens", tmp_path / "t.pt", "--data", folder, "--out", tmp_path / "probe", "--epochs", 1)
    tokens, tokenizer = kmeans.load_tokens(str(tmp_path / "tokens.npy")), kmeans.load_tokenizer(str(tmp_path / "t.pt"))
    ds = train.open_dataset(folder, "train", 24)
    assert np.array_equal(tokens[:8], tokenizer(torch.stack([ds[i][0] for i in range(8)])).numpy())
    for crop in (0, .3):
        train.main([str(w) for w in (*base, *run, "--objective", "mim", "--tokenizer", tmp_path / "t.pt", "--no-probe",
                                     "--crop", crop, "--out", tmp_path / f"mim{crop}")])
        assert ("tokens.npy" in os.listdir(tmp_path / f"mim{crop}")) == (not crop)
    assert np.array_equal(np.load(tmp_path / "mim0" / "tokens.npy"), tokens)


def test_recipes_of_learned_tokenizers(folder, capsys):
    """VQ-KD's is BEiT v2's; of the others what fits a ViT; --help shows where they differ; --plan needs no teacher."""
    vqkd = train.recipe("vqkd", "/imagenet")
    assert (vqkd["vocab_size"], vqkd["decoder_depth"], vqkd["epochs"], vqkd["batch_size"]) == (8192, 3, 100, 512)
    assert (vqkd["lr"], vqkd["min_lr"], vqkd["warmup_epochs"], vqkd["beta2"]) == (2e-4, 1e-5, 10, .99)
    assert (vqkd["weight_decay"], vqkd["crop"], vqkd["jitter"], vqkd["mask_ratio"]) == (1e-4, .08, 0, 0)
    assert train.recipe("peco", "/imagenet")["lr"] == 5e-5 and train.recipe("peco", "/imagenet")["batch_size"] == 128
    assert train.recipe("vq", "/imagenet")["vocab_size"] == 1024 and train.recipe("dvae", "/imagenet")["min_lr"] == 1.25e-6
    size = lambda name, build: objectives.make(name, build(), 8192, values=512).codebook.shape
    with torch.device("meta"):
        assert size("vqkd", V.vit_base) == (8192, 32) and size("peco", V.vit_base) == size("vq", V.vit_base) == (8192, 256)
    for name in TOKENIZERS:
        train.main(["--data", folder, "--objective", name, "--plan", "--batch-size", "8", "--vocab-size", "64"])
        assert "GFLOP" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "vqkd 512" in (printed := re.sub(r"\s+", " ", capsys.readouterr().out)) and "peco 5e-05" in printed


def test_bad_input_of_learned_tokenizers_is_one_line(folder, small_run, tmp_path, capsys):
    base = ["--data", folder, "--out", tmp_path / "out", *SMALL_RUN, "--no-probe"]
    no = lambda name, argv, *words: refused(train.main, [*base, "--objective", name, *argv], capsys, *words)
    no("vq", ["--cut", 3], "vq hides nothing", "--cut")
    no("dvae", ["--mask-ratio", .5], "dvae hides nothing", "--mask-ratio")
    no("vq", ["--features", "hog"], "--features hog", "vq rebuilds pixels")
    no("peco", ["--features", "clip", "--patch-size", 8], "clip")
    no("peco", ["--features", "nonsense"], "nonsense")
    no("vqkd", ["--vocab-size", 100], "--vocab-size 100", "72 patches")
    no("vqkd", ["--tokens", "t.npy"], "--tokens", "vqkd")
    no("dvae", ["--tokenizer", "t.pt"], "--tokenizer", "dvae")
    no("vq", ["--label-smoothing", .1], "--label-smoothing", "vq")
    assert not os.path.exists(tmp_path / "out") or not os.listdir(tmp_path / "out")


def test_kill_at_any_moment(folder, tmp_path):
    """kill -9 in the middle of everything, again and again; the same command ends with the same encoder."""
    argv = ["train.py", "--data", folder, *SMALL_RUN, "--no-probe", "--epochs", 20, "--save-every", 3]
    unbroken, killed = str(tmp_path / "a"), str(tmp_path / "b")
    reference = Background(*argv, "--out", unbroken)
    rng, kills = np.random.default_rng(int(time.time())), 0
    last = os.path.join(killed, "last.pt")
    for _ in range(2):
        process, started = Background(*argv, "--out", killed), os.path.exists(last)
        while not os.path.exists(last) and process.poll() is None:         # the first one dies soon after its first save
            time.sleep(.01)
        time.sleep(rng.uniform(0, .3) + (rng.uniform(0, 5) if started else 0))     # the other at any moment
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    assert kills >= 1
    finished(Background(*argv, "--out", killed))
    finished(reference)
    assert same_encoder(unbroken, killed)
    steps = [json.loads(line)["step"] for line in open(os.path.join(killed, "metrics.jsonl"))]
    assert steps == list(range(1, 101))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_0(folder, tmp_path, number):
    out = str(tmp_path / "run")
    process = Background("train.py", "--data", folder, "--out", out, *SMALL_RUN, "--no-probe", "--epochs", 2000, "--workers", 1,
                     session=True)
    wait_for_lines(process, out)
    os.killpg(process.pid, number)                                         # Ctrl-C and SLURM reach the loaders, too
    assert "the same command goes on" in finished(process)
    saved = torch.load(os.path.join(out, "last.pt"), weights_only=True)["step"]
    assert saved == json.loads(open(os.path.join(out, "metrics.jsonl")).read().splitlines()[-1])["step"]
    assert 0 < saved < 10000


def test_two_processes_equal_one(folder, tmp_path):
    argv = ["train.py", "--data", folder, *SMALL_RUN, "--drop-path", .2, "--jitter", .4]
    two = torchrun(*argv, "--out", tmp_path / "two")
    one = run_small(folder, str(tmp_path / "one"), "--drop-path", .2, "--jitter", .4)
    printed = finished(two)
    assert printed.count("going on") == 0 and printed.count("TCAS") == 1   # only rank 0 prints
    lines = [json.loads(line) for line in open(tmp_path / "two" / "metrics.jsonl")]
    for a, b in zip(one[:-1], lines[:-1], strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert one[-1]["linear"] == pytest.approx(lines[-1]["linear"], abs=.051)


def test_losses_of_all_processes_outlive_a_checkpoint(tmp_path):
    """A checkpoint between two lines of the log: the next line is the mean over both processes, before and after."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import sys; sys.path.insert(0, {HERE!r})
import torch, kmeans, train
from argparse import Namespace
rank, _, device = kmeans.setup("cpu")
given = Namespace(out={str(tmp_path)!r}, batch_size=2), Namespace(logs=("accuracy",), needs="tokens"), train.Targets(size=5)
log = train.Log(*given, None, device)
log.add(torch.tensor(1. + rank), {{"accuracy": torch.tensor(.5)}})
log = train.Log(*given, dict(sums=log.add_up(), step=1), device)
log.add(torch.tensor(5. + rank), {{"accuracy": torch.tensor(1.)}})
log.write(2, .5, .1, 4)
""")
    finished(Background(driver, processes=2))
    line, = train.read_metrics(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["accuracy"]) == (3.5, .75)                  # of 1, 2, 5, 6


def test_accumulation_equals_one_batch(folder, tmp_path):
    one = run_small(folder, str(tmp_path / "one"), "--no-probe", "--drop-path", .2)
    four = run_small(folder, str(tmp_path / "four"), "--no-probe", "--drop-path", .2, "--micro-batch", 2)
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_tokenizer_and_tokens_from_files(folder, tmp_path):
    first = run_small(folder, str(tmp_path / "a"), "--no-probe")
    base = ["--data", folder, *SMALL_RUN, "--no-probe"]
    base = [str(a) for a in base if a not in ("--features", "pixel", "--vocab-size", 6)]
    for flag, name in (("--tokenizer", "tokenizer.pt"), ("--tokens", "tokens.npy")):
        out = str(tmp_path / name)
        train.main([*base, "--out", out, flag, str(tmp_path / "a" / name)])
        lines = [json.loads(line) for line in open(os.path.join(out, "metrics.jsonl"))]
        assert [line["loss"] for line in lines] == [line["loss"] for line in first]


def test_unlabelled_folder_trains_without_a_table(folder, tmp_path, capsys):
    lines = run_small(os.path.join(folder, "train", "ant"), str(tmp_path / "run"), "--epochs", 2)
    assert len(lines) == 4 and "no labels" in capsys.readouterr().out


def test_damaged_picture_is_named_and_replaced(tmp_path, capsys):
    root = make_folder(tmp_path / "d", per_class=60, size=30)
    victim = os.path.join(root, "train", "bee", "007.png")
    Image.open(victim).save(victim, format="JPEG")
    open(victim, "r+b").truncate(400)
    lines = run_small(root, str(tmp_path / "run"), "--epochs", 1, "--no-probe")
    assert capsys.readouterr().err.count(victim) == 1 and len(lines) == 15
    tokens = np.load(tmp_path / "run" / "tokens.npy")
    assert np.array_equal(tokens[67], tokens[68])                          # the neighbor's
    for name in ("001.png", "002.png"):
        open(os.path.join(root, "train", "ant", name), "wb").close()
    argv = ["--data", root, "--out", tmp_path / "run2", *SMALL_RUN, "--no-probe"]
    refused(train.main, argv, capsys, "2 of 120", "more than 1 %", ".png")
    assert not os.path.exists(tmp_path / "run2" / "last.pt")


def in_one_line(process, code, *words):
    """The process ended with this exit code, one line that holds the words, and no stack trace."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code and "Traceback" not in out + err, (process.returncode, out + err)
    line, = [line for line in err.splitlines() if "error:" in line]
    assert all(str(word) in line for word in words), line


def wait_for_lines(process, out, count=1):
    """Until metrics.jsonl has so many lines."""
    metrics = os.path.join(out, "metrics.jsonl")
    while not os.path.exists(metrics) or open(metrics).read().count("\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(.05)


@pytest.mark.parametrize("fault", ["folder vanishes", "loader is killed"])
def test_what_is_lost_on_the_way_ends_in_one_line(tmp_path, fault):
    """One line, the last checkpoint stays, and the same command goes on."""
    data, out = make_folder(tmp_path / "images"), str(tmp_path / "run")
    argv = ["train.py", "--data", data, "--out", out, *SMALL_RUN, "--no-probe", "--save-every", 1, "--workers", 2]
    process = Background(*argv, "--epochs", 400)
    wait_for_lines(process, out, 3)
    if fault == "folder vanishes":
        os.rename(data, data + "-elsewhere")
        in_one_line(process, 2, "train.py: error:", ".png", "is the folder still there?")
        os.rename(data + "-elsewhere", data)
    else:
        children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
        loaders = [child for child in children if b"resource_tracker" not in open(f"/proc/{child}/cmdline", "rb").read()]
        os.kill(int(loaders[0]), signal.SIGKILL)
        in_one_line(process, 1, "train.py: error: a loading process was lost", "the same command goes on")
    saved = torch.load(os.path.join(out, "last.pt"), weights_only=True)["step"]
    assert saved >= 2 and not [name for name in os.listdir(out) if name.endswith(".tmp")]
    assert f"going on from {out}/last.pt at step {saved}" in finished(Background(*argv, "--epochs", 400, "--steps", saved + 1))


@pytest.mark.parametrize("room", [3_000, 60_000, 800_000])
def test_a_full_disk_ends_in_one_line(folder, tmp_path, room):
    """No file may grow beyond `room` bytes: too little for tokens.npy, for the picture of a run, for last.pt."""
    out = str(tmp_path / "run")
    argv = ["train.py", "--data", folder, "--out", out, *SMALL_RUN, "--no-probe", "--epochs", 1]
    in_one_line(Background(*argv, room=room), 2, "train.py: error:", out, "cannot be written")
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
    finished(Background(*argv))
    assert torch.load(os.path.join(out, "last.pt"), weights_only=True)["step"] == 5


def test_a_run_that_steps_stopped_says_so(folder, tmp_path, capsys):
    run_small(folder, str(tmp_path / "run"), "--steps", 3)
    assert "--steps stopped this run at 3 of 20 steps" in capsys.readouterr().out
    run_small(folder, str(tmp_path / "run"))
    assert "--steps stopped" not in capsys.readouterr().out


def test_default_folder_names_what_differs_from_the_recipe():
    def name(*argv):
        args = train.parse([str(word) for word in argv])
        train.resolve_args(args, 1, torch.device("cpu"))
        return args.out
    assert name() == "runs/mapet-textures" and name("--objective", "mae") == "runs/mae-textures"
    assert name("--steps", 5, "--workers", 2, "--log-every", 1, "--no-probe") == "runs/mapet-textures"     # the same run
    assert name("--epochs", 6, "--lr", 1.5e-3, "--seed", 0) == "runs/mapet-textures"                       # the recipe's
    imagenet = ["--data", "/data/imagenet/"]
    names = [name(*imagenet, *more) for more in (
        [], ["--model", "vit_small"], ["--features", "pixel", "--vocab-size", 100], ["--crop", .2], ["--seed", 3],
        ["--model", "vit_small", "--features", "pixel", "--vocab-size", 100], ["--epochs", 100], ["--lr", 1e-3],
        ["--features", "runs/mae-imagenet/encoder.pt"], ["--tokenizer", "runs/tok/tokenizer.pt"])]
    assert names[0] == "runs/mapet-imagenet" and names[5] == "runs/mapet-imagenet-vit_small-pixel-k100"
    assert len(set(names)) == len(names) and all(word.count("/") == 1 for word in names)
    assert name("--objective", "mae", "--features", "pixel-norm") == "runs/mae-textures-pixel-norm"


def test_not_finite_stops_and_keeps_the_last_good_checkpoint(folder, tmp_path, capsys, monkeypatch):
    out, forward, calls = str(tmp_path / "run"), objectives.MaPeT.forward, []

    def broken(self, *args, **how):
        loss, logs = forward(self, *args, **how)
        calls.append(1)
        return loss * (math.nan if len(calls) == 8 else 1), logs
    monkeypatch.setattr(objectives.MaPeT, "forward", broken)
    refused(train.main, ["--data", folder, "--out", out, *SMALL_RUN, "--save-every", 5], capsys,
            "step 8", "not finite", "keeps step 5")
    last = torch.load(os.path.join(out, "last.pt"), weights_only=True)
    assert last["step"] == 5 and all(torch.isfinite(value).all() for value in last["model"].values())
    monkeypatch.undo()
    run_small(folder, out, "--no-probe", "--save-every", 5)
    run_small(folder, str(tmp_path / "whole"), "--no-probe")
    assert same_encoder(out, str(tmp_path / "whole"))


def test_bad_input_is_one_line_and_writes_nothing(folder, tmp_path, capsys):
    out = tmp_path / "out"
    no = lambda *argv_and_words: refused(train.main, [*SMALL_RUN, "--out", out, *argv_and_words[0]], capsys,
                                         *argv_and_words[1:])
    no(["--data", tmp_path / "missing"], "missing", "no such folder")
    os.makedirs(tmp_path / "empty")
    no(["--data", tmp_path / "empty"], "empty", "no pictures")
    os.makedirs(tmp_path / "half" / "train" / "cat")
    os.makedirs(tmp_path / "half" / "train" / "dog")
    Image.new("RGB", (9, 9)).save(tmp_path / "half" / "train" / "dog" / "a.png")
    no(["--data", tmp_path / "half"], "cat")
    no(["--data", folder, "--cut", 10], "cutting point 10", "1 to 9")
    no(["--data", folder, "--cut", 0], "cutting point 0")
    no(["--data", folder, "--cut", 3, "--mask-ratio", .5], "--mask-ratio")
    no(["--data", folder, "--batch-size", 9, "--micro-batch", 2], "--batch-size 9", "--micro-batch 2")
    no(["--data", folder, "--batch-size", 64], "--batch-size 64", "40")
    no(["--data", folder, "--image-size", 25], "25", "8")
    no(["--data", folder, "--lr", "nan"], "--lr")
    no(["--data", folder, "--objective", "jigsaw"], "jigsaw")
    no(["--data", folder, "--features", "nonsense"], "nonsense")
    np.save(tmp_path / "stored.npy", np.zeros((40, 9), np.uint16))
    no(["--data", folder, "--tokens", tmp_path / "stored.npy", "--crop", .2], "stored.npy", "moves the patches", "--crop 0")
    no(["--data", folder, "--objective", "clustermim", "--tokens", tmp_path / "stored.npy"], "stored.npy", "--tokenizer")
    no(["--data", folder, "--objective", "mae"], "--vocab-size", "mae")
    no(["--data", folder, "--crop", 1.5], "--crop 1.5", "1")
    no(["--data", folder, "--drop-path", 1], "--drop-path 1", "below 1")
    no(["--data", folder, "--beta2", 1], "--beta2 1", "below 1")
    no(["--data", folder, "--seed", 1 << 63], "--seed", "below 2^63")
    no(["--data", folder, "--out", tmp_path / "half" / "train" / "dog" / "a.png"], "a.png", "a folder is wanted")
    no(["--data", folder, "--decoder-depth", 2], "--decoder-depth", "mapet has no decoder")
    no(["--data", folder, "--vocab-size", 70000], "70000", "16 bits")
    no(["--data", folder, "--tokens", tmp_path / "stored.npy", "--tokenizer", tmp_path / "t.pt"], "--tokenizer", "one of them")
    no(["--data", folder, "--lr", 1, "--base-lr", 1], "--base-lr")
    for name, features in (("mae", "hog"), ("maskfeat", "pixel"), ("maskfeat", "nonsense")):
        argv = ["--data", folder, "--out", out, "--model", "vit_micro", "--image-size", 24, "--patch-size", 8]
        argv += ["--batch-size", 8, "--device", "cpu", "--objective", name, "--features", features]
        refused(train.main, argv, capsys, features)
    assert not out.exists() or not os.listdir(out)


def test_work_goes_on_with_the_same_pictures_only(folder, small_run, tmp_path, capsys):
    """Not with as many others: a run without stored tokens, a probe, the pieces of a file of tokens."""
    data, tokenizer = shutil.copytree(folder, tmp_path / "data"), toy_tokenizer()
    small(data, str(tmp_path / "run"), "mae", "--no-probe", "--steps", 2)
    probe_it = ["finetune", small_run, *FINETUNE, "--data", data, "--out", tmp_path / "probe", "--no-floor"]
    assert probed(*probe_it, "--steps", 2) is None
    before = kmeans.identify(train.open_dataset(str(data), "train", 24))
    os.rename(data / "train" / "ant" / "005.png", data / "train" / "ant" / "5.png")
    after = kmeans.identify(train.open_dataset(str(data), "train", 24))
    assert before.startswith("40 (") and after.startswith("40 (") and before != after
    refused(lambda _: small(data, str(tmp_path / "run"), "mae", "--no-probe"), [], capsys, "last.pt",
            f"--images {before} there, {after} here")
    refused(probe.main, [*probe_it, "--device", "cpu"], capsys, "finetune.pt", f"--images 40 of {before} there")

    one, other = Toy(40), Toy(40)                                          # named alike, labelled otherwise
    other.labels = np.zeros(40, dtype=np.int64)
    folders = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "write_rows", lambda path, *_: folders.append(os.path.dirname(path)))
        patch.setattr(kmeans, "load_tokens", lambda path: None)
        for ds in (one, other, one):
            kmeans.tokenize(tokenizer, ds, str(tmp_path / "tokens.npy"))
    pieces = [name for name in folders if name != str(tmp_path)]
    assert len(pieces) == 3 and pieces[0] == pieces[2] != pieces[1]


def test_a_run_goes_on_with_its_own_tokenizer_only(folder, tmp_path, capsys):
    """Killed after K-means, before the first checkpoint, and started with other settings of K-means."""
    out = tmp_path / "run"
    run_small(folder, str(out), "--no-probe", "--steps", 1)
    os.remove(out / "last.pt")
    for flag, here, there in (("--seed", 1, 0), ("--fraction", .5, .05), ("--fit-images", 20, None)):
        refused(train.main, ["--data", folder, *SMALL_RUN, "--out", out, flag, here], capsys, "tokenizer.pt",
                f"is {there}, this run's is {here}", "--fresh")
    run_small(folder, str(tmp_path / "b"), "--no-probe", "--steps", 1, "--seed", 1, "--tokenizer", out / "tokenizer.pt")
    run_small(folder, str(out), "--no-probe", "--steps", 1)


def test_stored_tokens_of_one_image():
    """A tensor of one number passes for a number with NumPy: (n,) would come instead of (1, n)."""
    targets = train.Targets(np.arange(12, dtype=np.uint16).reshape(3, 4), size=12)
    assert targets.of(torch.zeros(1, 3, 8, 8), torch.tensor([2])).tolist() == [[8, 9, 10, 11]]


def test_file_of_classes(tmp_path):
    data = make_folder(tmp_path / "data", per_class=2, size=8, classes=("ant", "bee", "golden retriever"))
    file = tmp_path / "keep.txt"
    file.write_text("golden retriever\n\n  ant \ngolden retriever\n")
    ds = train.open_dataset(data, "train", 8, str(file))
    assert ds.classes == ["ant", "golden retriever"] and ds.labels.tolist() == [0, 0, 1, 1]
    for content, words in ((b"\n", "names no folder"), (b"\xff\xfe\x00", "names no folder"), (b"cat", "no class folder cat")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"keep.txt: .*{words}"):
            train.open_dataset(data, "train", 8, str(file))


def test_links_are_followed_but_not_upwards(tmp_path):
    data = make_folder(tmp_path / "data", per_class=2, size=8)
    os.symlink("..", tmp_path / "data" / "train" / "ant" / "up")
    for one, other in ("to", "fro"), ("fro", "to"):                        # and back by another link
        os.makedirs(tmp_path / one, exist_ok=True)
        os.symlink(tmp_path / other, tmp_path / one / other)
    os.symlink(tmp_path / "to", tmp_path / "data" / "train" / "bee" / "to")
    shutil.copy(tmp_path / "data" / "train" / "bee" / "000.png", tmp_path / "fro")
    os.symlink(tmp_path / "data" / "val" / "bee", tmp_path / "data" / "train" / "bee" / "more")
    names = [os.fsdecode(name) for name in train.open_dataset(data, "train", 8).names]
    assert names == ["ant/000.png", "ant/001.png", "bee/000.png", "bee/001.png", "bee/more/000.png", "bee/more/001.png",
                     "bee/to/fro/000.png"]


def test_fewer_images_than_processes(folder, small_run, monkeypatch, tmp_path):
    """What N processes cannot share as one would use it is refused."""
    monkeypatch.setattr(kmeans, "rank_and_world", lambda: (0, 3))
    with pytest.raises(ValueError, match="2 images to fit on .*--fit-images.* fewer than the processes"):
        kmeans.fit_tokenizer(Toy(15), k=5, patch_size=8, images=2)
    monkeypatch.setattr(probe, "rank_and_world", lambda: (0, 3))
    args, recipe = argparse.Namespace(torch_device="cpu", run=str(tmp_path)), argparse.Namespace(batch_size=48)
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 40, .*--batch-size 39"):
        probe.fit(None, None, range(40), recipe, args, "a.pt")
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 2, .*fewer processes"):
        probe.fit(None, None, range(2), recipe, args, "a.pt")


def test_files_of_another_run_are_refused(folder, tmp_path, capsys):
    out = tmp_path / "run"
    run_small(folder, str(out), "--no-probe", "--epochs", 1)
    before = {name: open(out / name, "rb").read() for name in os.listdir(out)}
    no = lambda argv, *words: refused(train.main, ["--data", folder, *SMALL_RUN, "--epochs", 1, *argv], capsys, *words)
    no(["--out", tmp_path / "b", "--patch-size", 12, "--tokenizer", out / "tokenizer.pt"], "tokenizer.pt", "8", "12")
    no(["--out", tmp_path / "b", "--vocab-size", 7, "--tokenizer", out / "tokenizer.pt"], "tokenizer.pt", "6", "7")
    np.save(tmp_path / "short.npy", np.zeros((39, 9), np.uint16))
    np.save(tmp_path / "grid.npy", np.zeros((40, 16), np.uint16))
    np.save(tmp_path / "beyond.npy", np.full((40, 9), 6, np.uint16))
    no(["--out", tmp_path / "b", "--tokens", tmp_path / "short.npy"], "short.npy", "39", "40")
    no(["--out", tmp_path / "b", "--tokens", tmp_path / "grid.npy"], "grid.npy", "16", "9")
    no(["--out", tmp_path / "b", "--tokens", tmp_path / "beyond.npy"], "beyond.npy", "6")
    no(["--out", tmp_path / "b", "--features", "hog", "--tokenizer", out / "tokenizer.pt"], "tokenizer.pt", "pixel", "hog")
    no(["--out", out, "--lr", 5e-3], "last.pt", "--lr 0.001 there, 0.005 here", "--fresh")
    no(["--out", out, "--fresh", "--features", "nonsense"], "nonsense")    # found out before anything is removed
    assert before == {name: open(out / name, "rb").read() for name in os.listdir(out)}
    for damage, words in ((before["last.pt"][:1000], "not a readable checkpoint"), (before["encoder.pt"], "not a checkpoint")):
        open(out / "last.pt", "wb").write(damage)
        no(["--out", out], "last.pt", words)
        assert open(out / "last.pt", "rb").read() == damage
    run_small(folder, str(out), "--no-probe", "--epochs", 1, "--fresh")
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 5


# --- probe.py -----------------------------------------------------------------------------------------------------

def blobs(n, spread, seed=0):
    """Three clouds in 8 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    centers = 4 * torch.eye(3, 8)
    y = torch.randint(3, (n,), generator=generator)
    return centers[y] + spread * torch.randn(n, 8, generator=generator), y


def shuffled(y, seed=0):
    return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]


@pytest.fixture(scope="session")
def small_run(folder, tmp_path_factory):
    """A run of train.py on the ants and bees, without its closing table."""
    out = str(tmp_path_factory.mktemp("probe") / "run")
    run_small(folder, out, "--epochs", 1, "--no-probe")
    return out


def probed(*argv):
    return probe.main([str(a) for a in (*argv, "--device", "cpu")])


def lines_of(run):
    return [json.loads(line) for line in open(os.path.join(run, "probe.jsonl"))]


def test_linear_probe():
    x, y = blobs(600, .1)
    more, wanted = blobs(200, .1, seed=1)
    assert probe.linear(x, y, more, wanted) == 1
    assert probe.linear(blobs(600, 1.)[0], shuffled(y), *blobs(600, 1., seed=1)) < .5
    assert probe.linear(x, y, more, wanted) == probe.linear(x, y, more, wanted)


def test_knn_equals_brute_force():
    (x, y), (asked, wanted) = blobs(150, 3.), blobs(70, 3., seed=1)
    by_hand = {}
    for k in (1, 7, 20):
        correct = 0
        for point, label in zip(asked, wanted):
            similarity = torch.stack([point @ other / point.norm() / other.norm() for other in x])
            votes = torch.zeros(3)
            for j in similarity.argsort(descending=True)[:k]:
                votes[y[j]] += math.exp(similarity[j] / .07)
            correct += (votes.argmax() == label).item()
        by_hand[k] = correct / 70
    assert len(set(by_hand.values())) > 1
    for k, chunk in ((1, 1), (7, None), (20, 32)):
        assert probe.knn(x, y, asked, wanted, k, chunk=chunk) == pytest.approx(by_hand[k])
    assert probe.knn(x[:5], y[:5], asked, wanted) > .3                     # k larger than the bank


def test_features_of_every_block(folder):
    ds, vit = train.open_dataset(folder, "train", 24), tiny(drop_path=.5).train()
    features = probe.extract_layers(vit, ds, torch.device("cpu"), batch_size=7, layers=slice(-1, None)).flatten(1)
    images = train.normalize(torch.stack([ds[i][0] for i in (0, 39)]), ds)
    outputs = []
    for block in vit.eval().blocks:
        block.register_forward_hook(lambda _, __, x: outputs.append(x))
    with torch.no_grad():
        tokens = vit(images)
        of_layers = probe.pool_features(vit, images)
    torch.testing.assert_close(features[[0, 39]], torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))
    torch.testing.assert_close(of_layers[:, 0], torch.stack([outputs[0][:, 0], outputs[0][:, 1:].mean(1)], 1))
    torch.testing.assert_close(of_layers[:, 1].flatten(1), features[[0, 39]])
    torch.testing.assert_close(probe.pool_features(vit, images, final_norm=False)[:, 1, 0], outputs[1][:, 0])
    torch.testing.assert_close(probe.extract_layers(vit, ds, torch.device("cpu"))[[0, 39]], of_layers)
    assert probe.pool_features(tiny(cls_token=False), images).shape == (2, 2, 1, 32)


class Normed(V.ViT):
    """A ViT with a buffer that moves in training mode."""

    def __init__(self, **how):
        super().__init__(**how)
        self.batch_norm = nn.BatchNorm1d(self.width)

    def embed(self, images, order=None):
        return self.batch_norm(super().embed(images, order).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("command", [["knn"], ["linear"], ["linear", "--protocol", "mae", "--batch-size", "16", "--epochs", "2"],
                                     ["linear", "--protocol", "beit", "--batch-size", "16", "--epochs", "2"], ["show"]])
def test_no_probe_changes_a_frozen_encoder(command, folder, tmp_path, monkeypatch):
    """Neither its weights nor its buffers (a BatchNorm's running mean), even if it comes in training mode."""
    vit = Normed(**TINY, drop_path=.5).train()
    before = state_of(vit)
    monkeypatch.setattr(probe, "from_weights", lambda *_: vit)
    argv = [command[0], "any.pt", *command[1:], "--data", folder, "--out", tmp_path]
    assert probed(*argv, *([] if command == ["show"] else ["--no-floor"]))
    assert state_of(vit) == before
    vit.train()(torch.randn(2, 3, 24, 24))
    assert state_of(vit) != before                                         # so it would have shown


def test_views_are_crops_that_depend_on_the_seed(folder):
    ds = train.open_dataset(folder, "train", 24)
    crop = torchvision.transforms.v2.RandomResizedCrop(24, scale=(.3, .5), antialias=True)
    crop = torchvision.transforms.v2.Compose([crop, torchvision.transforms.v2.PILToTensor()])
    a, b, c = (train.Augmented(ds, crop, seed)[0, 3][0] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (3, 24, 24) and a.dtype == torch.uint8
    epochs = [train.Augmented(ds, crop, 0)[epoch, 3][0] for epoch in (0, 0, 1)]
    assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2])
    assert ds[3][0].shape == (3, 24, 24)                                   # the data set itself is as before


def test_pictures_of_the_papers(folder):
    """Test pictures are the center 224 of 256, MaPeT's after fine-tuning of 248, from the whole picture."""
    ds = train.open_dataset(folder, "test", 56)                            # files are 40 x 48
    recipe = probe.apply_flags(probe.RECIPES["mapet"], probe.parse(["finetune", "x"]))
    mae = probe.apply_flags(probe.RECIPES["mae"], probe.parse(["finetune", "x"]))
    for how, (height, width) in ((None, (64, 76)), (mae, (64, 76)), (recipe, (62, 74))):   # 56 * 256 / 224 = 64
        view = train.with_transform(ds, probe.make_transform(ds, "test", how))[0][0]
        with Image.open(ds.path(0)) as image:
            resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        y, x = (height - 56) // 2, (width - 56) // 2
        wanted = resized[y:y + 56, x:x + 56].transpose(2, 0, 1).astype(float)
        assert np.abs(view.numpy() - wanted).mean() < .5 and np.abs(view.numpy() - wanted).max() <= 3  # PIL's filter
    strong = train.Augmented(ds, probe.make_transform(ds, "finetune", recipe), 0)
    images = torch.stack([strong[e, 0][0] for e in range(8)])
    assert images.dtype == torch.float32 and images.shape == (8, 3, 56, 56)
    textures = train.open_dataset("textures", "val")
    moved = train.Augmented(textures, probe.make_transform(textures, "linear"), 0)[0, 0][0]
    around = F.pad(textures[0][0][None].float(), (4, 4, 4, 4), mode="reflect")[0].to(torch.uint8)
    assert any(torch.equal(moved, around[:, y:y + 48, x:x + 48]) for y in range(9) for x in range(9))


def test_grid_equals_one_by_one():
    """Every head of the grid = the same head alone: its own linear layer, its own AdamW."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(70, 3, 2, 5, generator=generator), torch.randint(4, (70,), generator=generator)
    mean, std = torch.randn(3, 2, 5, generator=generator), 1 + torch.rand(3, 2, 5, generator=generator)
    grid, pools, rows = [(.01, .1), (.03, 1.)], [[1, 0], [0, 1], [1, 1]], torch.arange(3, 67)
    heads = probe.HeadGrid(grid, 3, pools, 5, 4).fit(x, y, rows, (mean, std), epochs=4, batch_size=16, seed=3)
    logits = heads.logits((x - mean) / std)                                # (b, l, grid * pooling, c)
    assert logits.shape == (70, 3, 6, 4)
    for layer, (i, (lr, decay)), (j, pool) in itertools.product(range(3), enumerate(grid), enumerate(pools)):
        alone = ((x - mean) / std)[:, layer][:, torch.tensor(pool).bool()].flatten(1)
        head = nn.Linear(alone.shape[1], 4)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        optimizer = torch.optim.AdamW(head.parameters(), lr, weight_decay=decay)
        shuffle = torch.Generator().manual_seed(3)
        for epoch in range(4):
            order = rows[torch.randperm(64, generator=shuffle)]
            for k in range(4):
                batch = order[16 * k:16 * k + 16]
                step = 4 * epoch + k
                optimizer.param_groups[0]["lr"] = lr * .5 * (1 + math.cos(math.pi * step / 16))
                optimizer.zero_grad()
                F.cross_entropy(head(alone[batch]), y[batch]).backward()
                optimizer.step()
        torch.testing.assert_close(logits[:, layer, 3 * i + j], head(alone), atol=1e-5, rtol=0)


def layered(n, seed=0):
    """Features (n, 3 layers, 2, 8) of which only the patch mean of layer 2 knows the label."""
    x, y = blobs(n, .5, seed)
    noise = torch.randn(n, 3, 2, 8, generator=torch.Generator().manual_seed(9 + seed))
    noise[:, 1, 1] = x
    return noise, y


def test_fast_probe_chooses_without_the_test_split():
    (x, y), (asked, wanted) = layered(400), layered(200, 1)
    how = dict(rates=(1e-4, 1e-2), decays=(0., .1), epochs=20, batch_size=64)
    found = probe.choose_head(x, y, asked, wanted, **how)
    assert found["linear"] == 1 and found["held_out"] == 1 and found["heads"] == 36
    assert found["chosen"]["layer"] == 2 and found["chosen"]["pooling"] in ("patch mean", "both")
    assert max(found["held_out_by_layer"]) == max(found["held_out_by_pooling"].values()) == found["held_out"]
    assert found["held_out_by_layer"][found["chosen"]["layer"] - 1] == found["held_out"]
    assert found["held_out_by_pooling"][found["chosen"]["pooling"]] == found["held_out"]
    other = probe.choose_head(x, y, asked, shuffled(wanted), **how)
    assert other["linear"] < .5 and {**other, "linear": 0} == {**found, "linear": 0}
    chance = probe.choose_head(x, shuffled(y), asked, wanted, **how)
    assert abs(chance["linear"] - 1 / 3) < .15


def test_no_held_out_image_is_trained_on():
    """128 numbers tell 100 images apart: a head that had seen an image would know its random label."""
    x = torch.randn(100, 1, 2, 64, generator=torch.Generator().manual_seed(0))
    y = torch.randint(3, (100,), generator=torch.Generator().manual_seed(1))
    found = probe.choose_head(x, y, x, y, rates=(.01,), decays=(0.,), batch_size=20)
    assert found["held_out"] < .8 and found["linear"] == 1                 # in the end it is trained on all of them


def test_lars_by_hand():
    """Two steps of one matrix and one bias, computed with plain numbers."""
    w, b = torch.tensor([[3., 4.]], requires_grad=True), torch.tensor([1.], requires_grad=True)
    optimizer = probe.LARS([w, b], lr=.5, weight_decay=.1)
    w.grad, b.grad = torch.tensor([[.3, -.4]]), torch.tensor([2.])
    optimizer.step()
    # g = grad + .1 w = (.6, 0), |w| = 5, |g| = .6: q = .001 * 5 / .6; v = q g = (.005, 0); w -= .5 v
    assert torch.allclose(w, torch.tensor([[3 - .0025, 4.]]), atol=1e-7) and b.item() == 0
    w.grad, b.grad = torch.tensor([[0., 1.]]), torch.tensor([2.])
    before = w.detach().clone()
    optimizer.step()
    g = torch.tensor([[0., 1.]]) + .1 * before
    v = .9 * torch.tensor([[.005, 0.]]) + .001 * before.norm() / g.norm() * g
    torch.testing.assert_close(w.detach(), before - .5 * v)
    assert b.item() == pytest.approx(0 - .5 * (.9 * 2 + 2))                # 1-D: plain momentum, no decay
    zero = torch.zeros(2, 2, requires_grad=True)
    zero.grad = torch.ones(2, 2)
    probe.LARS([zero], lr=.5).step()
    assert torch.equal(zero, torch.full((2, 2), -.5))                      # a zero matrix has no norm to go by


def test_layer_decay_by_hand():
    model = probe.Classifier(tiny(layer_scale=.1), 4)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["scale"], group["weight_decay"])
             for group in probe.layer_groups(model, .05, .65) for p in group["params"]}
    assert found.keys() == set(names.values())
    for name, (scale, decay) in found.items():                             # depth 2: L + 1 = 3
        wanted = {"encoder.cls_token": .274625, "encoder.pos_embed": .274625, "encoder.patch_embed": .274625,
                  "encoder.blocks.0": .4225, "encoder.blocks.1": .65, "fc_norm": 1., "head": 1.}
        key = next(key for key in wanted if name.startswith(key))
        assert scale == pytest.approx(wanted[key]), name
        matrix = name.endswith("weight") and "norm" not in name
        assert decay == (.05 if matrix else 0), name


def test_recipes_of_the_papers_for_probes():
    """MaPeT Table 8 and Sec. D, by BEiT; MAE App. A.1, which ClusterMIM follows."""
    mae, beit = probe.PROTOCOLS["mae"], probe.PROTOCOLS["beit"]
    assert [mae[key] for key in ("optimizer", "base_lr", "batch_size", "epochs", "warmup_epochs", "weight_decay")] == \
        ["lars", .1, 16384, 90, 10, 0]
    assert (beit["optimizer"], beit["lr"], beit["batch_size"], beit["epochs"], beit["weight_decay"]) == \
        ("adamw", 4e-3, 1024, 50, 1e-4)
    row = lambda paper, width: {**probe.RECIPES[paper], **probe.BY_WIDTH.get((paper, width), {})}
    for width, lr, epochs, decay in ((192, 2.5e-4, 300, 1), (384, 5e-3, 200, .65), (768, 5e-4, 100, .65)):
        recipe = row("mapet", width)
        assert (recipe["lr"], recipe["epochs"], recipe["layer_decay"]) == (lr, epochs, decay)
        assert [recipe[key] for key in ("warmup_epochs", "warmup_lr", "min_lr", "batch_size")] == [20, 1e-6, 1e-6, 1024]
    base, large = row("mae", 768), row("mae", 1024)
    assert [base[key] for key in ("base_lr", "epochs", "layer_decay", "drop_path", "warmup_epochs")] == [5e-4, 100, .65, .1, 5]
    assert (large["base_lr"], large["epochs"], large["layer_decay"], large["drop_path"]) == (1e-3, 50, .75, .2)
    for recipe in (base, large, recipe):
        assert (recipe["mixup"], recipe["cutmix"], recipe["smoothing"], recipe["erase"], recipe["randaugment"],
                recipe["weight_decay"]) == (.8, 1, .1, .25, 9, .05)


def test_mixup_and_cutmix():
    x, y = torch.arange(4.)[:, None, None, None].expand(4, 3, 8, 8), torch.tensor([0, 1, 2, 2])
    recipe = probe.argparse.Namespace(mixup=.8, cutmix=1.)
    kinds = set()
    for seed in range(12):
        mixed, shares = probe.mix_images(x, y, 3, recipe, seed)
        again, _ = probe.mix_images(x, y, 3, recipe, seed)
        assert torch.equal(mixed, again) and torch.allclose(shares.sum(1), torch.ones(4))
        # Each image's mean value is the same mixture of the two images as its label is of the two classes.
        kinds.add(len(mixed[1].unique()))
        share = shares[1, 1]
        assert mixed[1].mean().item() == pytest.approx((1 * share + 0 * (1 - share)).item(), abs=1e-5)
    assert kinds >= {1, 2}                                                 # both kinds came
    same, labels = probe.mix_images(x, y, 3, probe.argparse.Namespace(mixup=0., cutmix=0.), 0)
    assert same is x and labels is y


def test_probe_commands(folder, small_run, tmp_path, capsys):
    summary = run_small(folder, str(tmp_path / "run"), "--epochs", 1)[-1]
    run = str(tmp_path / "run")
    before = open(os.path.join(run, "encoder.pt"), "rb").read()
    for where in (run, os.path.join(run, "encoder.pt")):
        result = probed("knn", where)                                      # --data: the run's own
        assert result["knn"] == summary["knn"] and result["floor"]["knn"] == summary["knn_random"]
        assert "floor" in capsys.readouterr().out
    assert probed("knn", run, "--random-init")["knn"] == summary["knn_random"]
    fast = probed("linear", run)
    printed = capsys.readouterr().out
    assert fast["linear"] > .9 and "'layer'" in printed
    assert {"layer", "pooling", "lr", "weight_decay"} == fast["chosen"].keys()
    assert fast["chosen"]["lr"] in probe.RATES and fast["floor"]["linear"] <= 1
    on_disk = probed("linear", run, "--memory", 1e-9, "--lr", .01, "--weight-decay", 0, "--no-floor")
    assert on_disk["linear"] > .9 and on_disk["heads"] == 4 * 3 and on_disk["floor"] is None
    lines = lines_of(run)
    assert [line["what"] for line in lines] == ["knn"] * 3 + ["linear"] * 2
    assert lines[-1] == json.loads(json.dumps(on_disk))
    assert not os.path.exists(os.path.join(run, "features.npy"))
    assert open(os.path.join(run, "encoder.pt"), "rb").read() == before


def test_accuracies_are_printed_in_percent(capsys):
    line = dict(what="linear", linear=31 / 240, held_out=.12916666666666668, by_layer=[1 / 3, 1.],
                floor=dict(linear=1 / 7), source="run", tested_on="images")
    probe.report(argparse.Namespace(what="linear", protocol="beit"), line)
    printed = capsys.readouterr().out
    assert printed.split("\n")[0] == "linear (beit) 12.9 %   (floor 14.3 %)   run, images"
    assert "held_out: 12.9 %" in printed and "by_layer: 33.3 %, 100.0 %" in printed


def test_protocols_of_the_papers(folder, small_run, tmp_path, monkeypatch):
    """What they report, and how often the encoder runs: that is what `fast` saves."""
    seen, pool_features = [], probe.pool_features
    monkeypatch.setattr(probe, "pool_features", lambda vit, x, **how: seen.append(len(x)) or pool_features(vit, x, **how))
    same = ["--data", folder, "--out", tmp_path / "out", "--no-floor", "--batch-size", 10]
    beit = probed("linear", small_run, "--protocol", "beit", "--epochs", 6, *same)
    assert sum(seen) == 6 * 40 + 40 and len(beit["by_layer"]) == 4
    assert beit["best_layer"] == max(beit["by_layer"]) and beit["linear"] == beit["by_layer"][-1] > .9
    seen.clear()
    probed("linear", small_run, *same)
    assert sum(seen) == 40 + 40
    mae = probed("linear", small_run, "--protocol", "mae", "--epochs", 10, "--lr", 40, "--warmup-epochs", 1, *same)
    assert mae["linear"] > .8 and "best_layer" not in mae
    saved = torch.load(tmp_path / "out" / "linear-mae.pt", weights_only=True)["model"]
    assert sorted(saved) == ["heads.0.bias", "heads.0.weight", "norm.num_batches_tracked", "norm.running_mean",
                             "norm.running_var"]


FINETUNE = ["--epochs", 4, "--batch-size", 16, "--lr", 1e-3, "--warmup-epochs", 1]


def test_finetune_starts_from_the_weights_and_resumes(folder, small_run, tmp_path, capsys):
    out = tmp_path / "a"
    probed("finetune", small_run, "--no-floor", "--out", out, "--lr", 1e-9, "--batch-size", 16, "--steps", 1)
    begun = torch.load(out / "finetune.pt", weights_only=True)["model"]
    trained = torch.load(os.path.join(small_run, "encoder.pt"), weights_only=True)
    for name, value in trained.items():
        assert name.startswith("norm.") or torch.allclose(begun[f"encoder.{name}"], value, atol=1e-5)
    assert not any(name.startswith("encoder.norm.") for name in begun) and begun["fc_norm.weight"].shape == (96,)
    # What was fine-tuned can make tokens, as ClusterMIM's DeiT does: its new norm takes the place of the old one.
    tuned = V.from_weights(str(out / "finetune.pt"), 48)
    assert torch.equal(tuned.norm.weight, begun["fc_norm.weight"])
    assert torch.equal(tuned.blocks[0].mlp.fc1.weight, begun["encoder.blocks.0.mlp.fc1.weight"])
    kmeans.main(["fit", "--data", folder, "--image-size", "48", "--patch-size", "8", "--k", "5", "--device", "cpu",
                 "--features", str(out / "finetune.pt"), "--out", str(out)])
    images = torch.rand(2, 3, 48, 48)
    rows = kmeans.load_tokenizer(out / "tokenizer.pt").rows(images)
    torch.testing.assert_close(rows, tuned(images)[:, 1:])

    whole = probed("finetune", small_run, *FINETUNE, "--out", tmp_path / "whole")
    assert whole["finetune"] > .7 and whole["top5"] == 1 and whole["floor"]["finetune"] <= 1
    for steps in (3, 100):
        result = probed("finetune", small_run, *FINETUNE, "--out", tmp_path / "parts", "--steps", steps, "--no-floor")
        assert (result is None) == (steps == 3)
    assert "going on" in capsys.readouterr().out
    a, b = (torch.load(tmp_path / name / "finetune.pt", weights_only=True)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)                   # bit for bit
    assert result["finetune"] == whole["finetune"]
    again = ["finetune", small_run, *FINETUNE, "--out", tmp_path / "parts", "--device", "cpu"]
    refused(probe.main, [*again, "--lr", 2e-3], capsys, "--lr 0.001 there, 0.002 here", "--fresh")
    refused(probe.main, [*again, "--random-init"], capsys, "--weights", "--fresh")            # of other weights
    few = probed("finetune", small_run, *FINETUNE, "--out", tmp_path / "few", "--labelled", 16, "--no-floor")
    assert few["labelled"] == 16


def test_base_learning_rate_and_warmup_of_a_recipe(small_run, tmp_path, monkeypatch, capsys):
    """MAE's base learning rate 5e-4 is per 256 images; 5 of 100 epochs of warm-up, at other lengths the same share."""
    asked, learning_rate = [], train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *how: asked.append(how) or learning_rate(*how))
    probed("finetune", small_run, "--no-floor", "--out", tmp_path, "--recipe", "mae", "--batch-size", 8, "--steps", 1)
    probed("finetune", small_run, "--no-floor", "--out", tmp_path, "--recipe", "mae", "--batch-size", 8, "--steps", 1,
           "--epochs", 20, "--fresh")
    rate = pytest.approx(5e-4 * 8 / 256)
    assert asked == [(0, 500, 25, rate, 0., 1e-6, "warmup"), (0, 100, 5, rate, 0., 1e-6, "warmup")]
    assert "40 images, 500 steps of 8, lr 1.5625e-05" in capsys.readouterr().out


def test_a_stopped_training_says_how_it_goes_on(small_run, tmp_path, monkeypatch, capsys):
    command = ["finetune", small_run, *FINETUNE, "--out", tmp_path, "--no-floor"]             # 8 steps
    assert probed(*command, "--steps", 3) is None
    printed = capsys.readouterr().out
    assert "stopped at step 3 of 8 by --steps" in printed and "same command" not in printed
    monkeypatch.setattr(probe, "catch_signals", lambda: contextlib.nullcontext(lambda: 2))
    assert probed(*command) is None
    assert "finetune.pt: stopped at step 4 of 8 by a signal; the same command goes on" in capsys.readouterr().out
    monkeypatch.undo()
    assert probed(*command)["finetune"] >= 0 and "going on at step 4" in capsys.readouterr().out
    assert "probe.jsonl" in os.listdir(tmp_path) and len(lines_of(tmp_path)) == 1


def test_features_in_a_file(small_run, tmp_path, monkeypatch, capsys):
    """The file is there while heads are trained and gone at the end, whatever the end is; a full disk is one line."""
    command, seen = ["linear", small_run, "--memory", 1e-9, "--out", tmp_path], []

    def fail(x, *_):
        seen.append((x.dtype, x.shape, np.array_equal(np.load(tmp_path / "features.npy"), x)))
        raise ValueError("no head is good enough")
    monkeypatch.setattr(probe, "choose_head", fail)
    refused(probe.main, command, capsys, "no head is good enough")
    assert seen == [(torch.float16, (40, 4, 2, 96), True)] and os.listdir(tmp_path) == []

    def full_disk(path, shape, rows):
        raise OSError(f"{path} cannot be written (No space left on device)")
    monkeypatch.setattr(kmeans, "write_rows", full_disk)
    refused(probe.main, command, capsys, "features.npy", "No space")
    assert os.listdir(tmp_path) == []


def test_probes_of_two_processes_equal_one(folder, small_run, tmp_path):
    """Odd numbers of images, so that a padded or a lost image would show."""
    odd = make_folder(tmp_path / "odd", per_class=9, classes=("ant", "bee", "cat"))           # 27 + 27
    os.remove(os.path.join(odd, "val", "cat", "008.png"))
    base = ["--data", odd, "--no-floor", "--device", "cpu"]
    commands = [["knn", small_run, *base, "--k", 9], ["linear", small_run, *base, "--lr", .01, "--weight-decay", .1],
                ["linear", small_run, *base, "--protocol", "mae", "--batch-size", 16, "--epochs", 3],
                ["finetune", small_run, *base, *FINETUNE]]
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys; sys.path.insert(0, {HERE!r}); import probe, torch.distributed as dist\n"
                      "dist.destroy_process_group = lambda: None    # one group for all the commands\n"
                      f"for argv in {[[str(a) for a in argv] for argv in commands]!r}:\n"
                      f"    probe.main(argv + ['--out', {str(tmp_path / 'two')!r}])\n")
    process = Background(driver, processes=2)
    for argv in commands:
        probe.main([str(a) for a in (*argv, "--out", tmp_path / "one")])
    finished(process)
    one, two = (lines_of(tmp_path / name) for name in ("one", "two"))
    strip = lambda line: {key: value for key, value in line.items() if key not in ("seconds", "held_out")}
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        # One near-tie among the 26 may fall otherwise: sums of other batches and thread counts differ in the last bit.
        near = lambda v: pytest.approx(v, abs=.04) if isinstance(v, float) else v
        near_all = lambda v: {key: near(x) for key, x in v.items()} if isinstance(v, dict) else near(v)
        assert {key: near_all(value) for key, value in strip(a).items()} == strip(b) and "26 images" in a["tested_on"]
    for name in ("linear-mae.pt", "finetune.pt"):
        a, b = (torch.load(tmp_path / where / name, weights_only=True)["model"] for where in ("one", "two"))
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-4)


def test_tokens_alone(folder, small_run, tmp_path, capsys):
    run = str(tmp_path / "run")
    shutil.copytree(small_run, run)
    how = ["--epochs", 30, "--batch-size", 10, "--lr", 1e-2]
    by_mlp = probed("tokens", run, *how)
    assert by_mlp["tokens"] > .9 and by_mlp["floor"]["tokens"] == .5 and by_mlp["vocab_size"] == 6
    assert "40 images" in by_mlp["tested_on"] and lines_of(run)[-1]["tokens"] == by_mlp["tokens"]
    test_tokens = kmeans.load_tokens(os.path.join(run, "tokens-images-test.npy"))
    tokenizer, ds = kmeans.load_tokenizer(os.path.join(run, "tokenizer.pt")), train.open_dataset(folder, "test", 24)
    assert np.array_equal(test_tokens[:4], tokenizer(torch.stack([ds[i][0] for i in range(4)])).numpy())
    stored = [os.path.join(run, name) for name in ("tokens.npy", "tokens-images-test.npy")]
    alone = ["tokens", stored[0], "--data", folder, "--out", tmp_path / "alone", *how]
    assert probed(*alone, "--test-tokens", stored[1])["tokens"] == by_mlp["tokens"]           # the same tokens: the same
    refused(probe.main, alone, capsys, "tokens.npy", "--test-tokens")
    refused(probe.main, ["tokens", run, "--test-tokens", stored[1]], capsys, "tokenizer.pt", "--test-tokens")
    vit = probed("tokens", run, "--head", "vit_micro", "--epochs", 8, "--batch-size", 10, "--lr", 1e-3)
    assert vit["tokens"] > .6 and vit["head"] == "vit_micro"
    np.save(tmp_path / "short.npy", np.zeros((39, 9), np.uint16))
    refused(probe.main, [*alone, "--test-tokens", tmp_path / "short.npy"], capsys, "short.npy", "39", "40")
    refused(probe.main, ["tokens", tmp_path / "no.pt", "--data", folder], capsys, "no.pt", "no such file")


def test_token_mlp_is_a_bag_and_token_vit_is_not():
    tokens = torch.randint(6, (2, 9))
    mlp = probe.TokenMLP(6, 3)
    literal = mlp.head(F.relu(mlp.hidden(mlp.table(tokens))).mean(1))      # MaPeT Table 4, patch by patch
    torch.testing.assert_close(mlp(tokens)[:, 0], literal)
    torch.testing.assert_close(mlp(tokens), mlp(tokens.flip(1)))
    assert mlp(tokens).shape == (2, 1, 3) and mlp.table.weight.shape == (6, 192)
    model = probe.token_vit("vit_micro", 6, 9, 3, 0.).eval()
    assert model(tokens).shape == (2, 1, 3) and not torch.allclose(model(tokens), model(tokens.flip(1)))


def test_show(folder, small_run, tmp_path):
    path = probed("show", small_run, "--images", 3, "--out", tmp_path / "p")["show"]
    with Image.open(path) as picture:
        pixels = np.asarray(picture).astype(int)
    side = 24 * math.ceil(900 / 72)                                        # 3 images, 3 labelled rows
    assert pixels.shape[0] == 3 * (side + 4) + 4 and pixels.shape[1] > 3 * (side + 4) + 4 and pixels.std() > 10
    vit, images = tiny().eval(), torch.randn(2, 3, 24, 24)
    x = vit.blocks[0](vit.embed(images))
    q, k, _ = vit.blocks[1].attn.qkv(vit.blocks[1].norm1(x)).chunk(3, -1)
    heads = []
    for part in (slice(0, 16), slice(16, 32)):
        heads.append((q[:, 0, None, part] * k[..., part]).sum(-1).div(4).softmax(-1))
    torch.testing.assert_close(probe.cls_attention(vit, images), torch.stack(heads).mean(0)[:, 1:])


def test_paired_test_is_students():
    """Two-sided 5 % points of Student's t, from a table: 12.706, 4.303, 2.776, 2.262 at 1, 2, 4, 9 degrees of freedom."""
    for n, critical in ((2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262)):
        d = torch.randn(n, generator=torch.Generator().manual_seed(n)).double().numpy()
        d = (d - d.mean()) / d.std(ddof=1) + critical / n ** .5                     # its t is the critical value
        assert probe.paired_test(50 + d, np.full(n, 50)) == pytest.approx(.05, abs=1e-4)
        assert probe.paired_test(np.zeros(n), d) == pytest.approx(.05, abs=1e-4)    # of either sign
    assert probe.paired_test([1, 2], [1, 2]) == 1 and probe.paired_test([2, 3, 4], [1, 2, 3]) < .001


def test_compare(tmp_path, capsys):
    """Runs that differ in a number at the end are seeds; differences are paired by seed, not by place."""
    for name, seed, linear in (("mim-0", 0, .5), ("mim-1", 1, .7), ("pim-cut11-seed1", 1, .8), ("pim-cut11", 0, .58),
                               ("mae-2", 2, .4), ("new-7", None, None), ("cut-4", 4, .9), ("lr1e-05", 0, .3)):
        (tmp_path / name).mkdir()
        log = "explained" if name == "mae-2" else "accuracy"
        lines = [{"step": i, "epoch": i / 2, "lr": 1., "loss": 3. - i, log: .1 * i, "images_per_second": 9.} for i in (1, 2)]
        lines += [dict(summary=True, step=2, steps=3 if name == "cut-4" else 2, seed=seed, linear=linear, knn=.25)
                  ] * (seed is not None)
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ["mim-0", "mim-1", "pim-cut11-seed1", "pim-cut11", "mae-2", "new-7", "mim-1/", "cut-4", "lr1e-05"]
    probe.main(["compare", *[str(tmp_path / name) for name in names], "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "cut-4: a curve only, it stopped at step 2 of 3" in out and "new-7: a curve only, no accuracies" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[3:] if line[:3] != "min"}
    assert rows["mim"] == "2 25.0 ± 0.0 60.0 ± 14.1".split() and rows["new"] == ["0", "-", "-"]
    assert rows["pim-cut11"] == "2 +0.0 (p 1.000) +9.0 (p 0.070)".split()           # 8 and 10: t = 9
    assert rows["mae"][:3] == ["0", "too", "few"] and rows["cut"] == ["0", "-", "-"] and rows["lr1e-05"][0] == "1"
    assert Image.open(tmp_path / "compare.png").size[0] == 900
    plots = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_plot", lambda x, y, curves, **more: plots.append((y, {a: len(b) for a, b in curves.items()})))
        metrics = lambda *names: [train.read_metrics(tmp_path / name / "metrics.jsonl") for name in names]
        train.plot_metrics({"mim": metrics(*names[:2]), "mae": metrics("mae-2")})
    assert plots == [("loss", {"mae": 1}), ("loss on tokens", {"mim": 2}), ("accuracy", {"mim": 2}), ("explained", {"mae": 1})]
    shutil.copytree(tmp_path / "mim-0", tmp_path / "mim-seed0")
    refused(probe.main, ["compare", tmp_path / "mim-0", tmp_path / "mim-seed0"], capsys, "mim-seed0", "seed 0")
    shutil.copytree(tmp_path / "mim-1", tmp_path / "longer" / "mim-1")     # of the same name elsewhere: another group
    probe.main(["compare", *[str(tmp_path / name) for name in ("mim-0", "longer/mim-1")], "--out", str(tmp_path)])
    assert "longer/mim" in (out := capsys.readouterr().out) and "too few seeds" in out
    refused(probe.main, ["compare", tmp_path / "mim-0", tmp_path / "gone"], capsys, "gone", "metrics.jsonl")


def test_principal_colors_of_an_untrained_encoder_and_of_nothing():
    """Rows that leave a LayerNorm with unit weight sum to zero, so the sum of an axis is rounding: no sign to go by."""
    rows = F.layer_norm(torch.randn(2, 9, 32), (32,))
    colors, = V.principal_colors(rows)
    assert colors.shape == (2, 9, 3) and colors.min() == 0 and colors.max() == 1 and colors.isfinite().all()
    again, = V.principal_colors(rows + 1e-7 * torch.randn(2, 9, 32))
    torch.testing.assert_close(colors, again, atol=1e-3, rtol=0)           # no sign turned
    line = torch.linspace(-1, 1, 18).view(2, 9, 1) * torch.tensor([3., 4., 0., 0.])
    colors, nothing = V.principal_colors(line, torch.zeros(2, 9, 4))
    assert (colors[..., 1:] == .5).all() and (colors[..., 0].flatten().diff() >= 0).all()     # a constant component: gray
    assert torch.equal(V.principal_colors(torch.ones(1, 4, 5))[0], torch.full((1, 4, 3), .5))


def test_files_of_others_through_the_command_line(folder, small_run, tmp_path, capsys):
    """timm, DeiT and MAE, DINO's backbone and its full checkpoint: the same weights give the same result."""
    state = torch.load(os.path.join(small_run, "encoder.pt"), weights_only=True)
    dino = {f"module.backbone.{key}": value for key, value in state.items()}
    other = {key: torch.zeros_like(value) for key, value in dino.items()}
    layouts = {"timm": {**state, "head.weight": torch.zeros(10, 96), "head.bias": torch.zeros(10)},
               "mae": {"model": {**state, "mask_token": torch.zeros(1, 1, 8),
                                 "decoder_blocks.0.norm1.weight": torch.zeros(8)}},
               "dino": {"teacher": {**dino, "module.head.mlp.0.weight": torch.zeros(2, 2)}, "student": other,
                        "epoch": 3, "args": probe.argparse.Namespace(lr=1)}}
    base = ["--data", folder, "--no-floor", "--out", tmp_path / "out"]
    wanted = probed("knn", small_run, *base)["knn"]
    for name, layout in layouts.items():
        torch.save(layout, tmp_path / f"{name}.pth")
        assert probed("knn", tmp_path / f"{name}.pth", *base)["knn"] == wanted
    wrong = {key: value for key, value in state.items() if key != "norm.weight"}
    torch.save(wrong | {"blocks.0.extra": torch.zeros(1)}, tmp_path / "wrong.pth")
    refused(probe.main, ["linear", tmp_path / "wrong.pth", *base], capsys, "wrong.pth", "norm.weight missing",
            "blocks.0.extra unknown")
    floor = probed("knn", tmp_path / "timm.pth", "--data", folder, "--out", tmp_path / "out")["floor"]
    assert 0 <= floor["knn"] <= 1


def test_probes_refuse_in_one_line(folder, small_run, tmp_path, capsys):
    refused(probe.main, ["knn", "--random-init"], capsys, "RUN")
    refused(probe.main, ["knn", tmp_path / "no.pt", "--data", folder], capsys, "no.pt", "no such file")
    refused(probe.main, ["linear", small_run, "--data", os.path.join(folder, "train", "ant")], capsys, "labels")
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    refused(probe.main, ["linear", tmp_path / "a.pt", "--data", folder], capsys, "a.pt", "no ViT weights")
    refused(probe.main, ["linear", small_run, "--lr", "nan"], capsys, "--lr")
    for flag, value in (("--smoothing", 1.5), ("--erase", 2), ("--drop-path", 1), ("--randaugment", 10.5)):
        refused(probe.main, ["finetune", small_run, flag, value], capsys, f"{flag} {value:g}")
    refused(probe.main, ["knn", small_run, "--k", "0"], capsys, "--k")
    refused(probe.main, ["linear", small_run, "--protocol", "beit", "--lr", "1", "2"], capsys, "--lr", "fast")
    torch.save(tiny(cls_token=False).state_dict(), tmp_path / "plain.pt")
    refused(probe.main, ["linear", tmp_path / "plain.pt", "--data", folder, "--protocol", "mae", "--out", tmp_path / "o"],
            capsys, "class token", "beit")
    assert not os.path.exists(os.path.join(small_run, "probe.jsonl"))


# --- on a GPU: these run wherever there is one --------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHAPES = ((1, 3, 2, torch.float32), (130, 17, 33, torch.float32), (1029, 40, 150, torch.float32),
          (1500, 260, 20, torch.uint8), (1310, 257, 9, torch.bfloat16), (650, 5, 17, torch.float16),
          (1400, 5, 260, torch.uint8), (70001, 768, 100, torch.uint8), (3000, 1024, 1000, torch.bfloat16))


@on_gpu
@pytest.mark.parametrize("n, d, k, kind", SHAPES)
def test_gpu_kmeans_is_the_slow_reference(n, d, k, kind):
    x = rows_of(n, d, kind=kind)
    values = x.double() / 255 if kind == torch.uint8 else x.double()
    c = (values[torch.arange(k) % n] + .1 * torch.randn(k, d)).float()
    labels, distances = assign(x.cuda(), c.cuda())
    some = slice(0, 2000)
    check_labels(values[some], c, labels[some].cpu(), distances[some].cpu())
    check_scores(x[some].cuda(), c.cuda())
    sums = torch.zeros(k, d, device="cuda")
    kmeans.add_rows(sums, labels, x.cuda(), 1)
    wanted = torch.zeros(k, d).double().index_add(0, labels.cpu(), x.double())
    torch.testing.assert_close(sums.cpu().double(), wanted, rtol=1e-3 if kind == torch.bfloat16 else 1e-5, atol=1e-2)
    again = torch.zeros_like(sums)
    kmeans.add_rows(again, labels, x.cuda(), 1)
    assert torch.equal(sums, again)                                        # no atomics
    if k <= n // 3:
        a, b = (KMeans(k, init=c, max_iter=3, tol=0).fit(part) for part in (x.cuda(), x))
        assert a.inertia == pytest.approx(b.inertia, rel=1e-3) and a.centroids.is_cuda


@on_gpu
def test_gpu_kmeans_of_flat_patches():
    check_flat_patches("cuda")


@on_gpu
@pytest.mark.parametrize("kind", [torch.float64, torch.int64])
def test_gpu_kmeans_of_other_types(kind):
    x = (1e5 * rows_of(3000, 300, kind=torch.float64)).to(kind)
    a, b = (KMeans(9, init=x[:9], max_iter=3, tol=0).fit(part) for part in (x.cuda(), x))
    assert a.inertia == pytest.approx(b.inertia, rel=1e-3)


@on_gpu
def test_gpu_tokenizers_and_tokens(tmp_path):
    tokenizer, ds = toy_tokenizer(), Toy(40)
    there = kmeans.tokenize(tokenizer, ds, str(tmp_path / "a.npy"), device="cuda")
    here = kmeans.tokenize(tokenizer.cpu(), ds, str(tmp_path / "b.npy"))
    assert (np.asarray(there) == here).mean() > .99                        # a near-tie may fall otherwise
    index = torch.cuda.device_count() - 1                                  # not always the current one
    assert assign(rows_of(50, 300, kind=torch.uint8).cuda(index), rows_of(3, 300).cuda(index))[0].device.index == index


@on_gpu
@pytest.mark.parametrize("rows, keys", [(471, 334), (491, 344), (344, 197)])
def test_gpu_masked_attention_is_the_math(rows, keys):
    """Gradients of the backend that setup() leaves, with MaPeT's masks at 224 pixels, beside those of plain products."""
    kmeans.setup("cuda")
    shape = lambda n: torch.randn(2, 12, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = shape(rows), shape(keys), shape(keys)
    mask = torch.rand(rows, keys, device="cuda") < .6
    mask[:, 0] = True
    grads = []
    for backends in (None, [torch.nn.attention.SDPBackend.MATH]):
        context = torch.nn.attention.sdpa_kernel(backends) if backends else contextlib.nullcontext()
        with context:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            grads.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for a, b in zip(*grads):
        assert (a.float() - b.float()).norm() < .02 * b.float().norm()


@on_gpu
@pytest.mark.parametrize("name, target", FORMS)
def test_gpu_compiled_bfloat16_step_is_the_eager_float32_one(name, target):
    model, images, given, order = example(name, target, b=8, cut=4)
    model, images, order = model.cuda(), images.cuda(), order.cuda()
    given = given.cuda() if torch.is_tensor(given) else given
    plain = copy.deepcopy(model)
    model.compile()
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = model(images, given, order)
    wanted, _ = plain(images, given, order)
    assert loss.item() == pytest.approx(wanted.item(), rel=.03)
    loss.backward()
    wanted.backward()
    norm = lambda net: torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm().item()
    assert norm(model) == pytest.approx(norm(plain), rel=.1)


@on_gpu
def test_gpu_runs_stop_resume_probe_and_time(folder, tmp_path, capsys):
    argv = [str(a) for a in ("--data", folder, *SMALL_RUN, "--device", "cuda", "--jitter", .4, "--no-compile")]
    train.main([*argv, "--out", str(tmp_path / "whole")])
    for steps in (["--steps", "7"], []):
        train.main([*argv, "--out", str(tmp_path / "parts"), *steps])
    a, b = ([line for line in train.read_metrics(tmp_path / out / "metrics.jsonl") if "loss" in line] for out in ("whole", "parts"))
    assert [line["step"] for line in a] == [line["step"] for line in b]
    assert a[-1]["loss"] == pytest.approx(b[-1]["loss"], rel=.02)
    for command in (["knn"], ["linear"], ["linear", "--protocol", "beit", "--epochs", "1"], ["finetune", "--epochs", "1"]):
        assert probe.main([command[0], str(tmp_path / "whole"), *command[1:], "--device", "cuda"])[command[0]] >= 0
    train.main([*argv, "--benchmark", "--steps", "5"])
    assert "of a torch.bfloat16 product's" in capsys.readouterr().out


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_gpu_two_processes_equal_one(folder, tmp_path):
    argv = ["train.py", "--data", folder, *SMALL_RUN, "--device", "cuda", "--no-probe", "--no-compile"]
    finished(Background(*argv, "--out", tmp_path / "two", processes=2))
    finished(Background(*argv, "--out", tmp_path / "one"))
    a, b = (train.read_metrics(tmp_path / out / "metrics.jsonl") for out in ("one", "two"))
    for one, two in zip(a, b, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=.02)


# --- README.md ----------------------------------------------------------------------------------------------------

whole = pytest.mark.skipif("not WRONG", reason="a hand-out: README.md is its sheet")


@whole
def test_readme_commands_parse(capsys):
    """Every command in the README and in the sheets of the exercises is one of ours and names flags that exist."""
    text = open(os.path.join(HERE, "README.md")).read().replace("\\\n", " ") + "".join(map(write_sheet, EXERCISES))
    commands = re.findall(r"^(?:.*(?:&& |; do ))?(?:python|torchrun .*?) (\w+)\.py([^&#;\n]*)", text, re.M)
    scripts = dict(vit=V, kmeans=kmeans, tcas=tcas, objectives=objectives, train=train, probe=probe,
                   test_all=sys.modules[__name__])
    assert {name for name, _ in commands} >= {"train", "probe", "kmeans", "tcas"}
    for name, flags in commands:
        words = shlex.split(flags)
        with pytest.raises(SystemExit) as done:
            scripts[name].main([*(word for word in words[:1] if not word.startswith("-")), "--help"])
        known = capsys.readouterr().out
        assert done.value.code == 0, (name, flags)
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", known), (name, flag)


def expand_readme():
    """The laptop commands of the README's code blocks, as a shell expands them: [[script, word, ...], ...].

    The shell that runs them has functions in place of python and torchrun, which print their arguments. Of a loop over
    seeds the first is run, of a loop within it the first and the last. What wants ImageNet or a GPU is left out.
    """
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", open(os.path.join(HERE, "README.md")).read(), re.M | re.S)
    lines = [line for language, block in blocks if not language for line in block.splitlines()
             if re.match("(python|torchrun|for) ", line) and not re.search("/path/to/|--device cuda|test_all.py", line)]
    script = re.sub(r"for s in [\d ]+; do for (\w) in (\S+)[^;]* (\S+);", r"for s in 0; do for \1 in \2 \3;", "\n".join(lines))
    tell = 'python() { printf "%s\\0" "$@"; printf "\\n\\0"; }; torchrun() { shift 2; python "$@"; }\n'
    with tempfile.TemporaryDirectory() as empty:                           # where no * matches anything
        told = subprocess.run(["bash", "-euc", tell + script], cwd=empty, capture_output=True, text=True, check=True)
    return [command.split("\0")[:-1] for command in told.stdout.split("\n\0")[:-1]]


@whole
def test_readme_laptop_commands_run(tmp_path, monkeypatch):
    """As written and in order, but for 2 steps on 250 images: each ends well, and finds what an earlier one wrote."""
    commands = expand_readme()
    assert len(commands) > 50
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.Textures, "streams", {"train": (1, 250), "test": (2, 130), "val": (3, 130)})
    monkeypatch.setattr(train, "Textures", functools.cache(train.Textures))
    evaluate, accuracies, recipe, epochs = probe.evaluate, [], train.recipe, 2 * 32 / 250
    monkeypatch.setattr(train, "recipe", lambda *given: {**recipe(*given), "epochs": epochs})

    def evaluate_once(*given):                                             # a run's table: the rest takes the first's
        accuracies[:] = accuracies or [evaluate(*given)]
        return {name: value + len(os.listdir("runs")) / 1000 for name, value in accuracies[0].items()}
    monkeypatch.setattr(probe, "evaluate", evaluate_once)
    scripts = dict(vit=V, kmeans=kmeans, tcas=tcas, objectives=objectives, train=train, probe=probe)
    for script, *words in commands:
        words = [name for word in words for name in sorted(glob.glob(word)) or [word] * ("*" not in word)]
        if script == "-c":
            exec(words[0], {})
            continue
        if "--epochs" in words:
            words += ["--epochs", str(epochs)]
        if "--benchmark" in words or words[:1] in (["finetune"], ["tokens"]):
            words += ["--steps", "2"]
        if words[:1] == ["bench"]:
            words += ["--n", "2000", "--k", "50"]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                scripts[script.removesuffix(".py")].main(words)
            except SystemExit as stop:
                assert not stop.code, (script, *words, said.getvalue())


@whole
def test_readme_pictures_and_python(capsys):
    """Each picture is there, is shown and is small; each block of Python runs."""
    text, folder = open(os.path.join(HERE, "README.md")).read(), os.path.join(HERE, "figures")
    assert set(re.findall(r"\(figures/(\w+\.png)\)", text)) == set(os.listdir(folder))
    assert sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)) < 1e6
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    for block in blocks:
        exec(block, scope := {})
        assert abs(scope["loss"].item() - math.log(16)) < .5 and "accuracy" in scope["logs"]
    assert blocks


@whole
def test_readme_names_tests_and_code_that_exist():
    """The map from the papers to the code: every function and every test in it is there."""
    rows = re.findall(r"^\|(.*)\|$", open(os.path.join(HERE, "README.md")).read(), re.M)
    names = [name for row in rows for name in re.findall(r"`(\w+(?:\.\w+)?)[(`]", row)]
    modules = dict(vit=V, kmeans=kmeans, tcas=tcas, objectives=objectives, train=train, probe=probe)
    checked = [name for name in names if name.startswith("test_") or name.split(".")[0] in modules and "." in name]
    for name in checked:
        module, _, what = name.rpartition(".")
        if what not in ("py",):
            assert what in globals() if not module else hasattr(modules[module], what), name
    assert len(checked) > 20


def test_nothing_cites_what_a_reader_does_not_have():
    for name in ("vit.py", "kmeans.py", "tcas.py", "objectives.py", "train.py", "probe.py", "test_all.py", "README.md"):
        assert "METH" + "ODS" not in open(os.path.join(HERE, name)).read(), name


@whole
@pytest.mark.parametrize("name", ["vit", "kmeans", "tcas", "objectives", "train", "probe"])
def test_a_file_begins_with_its_concern(name):
    """After the imports at most 250 lines, to a ruled line; the README's reading path says how many."""
    lines = open(os.path.join(HERE, f"{name}.py")).read().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("# --- "))
    rule = next(i for i, line in enumerate(lines) if line.startswith("# ====="))
    assert 100 < rule - first <= 250 and lines[rule + 1].startswith("# Machinery. The method ends here")
    row = re.search(rf"^\| `{name}.py` \| (\d+) \| (\d+) \|", open(os.path.join(HERE, "README.md")).read(), re.M)
    assert abs(int(row[1]) - (rule - first)) <= 10 and abs(int(row[2]) - len(lines)) <= 20, (rule - first, len(lines))


def test_only_the_allowed_packages_are_imported():
    allowed = set(sys.stdlib_module_names) | {"torch", "torchvision", "numpy", "einops", "tqdm", "PIL", "triton",
                                              "vit", "kmeans", "tcas", "objectives", "train", "probe"}
    for name in ("vit", "kmeans", "tcas", "objectives", "train", "probe"):
        text = open(os.path.join(HERE, f"{name}.py")).read()
        found = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M))
        assert found <= allowed, (name, found - allowed)


# --- the course: hand-outs and grading ----------------------------------------------------------------------------

FILES = "vit", "kmeans", "tcas", "objectives", "train", "probe"
Exercise = collections.namedtuple("Exercise", "title minutes points functions tests sheet")
EXERCISES = {
    1: Exercise("K-means: assignment and update", 20, 1, ["kmeans.lloyd"],
                ["test_lloyd_by_hand", "test_seven_lines_are_kmeans"], """
ClusterMIM Sec. 3.2. Each row is assigned to its nearest centroid, then each centroid moves to the mean of its
rows:

    t_i = argmin_k ||x_i - c_k||^2                     assign
    c_k = mean of the x_i with t_i = k                 update

**Predict first.** Two centroids start at the same place. Where are they after one iteration? Can an iteration
make the sum of squared distances larger?

**Steps.**
1. Assign: all distances (n, k), then the nearest of each row. `torch.cdist` is enough here.
2. Update: add the rows of each cluster up, and count them. No loop over rows or clusters: `index_add_`,
   `bincount`.
3. A cluster that no row chose has no mean. It stays where it is.
4. After the last update the labels are old: assign once more.

**Two questions.** In python:

```
import torch, kmeans
torch.manual_seed(0)
x = torch.randn(8, 2)[torch.randint(8, (4000,))] * 4 + torch.randn(4000, 2)
for start in range(5):
    labels, c = kmeans.lloyd(x, x[torch.randperm(4000)[:8]], 100)
    print((x - c[labels]).square().sum().item())
```

1. There are 8 groups and 8 centroids. Why do the five sums differ, and do 1000 iterations instead of 100
   help?
2. Use 16, 32 and 64 centroids. How does the sum fall, and does the least of it say how many groups there are?
"""),
    2: Exercise("K-means: seeds by k-means++", 45, 2, ["kmeans.kmeans_plusplus"],
                ["test_kmeans_plusplus_is_the_slow_loop"], """
Arthur & Vassilvitskii 2007; ClusterMIM starts from it. Seeds should be far apart, but not outliers:

    D_i = distance of row i to the nearest seed so far
    P(the next seed is row i) = D_i^2 / sum_j D_j^2

*Greedy*: draw a few rows like this, and keep the one after which sum_j D_j^2 is least.

**Predict first.** Six tight groups of equal size, far from each other, and six seeds. How often does each
group get one if the seeds are six random rows? (6! / 6^6.) And with k-means++?

**Steps.**
1. Squared distances of a few rows to all: ||a||^2 + ||b||^2 - 2 a.b, never below 0.
2. Draw with the numbers `u` that are given: running sums of D^2, and the first one that is greater than u
   times the total.
3. For each row drawn: the sum of the new D^2, were it the seed. Keep the least.
4. The distance of a seed to itself is 0, but rounding may leave a little. Could it be drawn again?

**Two questions.** In python:

```
import torch, kmeans
centers = torch.arange(6.)[:, None] * 100
x = (centers + torch.randn(6, 50)).reshape(300, 1)
def found(seeds): return len(set((x[seeds, 0] / 100).round().tolist())) == 6
print(sum(found(torch.randperm(300)[:6]) for _ in range(1000)))
for trials in (1, 2, 4):
    print(trials, sum(found(kmeans.kmeans_plusplus(x, torch.rand(6, trials))) for _ in range(1000)))
```

1. Bring the groups nearer: centers 5 apart (both 100s become 5). Which loses more, random rows or k-means++?
   And what do more trials do?
2. Put one row at 10,000. How often is it a seed with 1 trial, and how often with 4? Is that good?
"""),
    3: Exercise("Patches and positions", 40, 2, ["vit.patchify", "vit.unpatchify", "vit.sincos_positions"],
                ["test_patchify", "test_unpatchify", "test_sincos_positions",
                 "test_sincos_positions_value_by_value"], """
Dosovitskiy et al. 2021, Eq. 1; MAE's released code. An image is cut into squares of p x p pixels, read line
by line; a patch is its p p 3 values. Attention does not know where a patch was, so a position is added to it.
Its first half encodes the column i, its second half the row i, each by

    sin(i w_j), then cos(i w_j),   w_j = 10000^(-j / J),   j = 0 .. J - 1,   J = width / 4

**Predict first.** Of two patches, take the dot product of their positions. Does it depend on where they are,
or only on how far they are from each other, in columns and in rows?

**Steps.**
1. `patchify` and `unpatchify` are one line each with `einops.rearrange`. In which order come row, column and
   channel inside a patch? `PatchEmbed.forward`, which you have, cuts patches, too, but in another order: that
   of a convolution's weights.
2. `sincos_positions`: first one axis, (grid, width / 2); then columns and rows of it for all patches.
3. In front, `prefix` rows of zeros (the class token). A width that is no multiple of 4 is a ValueError.

**Two questions.** In python:

```
import torch, vit
pos = vit.sincos_positions(14, 64, prefix=0)[0]
print((pos @ pos.T)[7 * 14 + 7].view(14, 14).round().int())
torch.manual_seed(0)
model, images = vit.vit_micro().eval(), torch.randn(1, 3, 48, 48)
order = torch.randperm(36)[None]
here, there = model.encode(model.embed(images)), model.encode(model.embed(images, order))
print((here[:, 1:][:, order[0]] - there[:, 1:]).abs().max(), (here[:, 0] - there[:, 0]).abs().max())
```

1. Which neighbors does the first print call alike, and what changes with `10000` made 10 or 1e8?
2. The second print: the patches, each with its position, come in another order. Why are both numbers nearly
   0? Find the pixels of two patches in `images` and swap them: what now?
"""),
    4: Exercise("Attention with rows that only ask", 45, 3, ["vit.Attention.forward"],
                ["test_attention_mask_and_query_only_rows", "test_encode_of_the_last_rows_only"], """
Vaswani et al. 2017, Eq. 1; MaPeT Eq. 3. Each row asks (q), and is looked at (k, v):

    head(x)_i = sum_j softmax_j(q_i . k_j / sqrt(width of a head)) v_j         j: keys that row i may attend to

Two things are added to a plain ViT. `mask` says which keys a row may attend to. And rows from `n_keys` on are
not looked at by any row: they only ask. MaPeT's second stream is made of such rows.

**Predict first.** Remove a row that only asks. Do the outputs of the others change? And if you remove a key?

**Steps.**
1. q, k and v with no mask: split the weights and the bias of `qkv` in three, then each into heads.
2. `F.scaled_dot_product_attention` or a softmax of your own; heads back together, then `proj`, its outputs
   times `gamma` where that is given (`fold_scale` makes one product of both).
3. `n_keys`: keys and values of the first rows only.
4. `n_out`: queries of the last rows only, and their lines of the mask. The work for other queries is not to
   be done.

**Two questions.** In python:

```
import timeit, torch, vit
attention = vit.Attention(192, 3)
for rows in (250, 500, 1000, 2000):
    x = torch.randn(8, rows, 192)
    for n_keys in (rows, 125):
        with torch.no_grad(): print(rows, n_keys, min(timeit.repeat(lambda: attention(x, n_keys=n_keys), number=1)))
```

1. How does the time grow with the rows if all are keys, and if 125 are? From how many rows on do scores and
   softmax take most of it?
2. A row may attend to nothing: its line of the mask is all False. What comes out, and what is its gradient?
   Compare `softmax` of your own with torch's. How do the masks of MaPeT and PIM make sure that it never
   happens?
"""),
    5: Exercise("The mask of two streams", 60, 3, ["objectives.two_stream_mask"],
                ["test_two_stream_mask_is_eq_3"], """
MaPeT Eq. 3 and Fig. 2. Patches were put into the order z before, visible ones first. So who may look at whom
depends on the place in the order only, and one mask serves all images:

    content of target i    sees the visible patches, the content of targets <= i, the positions of targets > i
    query of target i      sees the visible patches, the content of targets < i, the positions of targets >= i
    all others             see what MIM shows: the visible patches, and the positions of all targets

**Predict first.** On paper: 2 visible rows (the class token, a patch), 3 targets; MaPeT has 11 rows and 8
keys. Fill in all of it. Which lines are equal, and why? How many keys does each row see, and why is it the
same number?

**Steps.**
1. PIM: no mask tokens, so there are 8 rows and 5 keys. Lower triangles: `tril`, with or without the diagonal.
2. MaPeT: a target that is not seen as content is seen as position. Never both, never neither.
3. `python objectives.py mapet --patches 6 --cut 3` prints and draws what you made.

**Two questions.** Each run takes about two minutes on two CPU cores:

```
python train.py --objective mapet --steps 600 --no-probe --out runs/a
python train.py --objective pim --steps 600 --no-probe --out runs/b
```

1. Let the query of target i see the content of target i, too. What becomes of the loss (another `--out`), and
   which tests fail (`pytest test_all.py -k "exercise_05 or leaks"`)? Would you have noticed without them?
2. Mend it. PIM does not know where its targets are, but for the one it is asked for. Whose loss is lower, and
   since which step?
"""),
    6: Exercise("MIM, PIM and MaPeT from one forward", 60, 3, ["objectives.MaPeT.predict"],
                ["test_permuted_rows_equal_raster_order_with_masks", "test_mim_equals_masking_in_raster_order",
                 "test_no_target_leaks_through_12_layers", "test_first_query_equals_its_mask_token_in_every_layer",
                 "test_stochastic_depth_reaches_mapet"], """
MaPeT Eqs. 1 and 2, with z an order of the patches, c the cutting point, m_j = mask token + position j:

    PIM     sum_{i >= c} log p(t_{z_i} | x_{z_<i})
    MaPeT   sum_{i >= c} log p(t_{z_i} | x_{z_<i}, m_{z_>=i})

Take the content of predicted targets away from MaPeT, and it is MIM. Two switches, `permute` and `positions`,
make all three out of one sequence of rows; the docstring of the class has it.

**Predict first.** With 36 patches and c = 19, how many rows and how many keys has each of the three? What
does that say about their time?

**Steps.**
1. `self.split` gives visible and hidden patches, in the order z. `vit.embed(images, patches)`: class token
   and these patches.
2. Mask tokens: `self.mask_token` with the positions of the hidden patches. A query begins as the same.
3. `vit.encode` takes the rows, `self.mask`, the number of keys, how many of the last rows are wanted, and
   `noise`.
4. What is predicted at row i is the token of hidden patch i: `gather_patches`.

**Two questions.**

```
for o in mim pim mapet; do python train.py --objective $o --mask-ratio .5 --benchmark --steps 60; done
for cut in 2 19 34; do python train.py --objective mapet --cut $cut --steps 400 --no-probe --out runs/cut-$cut; done
```

1. Are the images per second of the three as you predicted? What else takes time?
2. Three cutting points: is a low loss a good sign here? Say what one target knows with each of them.
"""),
    7: Exercise("The masked autoencoder and its token head", 60, 4,
                ["objectives.MaskedAutoencoder.predict", "objectives.Objective.loss"],
                ["test_masked_autoencoders_equal_raster_order", "test_encoder_runs_on_visible_patches_only",
                 "test_no_hidden_pixel_reaches_encoder_or_gradient", "test_label_smoothing",
                 "test_every_target_counts_once_and_untrained_loss_is_ln_k",
                 "test_stochastic_depth_reaches_masked_autoencoders"], """
ClusterMIM Sec. 3.2: MAE, but what is predicted at a hidden patch is its token t(x), and not its pixels:

    latent = encoder([cls ; visible patches + pos])
    logits = decoder([W latent ; mask tokens] + pos)           at the mask tokens
    loss   = - mean over hidden patches of log softmax(logits)[t(x)]

**Predict first.** What is the loss of an untrained network with 64 tokens? And of one that has learned
nothing but how frequent each token is?

**Steps.**
1. Encode what is visible, and make it narrow: W is `self.narrow`.
2. A mask token for each hidden patch; then the positions of the decoder, `self.pos`, in the order of the
   patches: those of the visible ones, then of the hidden ones.
3. Decode, and return predictions of the hidden patches with what they should be (`self.compute_target`), in
   the same order.
4. `Objective.loss`: cross-entropy, with `self.smoothing`, and accuracy. Should the accuracy have a gradient?

**Two questions.** Each run takes about a minute on two CPU cores:

```
for k in 8 64 512; do python train.py --objective clustermim --vocab-size $k --steps 600 --no-probe --out runs/k$k; done
for r in .4 .75 .95; do python train.py --objective clustermim --mask-ratio $r --steps 600 --no-probe --out runs/r$r; done
```

1. Can losses of different K be compared? Say what you compare instead, and where more tokens stop to help.
2. What do images per second and loss do as more is hidden? Leave `--no-probe` out for one of them: which is
   the better encoder?
"""),
    8: Exercise("TCAS, a score of tokenizers", 45, 3, ["tcas.tcas_terms"],
                ["test_tcas_is_eq_8", "test_tcas_by_hand", "test_tcas_values_that_are_known",
                 "test_tcas_ignores_the_names_of_tokens_and_classes", "test_tcas_never_builds_the_matrix_c"], """
ClusterMIM Eq. 8, before any training. R[k, c] is how many patches of class c have token k; R' has rows of
norm 1:

    C = R' R'^T
    TCAS = 1/K sum_i (1 - C_ii)^2 + 1/K^2 sum_{i != j} C_ij^2

**Predict first.** What is TCAS of labels as tokens? Of random tokens, K = 64? Of a tokenizer that gives every
patch the same token?

**Steps.**
1. R' in float64, by the norm that is asked for; codes that no patch has are dropped. K is the number of those
   that are left.
2. Both terms, with the matrix C.
3. `weighted`: w_i for 1/K and w_i w_j for 1/K^2, where w is a code's share of the patches.
4. Now without C, which has 268 million entries for K = 16384: C has the same sum of squares as R'^T R', which
   is (c, c).

**Two questions.** In python, and on the command line (half a minute each):

```
import numpy as np, torch, tcas
for p in (.1, .3, 1, 3, 10): print(p, tcas.tcas(torch.from_numpy(np.random.default_rng(0).poisson(p, (400, 50)))))
```
```
for k in 16 64 256; do python kmeans.py fit --k $k --fraction .05 --out runs/k$k; done
python tcas.py score --tokenizer runs/k16/tokenizer.pt runs/k64/tokenizer.pt runs/k256/tokenizer.pt
```

1. The first tokens are random, p is the mean count in a cell of R. Why is TCAS low where p is small, and what
   does that mean for K?
2. Does TCAS fall because a larger codebook is better, or for another reason? Find a number in the table that
   tells.
"""),
    9: Exercise("The augmentation graph, and a claim to refute", 180, 5, ["tcas.augmentation_graph", "tcas.closed_form"],
                ["test_mask_graph_is_the_drawing_of_app_b", "test_algebra_equals_brute_force", "test_ring",
                 "test_any_tokenizer_and_what_merging_tokens_does", "test_claims_in_words"], """
ClusterMIM Eq. 4, Secs. 2.1 and 2.2, App. B. Two views x1, x2 of an image are drawn with probability M(x1,
x2). A tokenizer joins points into tokens S, and views that may lead to the same token are linked:

    M(x, S)  = sum of M(x, x2) over x2 in S            d(S) = sum_x M(x, S)
    A(x, x') = sum_S M(x, S) M(x', S) / d(S)
    normalized A(x, x') / sqrt(d(x) d(x'))             d(x) = sum_x2 M(x, x2)

Sec. 2.2 says that tokens of classes, S^class, raise the weights between points of one class above those of
MAE, where each point is its own token. You will show that they do not.

**Predict first.** Two classes of 10 points that share 2. Does A link points of different classes, with MAE's
tokens? Through what?

**Steps.**
1. `augmentation_graph`: a matrix product and a division. All of A adds up to 1.
2. `closed_form`, an hour with pencil and paper. The points that two classes share are the same number for
   every two: A(x, x') = T_cd / (C n^2) for x of class c only, x' of class d only, with T as in the docstring.
   Find mu for MAE's tokens (kappa = 1 - C overlap / (2 n)), for labels as tokens (half of the shared points get one
   label, half the other), and for cross-class tokens, half of every class in each.
3. From mu: w_in, w_x; sum = the sum of squared eigenvalues; alpha = P(two linked views have different
   labels), where a shared point has each of its labels with probability 1/2. For two classes, also for any
   list of tokens (`assignment`).
4. Refute the claim: mu of which is larger, for any overlap?

**Two questions.**

```
python tcas.py toy --n 10 --overlap 2 --classes 2
python tcas.py toy --graph ring --n 12 --width 1
```

1. Is there any tokenizer at all with larger weights inside a class than MAE's? Draw 1000 at random with
   `tcas.toy_model`.
2. In the ring, views are neighbors only. Which claims about class-wise tokens hold there and not in the first
   graph, and why? Does a wider ring (`--width 3`) decide otherwise?
"""),
    10: Exercise("A run that goes on exactly", 120, 4, ["train.schedule", "train.collect_state", "train.restore_state"],
                 ["test_schedule_is_a_function_of_the_step", "test_schedule_depends_on_its_arguments_only",
                  "test_schedule_shuffles_once_an_epoch", "test_state_of_a_run_is_all_that_its_steps_depend_on"], """
A run of days is stopped, and killed. When the same command is given again it should end with the same
weights, bit for bit. Then step s must not depend on when or where it runs:

    images of step s  = a function of (seed, s)
    weights after s   = a function of (weights, optimizer, random numbers before s, images of s)

**Predict first.** A run is stopped after step 7. It goes on with its weights, but with a new AdamW. Which is
the first step whose loss is another: 8 or 9?

**Steps.**
1. `schedule`: the epoch and the place in it, from s. A generator of its own for each epoch, by `derive_seed`,
   so that it neither sees nor moves the random numbers of others. To start in the middle of an epoch costs
   one permutation, not the steps before.
2. The slice of this process, then equal micro-batches of it.
3. `collect_state` and `restore_state`: model, optimizer, torch's random state.
4. The real thing, which takes seconds: `pytest test_all.py -k stop_resume`.

**Two questions.** Half a minute:

```
python train.py --objective mapet --steps 40 --log-every 1 --no-probe --out runs/whole
python train.py --objective mapet --steps 20 --log-every 1 --no-probe --out runs/parts
python train.py --objective mapet --steps 40 --log-every 1 --no-probe --out runs/parts
diff <(cut -d, -f1-4 runs/whole/metrics.jsonl) <(cut -d, -f1-4 runs/parts/metrics.jsonl)
```

1. Leave the optimizer's state out of `restore_state`, and do it again. Where do the losses part, and do they
   meet again?
2. What takes the room in `runs/whole/last.pt`? Compare it with `encoder.pt`, and say what each part of it is
   for.
"""),
}

# The docstrings that would give the answer away, as a hand-out has them.
HIDDEN = {"objectives.two_stream_mask":
'''Who may look at whom in PIM and MaPeT: (rows, keys) bool, True = may attend (MaPeT Eq. 3 and Fig. 2).

    visible    V, rows that every row may see: the class token and the visible patches, the cutting point c
    targets    T, how many patches are predicted, in the order z
    positions  True: MaPeT, with the T position-only mask tokens; False: PIM, without them

    keys (columns)  [V visible | T targets, their content | T mask tokens, position only], in PIM without the last
    rows            those of the keys, in this order, then T queries, one of each target
    '''}

# Wrong answers that look right: (function, what stands there, what a student might write). No hand-out has them.
WRONG = {
    1: [("kmeans.lloyd", "torch.where(counts > 0, sums / counts, centroids)", "sums / counts.clamp(min=1)"),
        ("kmeans.lloyd", "return torch.cdist(x, centroids).argmin(1), centroids", "return labels, centroids")],
    2: [("kmeans.kmeans_plusplus", "closest.double().cumsum(-1)", "closest.double().sqrt().cumsum(-1)"),
        ("kmeans.kmeans_plusplus", "torch.minimum(closest, squared_distances(trials))", "squared_distances(trials)")],
    3: [("vit.patchify", "(p q c)", "(c p q)"), ("vit.sincos_positions", "[column, row]", "[row, column]")],
    4: [("vit.Attention.forward", "x[:, :n_keys]", "x"), ("vit.Attention.forward", "mask[ask]", "~mask[ask]"),
        ("vit.Attention.forward", "*fold_scale(self.proj, gamma)", "self.proj.weight, self.proj.bias")],
    5: [("objectives.two_stream_mask", "tril(-1)", "tril()"),
        ("objectives.two_stream_mask", "[full(T, V), so_far, ~so_far]", "[full(T, V), so_far, full(T, T)]")],
    6: [("objectives.MaPeT.predict", "vit.positions(hidden)", "0 * vit.positions(hidden)"),
        ("objectives.MaPeT.predict", "noise=noise", "noise=None")],
    7: [("objectives.MaskedAutoencoder.predict", "torch.cat([visible, hidden], 1))",
         "torch.cat([visible, hidden], 1).sort(1).values)"),
        ("objectives.Objective.loss", "label_smoothing", "reduction='sum', label_smoothing")],
    8: [("tcas.tcas_terms", "gram.square().sum() - diagonal", "gram.square().sum()"),
        ("tcas.tcas_terms", "(patches > 0).double() / used", "torch.ones_like(patches) / len(counts)")],
    9: [("tcas.augmentation_graph", "(to_token / to_token.sum(0))", "to_token"),
        ("tcas.closed_form", '"classwise": kappa ** 2', '"classwise": kappa')],
    10: [("train.schedule", "torch.Generator().manual_seed", "torch.manual_seed"),
         ("train.schedule", "if order is None or k == 0:", "if True:"),
         ("train.restore_state", 'optimizer.load_state_dict(state["optimizer"])', "pass")],
}

for number, exercise in EXERCISES.items():                                # so that -k exercise_03 finds them
    for name in exercise.tests:
        setattr(globals()[name], f"exercise_{number:02}", True)


@functools.lru_cache
def find_function(source, name):
    """The syntax tree of `name` in the text of a module: a function, or the method of a class, as "MaPeT.predict"."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def replace_lines(source, first, last, new):
    """Lines first..last of a text, counted from 1 and both included, give way to new ones."""
    lines = source.splitlines()
    return "\n".join([*lines[:first - 1], *new, *lines[last:]]) + "\n"


def remove_bodies(source, module, number):
    """The text of a module without what exercise `number` asks for: signature and docstring stay."""
    for name in EXERCISES[number].functions:
        file, _, function = name.partition(".")
        if file == module:
            node = find_function(source, function)
            text, indent = node.body[0], " " * node.body[0].col_offset     # of the docstring
            source = replace_lines(source, text.end_lineno + 1, node.end_lineno,
                                   [f'{indent}raise NotImplementedError("exercise {number}: {function}")'])
            if name in HIDDEN:
                source = replace_lines(source, text.lineno, text.end_lineno, [f'{indent}"""{HIDDEN[name]}"""'])
    return source


def write_sheet(number):
    exercise = EXERCISES[number]
    functions = ", ".join(f"`{name}`" for name in exercise.functions)
    return (f"# Exercise {number}: {exercise.title}\n\n"
            f"To write: {functions}. About {exercise.minutes} minutes. Points: {exercise.points}. All else is there.\n\n"
            f"{exercise.sheet.strip()}\n\n"
            f"Done when `pytest test_all.py -k exercise_{number:02}` is green;\n"
            f"`python test_all.py grade . --exercise {number}` counts the points.\n")


def hand_out(numbers, out):
    """Write a copy of the repository into the folder `out`, less what is to be done; README.md: the sheets."""
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f"{out} is there, and not an empty folder: --out names a new one")
    os.makedirs(out, exist_ok=True)
    for module in FILES:
        source = open(os.path.join(HERE, f"{module}.py")).read()
        for number in numbers:
            source = remove_bodies(source, module, number)
        write_text(out, f"{module}.py", source)
    source = open(os.path.join(HERE, "test_all.py")).read()
    write_text(out, "test_all.py", re.sub(r"^WRONG = {$.*?^}$", "WRONG = {}", source, flags=re.M | re.S))
    for name in ("requirements.txt", "LICENSE", ".gitignore"):
        shutil.copy(os.path.join(HERE, name), out)
    contents = "# Exercises\n\n" + "".join(f"{n}. {EXERCISES[n].title}\n" for n in numbers) + "\n"
    write_text(out, "README.md", contents * (len(numbers) > 1) + "\n".join(map(write_sheet, numbers)))


def write_text(folder, name, text):
    with open(os.path.join(folder, name), "w") as file:
        file.write(text)


def serve():
    """Runs, as text, in a process of its own: pytest in forks of it, which need not import torch once more.

    stdin: JSON [here, files, out, seconds, at_once, jobs], a job = [folder, arguments of pytest]. test_all.py is
    that of here, and so is a file that the folder lacks. Writes out/0.json for the first job, and so on:
    {"error": why nothing ran, or None; "tests": {name: why it failed, or ""}}.
    """
    import json, os, signal, sys, traceback, types
    import einops, pytest, torchvision, torch.distributed, torch.utils.flop_counter, tqdm          # slow: once for all

    here, files, out, seconds, at_once, jobs = json.load(sys.stdin)
    texts = {name: open(f"{here}/{name}.py").read() for name in [*files, "test_all"]}
    compiled = {text: compile(text, f"{here}/{name}.py", "exec") for name, text in texts.items()}

    class Notes:
        error, tests = None, {}

        def pytest_collectreport(self, report):
            if report.failed:
                self.error = str(report.longrepr).strip().splitlines()[-1]

        def pytest_runtest_makereport(self, item, call):
            if call.excinfo:
                reason = call.excinfo.exconly().splitlines()[0]
                if reason == "AssertionError":                            # which one?
                    at = [entry.lineno for entry in call.excinfo.traceback if entry.path.name == "test_all.py"][-1]
                    reason = texts["test_all"].splitlines()[at].strip()
                self.tests[item.name] = reason
            elif call.when == "call":
                self.tests[item.name] = ""

    def load(folder, name):
        path = f"{folder}/{name}.py" if os.path.exists(f"{folder}/{name}.py") else f"{here}/{name}.py"
        text = open(path).read()
        module = sys.modules[name] = types.ModuleType(name)
        module.__file__ = path
        exec(compiled.get(text) or compile(text, path, "exec"), vars(module))

    def run(folder, argv):
        sys.path[0], notes = folder, Notes()
        try:
            for name in files:
                load(folder, name)
            load(here, "test_all")
        except BaseException as error:
            lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)
                     if frame.filename.startswith(folder)]
            file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else [(name, "?"), *lines][-1]
            what = f"{type(error).__name__} in {os.path.basename(file)} line {line}: {getattr(error, 'msg', error)}"
            notes.error = f"does not import: {what}"
        else:
            options = "-p no:cacheprovider -p no:unraisableexception --noconftest --tb=no".split()
            pytest.main([*options, *argv], plugins=[notes])
        return {"error": notes.error, "tests": notes.tests}

    running = 0
    for number, (folder, argv) in enumerate(jobs):
        if running == at_once:
            running -= bool(os.wait())
        running += 1
        if not hasattr(os, "fork") or os.fork() == 0:
            if hasattr(signal, "alarm"):
                signal.alarm(seconds)                                     # ends this fork
            for stream in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), stream)
            result = run(folder, [*argv, f"--basetemp={out}/{number}"])
            with open(f"{out}/{number}.part", "w") as file:
                json.dump(result, file)
            os.replace(f"{out}/{number}.part", f"{out}/{number}.json")
            os._exit(0)
    while running:
        running -= bool(os.wait())


def run_tests(jobs, seconds=60):
    """jobs [(folder, exercise numbers, options of pytest)] -> for each {"error": None or a line, "tests": {name: why}}.

    why: the first line of what is wrong, "" if the test passed. The tests are those of this file.
    """
    test = os.path.join(HERE, "test_all.py")
    jobs = [(os.path.abspath(folder), [f"{test}::{name}" for n in numbers for name in EXERCISES[n].tests] + options)
            for folder, numbers, options in jobs]
    results, cores = [], len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for batch in [jobs] if hasattr(os, "fork") else [[job] for job in jobs]:
        with tempfile.TemporaryDirectory() as out:
            task = json.dumps([HERE, FILES, out, seconds, cores, batch])
            subprocess.run([sys.executable, "-c", inspect.getsource(serve) + "\nserve()"], input=task, text=True,
                           cwd=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
            for number in range(len(batch)):
                path = f"{out}/{number}.json"
                over = {"error": f"no result after {seconds} s, or the process was ended", "tests": {}}
                results.append(json.load(open(path)) if os.path.exists(path) else over)
    return results


def why_not_all(result):
    """One line on the first thing that is wrong, "" if nothing is."""
    name, reason = next(((name, reason) for name, reason in result["tests"].items() if reason), ("", ""))
    missing = re.search(r"exercise (\d+): ", reason)
    reason = f"not done: exercise {missing[1]}" if missing else f"{name}: {reason}" if reason else ""
    return result["error"] or reason


def grade(folder, numbers):
    """Print a table of exercises, points and passed tests; do all tests of all exercises pass?"""
    for name in FILES:
        if not os.path.isfile(os.path.join(folder, f"{name}.py")):
            raise ValueError(f"{folder} has no {name}.py: grade takes a folder that `handout` wrote")
    print(f"{'exercise':48}{'points':>8}{'tests':>10}")
    reached = 0
    for number, result in zip(numbers, run_tests([(folder, [n], []) for n in numbers])):
        exercise, passed, total = EXERCISES[number], list(result["tests"].values()).count(""), len(result["tests"])
        points = 0 if result["error"] else exercise.points * passed / total
        reached += points
        columns = f"{number:2} {exercise.title:45}{points:4.3g} of{exercise.points:2}{passed:6} of{total:3}"
        print(f"{columns}   {why_not_all(result)}".rstrip())
    most = sum(EXERCISES[n].points for n in numbers)
    print(f"{'all':48}{reached:4.3g} of {most}")
    return reached == most


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tests: pytest test_all.py. For a course: exercises and their points.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "a copy of the repository without the answer of an exercise; its README.md is the sheet"
    sub = commands.add_parser("handout", help=about, description=about)
    sub.add_argument("exercise", choices=[*map(str, EXERCISES), "all"], metavar="N",
                     help="1 to 10, or all: one copy without any answer")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    about = "the points of a hand-out. This runs the code in FOLDER. Exit code 0: all points, 1: not all"
    sub = commands.add_parser("grade", help=about, description=about)
    sub.add_argument("folder", metavar="FOLDER", help="what `handout` wrote; its test_all.py is not read, but this one")
    sub.add_argument("--exercise", type=int, choices=EXERCISES, metavar="N", help="only this one")
    args = parser.parse_args(argv)
    with V.exit_on_error("test_all.py"):
        if args.command == "handout":
            hand_out(list(EXERCISES) if args.exercise == "all" else [int(args.exercise)], args.out)
            print(f"{args.out}/README.md says what to do")
        elif not grade(args.folder, [args.exercise] if args.exercise else list(EXERCISES)):
            sys.exit(1)


on_forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork it would take minutes")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Results of tests: {exercise: of all, in its hand-out; (exercise, wrong answer): of its own}."""
    root = tmp_path_factory.mktemp("course")
    jobs = {}
    for number in EXERCISES:
        main(["handout", str(number), "--out", str(root / str(number))])
        jobs[number] = root / str(number), list(EXERCISES), []
    for number, answers in WRONG.items():
        for i, (name, old, new) in enumerate(answers):
            module, _, function = name.partition(".")
            source = open(os.path.join(HERE, f"{module}.py")).read()
            node = find_function(source, function)
            right = "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])
            assert old in right, (name, old)
            os.mkdir(folder := root / f"{number}-{i}")                     # the other modules come from here
            write_text(folder, f"{module}.py", source.replace(right, right.replace(old, new)))
            jobs[number, new] = folder, [number], ["-x"]
    shutil.copytree(root / "1", root / "broken")
    write_text(root / "broken", "tcas.py", "\n\ndef tcas(counts:\n")
    jobs["broken"] = root / "broken", [1], []
    return dict(zip(jobs, run_tests(jobs.values())))


@whole
@on_forks
@pytest.mark.parametrize("number", EXERCISES)
def test_a_handout_fails_its_tests_and_no_others(number, judged):
    """It can be imported; its own tests all say that it is to be done, others pass or say the same."""
    result, own = judged[number], EXERCISES[number].tests
    assert result["error"] is None
    missing = {name for name, reason in result["tests"].items() if reason}
    assert all(f"NotImplementedError: exercise {number}: " in result["tests"][name] for name in missing), result
    assert {name for name in result["tests"] if name.split("[")[0] in own} <= missing
    everything = {name for exercise in EXERCISES.values() for name in exercise.tests}
    assert {name.split("[")[0] for name in result["tests"]} == everything


@whole
@on_forks
@pytest.mark.parametrize("number", EXERCISES)
def test_wrong_answers_are_caught(number, judged):
    for _, _, new in WRONG[number]:
        result = judged[number, new]
        assert result["error"] is None and why_not_all(result), new
        assert "not done" not in why_not_all(result), new


@whole
@on_forks
def test_what_does_not_import_is_said(judged):
    assert judged["broken"]["error"].startswith("does not import: SyntaxError in tcas.py line 3")


@whole
def test_exercises_name_what_exists():
    """Functions, tests, `-k` of the sheets, the README's table; and each block of Python in a sheet is Python."""
    readme = open(os.path.join(HERE, "README.md")).read()
    tests = [name for name in globals() if name.startswith("test_")]
    for number, exercise in EXERCISES.items():
        functions = ", ".join(f"`{name}`" for name in exercise.functions)
        assert f"| {number} | {exercise.title} | {functions} | {exercise.minutes} | {exercise.points} |" in readme
        for name in exercise.functions:
            module, _, function = name.partition(".")
            assert ast.get_docstring(find_function(open(os.path.join(HERE, f"{module}.py")).read(), function)), name
        assert set(exercise.tests) <= set(tests)
        sheet = write_sheet(number)
        assert "Predict first" in sheet and "Steps" in sheet and "Two questions" in sheet
        for block in re.findall(r"^```\n(import .*?)^```", sheet, re.M | re.S):
            compile(block, "sheet", "exec")
    for words in re.findall(r"(?<!-)-k (\w+|\"[^\"]+\")", readme + "".join(map(write_sheet, EXERCISES))):
        for word in words.strip('"').split(" or "):
            assert any(word in name for name in tests) or int(word.removeprefix("exercise_")) in EXERCISES, word
    assert set(WRONG) == set(EXERCISES)


@whole
def test_a_handout_has_no_answer_and_all_else(tmp_path):
    main(["handout", "all", "--out", str(tmp_path / "all")])
    read = lambda folder, name: open(os.path.join(folder, f"{name}.py")).read()
    for number, exercise in EXERCISES.items():
        for name in exercise.functions:
            module, _, function = name.partition(".")
            ours, theirs = (find_function(read(folder, module), function) for folder in (HERE, tmp_path / "all"))
            assert [type(line) for line in theirs.body] == [ast.Expr, ast.Raise]
            assert ast.dump(ours.args) == ast.dump(theirs.args)
            wanted = inspect.cleandoc(HIDDEN[name]) if name in HIDDEN else ast.get_docstring(ours)
            assert ast.get_docstring(theirs) == wanted
        assert f"# Exercise {number}: {exercise.title}" in open(tmp_path / "all" / "README.md").read()
    for module in FILES:                                                  # else lines are only taken away
        left = iter(read(HERE, module).splitlines())
        shown = [line for text in HIDDEN.values() for line in text.splitlines()]
        assert all(line in left for line in read(tmp_path / "all", module).splitlines()
                   if "NotImplementedError(\"exercise" not in line and line.strip('" ') not in map(str.strip, shown))
    tests = read(tmp_path / "all", "test_all")
    assert "\nWRONG = {}\n" in tests and WRONG[1][0][2] not in tests


def test_course_refuses_in_one_line(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.py").write_text("")
    refused(main, ["handout", 1, "--out", tmp_path / "full"], capsys, "full", "not an empty folder")
    refused(main, ["handout", 11, "--out", tmp_path / "new"], capsys, "11")
    refused(main, ["grade", tmp_path / "full"], capsys, "has no vit.py")
    refused(main, ["grade", tmp_path / "nowhere"], capsys, "nowhere")
    refused(main, ["grade", HERE, "--exercise", 0], capsys, "0")
    assert os.listdir(tmp_path) == ["full"]


def test_points(monkeypatch, capsys):
    """Each exercise: its points, times the share of its tests that pass; 0 if nothing ran."""
    results = {1: {"error": None, "tests": {"test_a": "", "test_b": ""}},
               2: {"error": None, "tests": {"test_a": "", "test_b[3]": "assert 1 == 2"}},
               3: {"error": None, "tests": {"test_a": "NotImplementedError: exercise 3: patchify"}},
               4: {"error": "does not import: SyntaxError in vit.py line 3: invalid syntax", "tests": {}}}
    monkeypatch.setitem(globals(), "run_tests", lambda jobs: [results[numbers[0]] for _, numbers, _ in jobs])
    assert not grade(HERE, [1, 2, 3, 4]) and grade(HERE, [1])
    lines = [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[1].endswith("1 of 1 2 of 2") and lines[2].endswith("1 of 2 1 of 2 test_b[3]: assert 1 == 2")
    assert lines[3].endswith("0 of 2 0 of 1 not done: exercise 3")
    assert lines[4].endswith("SyntaxError in vit.py line 3: invalid syntax")
    assert lines[5] == "all 2 of 8"


if __name__ == "__main__":
    main()
