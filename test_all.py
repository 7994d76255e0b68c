"""Tests, in the order of the files: vit, kmeans, tcas, objectives, train, probe, README.

pytest test_all.py                      everything, on the CPU
pytest test_all.py -k two_stream_mask   one idea; every function that a student may be asked to write has its own tests

References are written out slowly and literally here, so that they can be compared with the paper line by line.
"""
import glob
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image

import kmeans
import objectives
import probe
import tcas
import train
import vit as V

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = dict(image_size=24, patch_size=8, width=32, depth=2, heads=2)              # 9 patches


def tiny(**over):
    torch.manual_seed(0)
    return V.ViT(**{**TINY, **over})


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


def script(*argv, processes=0, env=None, **how):
    """Start one of the scripts in the background: under python, or under torchrun with `processes`."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0",
              "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if processes else []
    argv = [sys.executable, *launch, os.path.join(HERE, argv[0]), *map(str, argv[1:])]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, **how)


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
    torch.manual_seed(0)
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
    square = torch.randn(2, 3, 6, 6)
    assert torch.equal(V.unpatchify(V.patchify(square, 2), 2), square)


def test_sincos_positions():
    pos = V.sincos_positions(14, 64)[0]
    assert pos.shape == (197, 64) and not pos[0].any()
    patch = pos[1:]
    assert torch.equal(patch[0, :32], patch[14, :32]) and not torch.equal(patch[0, 32:], patch[14, 32:])   # same column
    assert torch.equal(patch[0, 32:], patch[1, 32:]) and not torch.equal(patch[0, :32], patch[1, :32])     # same row
    column, k = 5, 3                                                      # sin and cos of column * 10000^(-k / (d / 4))
    assert patch[2 * 14 + column, k].item() == pytest.approx(math.sin(column * 10000 ** (-k / 16)), abs=1e-6)
    assert patch[2 * 14 + column, 16 + k].item() == pytest.approx(math.cos(column * 10000 ** (-k / 16)), abs=1e-6)


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
    torch.manual_seed(0)
    attention, x = V.Attention(16, 2), torch.randn(2, 7, 16)
    mask = torch.rand(7, 5) < .5
    mask[:, 0] = True
    full = F.pad(mask, (0, 2))                                            # rows 5 and 6 are nobody's keys
    wanted = slow_attention(attention, x, full.expand(2, -1, -1))
    torch.testing.assert_close(attention(x, mask, n_keys=5), wanted)
    torch.testing.assert_close(attention(x, mask, n_keys=5, n_out=3), wanted[:, -3:])
    torch.testing.assert_close(attention(x), slow_attention(attention, x, torch.ones(2, 7, 7).bool()))


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


def test_drop_path():
    x = torch.ones(1000, 3, 2)
    noise = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    y = V.drop_path(x, .25, noise)
    assert torch.equal(y.amin((1, 2)), y.amax((1, 2)))                    # one draw for all rows of a sample
    assert torch.equal(y[:, 0, 0] > 0, noise >= .25) and y.max() == 1 / .75
    assert V.drop_path(x, .25, None) is x
    vit = tiny(drop_path=.5)
    assert [block.drop for block in vit.blocks] == [0, .5]
    images, fixed = torch.randn(4, 3, 24, 24), torch.tensor([[.9] * 4, [.9] * 4, [.1, .9, .1, .9], [.1, .9, .1, .9]])
    x = vit.encode(vit.embed(images), noise=fixed)
    vit.blocks[1].attn.proj.weight.data.fill_(9.)                         # samples 0 and 2 skip the second block
    changed = (vit.encode(vit.embed(images), noise=fixed) - x).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [False, True, False, True]


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
    before = probe.fingerprint(vit)
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
    assert probe.fingerprint(vit) == before


def test_download_checks_the_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    source = tmp_path / "weights.pth"
    source.write_bytes(b"weights")
    for wrong in (dict(sha256="0123"), dict(md5="0123")):
        with pytest.raises(ValueError, match="cannot fetch"):
            V.download(source.as_uri(), **wrong)
    path = V.download(source.as_uri(), md5=hashlib.md5(b"weights").hexdigest()[:6])
    assert open(path, "rb").read() == b"weights" and path.startswith(str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="put the file at"):
        V.download((tmp_path / "missing.pth").as_uri())


def test_vit_table(capsys):
    V.main([])
    out = capsys.readouterr().out
    assert "vit_base" in out and "85.80M" in out and "35.13" in out       # 17.6 G multiply-adds, counted twice
    refused(V.main, ["--image-size", 50], capsys, "50", "multiple")


# --- objectives.py ------------------------------------------------------------------------------------------------

def literal_masks(n, cut, rank, positions=True):
    """METHODS 1.3, cell by cell, in *raster* order: content (1+n+T, 1+n+T) and query (T, 1+n+T), True = may attend.

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
def test_two_stream_mask_is_methods_1_3(n, cut, positions):
    z = torch.randperm(n, generator=torch.Generator().manual_seed(n)).tolist()
    rank = [0] + [1 + z.index(j) for j in range(n)]
    content, query, targets = literal_masks(n, cut, rank, positions)
    T = 1 + n - cut
    order = [0] + [1 + j for j in z]                                      # our rows, by raster token
    slots = [1 + n + targets.index(j) for j in order[cut:]] if positions else []
    ours = objectives.two_stream_mask(cut, T, positions)
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
    with pytest.raises(ValueError, match="class token"):
        objectives.make("mapet", tiny(cls_token=False), 16)
    with pytest.raises(ValueError, match="vocab_size"):
        objectives.make("mim", tiny())
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


@pytest.mark.parametrize("name", ["mapet", "pim", "mim"])
def test_every_target_counts_once_and_untrained_loss_is_ln_k(name):
    model = objectives.make(name, tiny(), 50, cut=4)
    images, tokens, order = torch.randn(64, 3, 24, 24), torch.randint(50, (64, 9)), objectives.random_order(64, 9)
    loss, logs = model(images, tokens, order)
    assert abs(loss.item() - math.log(50)) < .05
    logits, wanted = model.predict(images, tokens, order)
    assert torch.equal(wanted, tokens.gather(1, order[:, 3:]))
    by_hand = -logits.log_softmax(-1).gather(-1, wanted[..., None]).sum() / (64 * 6)
    torch.testing.assert_close(loss, by_hand)
    assert logs["accuracy"].ndim == 0


@pytest.mark.parametrize("name", ["mapet", "pim", "mim"])
def test_overfits_8_images(name):
    model = objectives.make(name, tiny(), 6, cut=4)
    images, tokens = torch.randn(8, 3, 24, 24), torch.randint(6, (8, 9))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = objectives.random_order(8, 9)
    for _ in range(120):
        loss, _ = model(images, tokens, order)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < .1


def test_every_parameter_learns():
    """DDP needs it, and a stream that is cut off would show here."""
    for name in objectives.OBJECTIVES:
        model = objectives.make(name, tiny(layer_scale=.1), 6, cut=4)
        model(torch.randn(4, 3, 24, 24), torch.randint(6, (4, 9)))[0].backward()
        idle = [key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not idle, (name, idle)


def test_masks_printed_and_drawn(tmp_path, capsys):
    objectives.main(["mapet", "--patches", "6", "--cut", "3", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    order = [int(word[1:]) for word in re.search(r"order z: (.*); cut", lines[0])[1].split()]
    mask, rows, keys = objectives.named_mask("mapet", order, 3)
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
        white = (picture[2 * cell + y * cell + 6, 3 * cell + x * cell + 6] == 255).all()
        assert white != mask[y, x].item()
    refused(objectives.main, ["mapet", "--patches", 6, "--cut", 7], capsys, "--cut 7", "1 to 6")
