"""What was learned: every evaluation of the two papers, on an encoder f of ours or of anybody.

    k-NN           argmax_c  sum of exp(cos(f(x), f(x_i)) / 0.07) over the k nearest x_i of class c
    linear probe   softmax(W f(x) + b), f frozen
    fine-tuning    softmax(W LN(mean of the patches) + b), all of f trained, lower blocks more slowly
    tokens         softmax(W g(tokens) + b): no pixels at all (MaPeT Table 4)

python probe.py knn runs/mapet-textures           or finetune, or show: where [CLS] looks, what patches share
python probe.py linear runs/mapet-textures        the best of many heads on stored features: seconds
python probe.py linear RUN --protocol mae         or beit: the papers' probes, the encoder runs every epoch
python probe.py finetune FILE --epochs 0          the score of a fine-tuned network, by the head that it has
python probe.py tokens RUN --head mlp             or TOKENS.npy --test-tokens FILE
python probe.py compare runs/mim-* runs/pim-*     curves, mean and deviation over seeds, differences

RUN is a run's folder, an encoder.pt, a timm/DINO/DeiT/MAE/MaPeT file or a public name; --data another data
set (MaPeT Table 5). Beside each result is the floor, the same network untrained; probe.jsonl in the run's
folder has them all. Nothing is chosen on the test images: the epoch that counts is the last one. (MAE's code
prints the best epoch on them, BEiT's the best epoch and layer.)
"""
import argparse
import functools
import itertools
import json
import math
import os
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torchvision.transforms import InterpolationMode, v2

import train
from kmeans import all_reduce, load_batches, load_tokenizer, load_tokens, print0, rank_and_world, tokenize
from vit import (MODELS, ViT, draw_rows, exit_on_error, from_weights, load_matplotlib,
                 normalize, principal_colors, read_checkpoint, unwrap_weights)


# --- features ---------------------------------------------------------------------------------------------

@torch.no_grad()
def pool_features(vit, images, final_norm=True):
    """Normalized images (b, 3, S, S) -> (b, depth, s, d) float32; s: class token, if any, and patch mean.

    final_norm: the last block's are the encoder's output, after the final norm (not so in BEiT's probe)
    """
    features, x = [], vit.embed(images)
    for block in vit.blocks:
        x = block(x)
        if final_norm and block is vit.blocks[-1]:
            x = vit.norm(x)
        x = x.float()
        mean = x[:, vit.prefix:].mean(1, keepdim=True)
        features.append(torch.cat([x[:, :vit.prefix], mean], 1))
    return torch.stack(features, 1)


@torch.no_grad()
def run_network(network, ds, device, workers):
    """Yields network(images) and labels (b,), batch by batch, of this process's images."""
    rank, world = rank_and_world()
    mine = range(rank, len(ds), world)
    for images, labels, _ in load_batches(ds, mine, 256, workers, device, ds.name):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = network(prepare(images, ds))
        yield found, labels


def prepare(x, ds):
    """uint8 images are normalized, floats are so already, tokens stay."""
    return normalize(x, ds.mean, ds.std) if x.dtype == torch.uint8 else x


def extract(vit, ds, device, workers=0, layers=slice(None)):
    """`pool_features` (n, layers, s, d) and labels (n,) of all images, on every process.

    More than 2^31 values (8 GB) are float16; one process keeps those in the computer's memory.
    """
    rank, world = rank_and_world()
    shape = len(ds), len(vit.blocks[layers]), 1 + vit.prefix, vit.width
    large = math.prod(shape) > 1 << 31
    x = torch.zeros(
        shape, dtype=torch.half if large else torch.float,
        device="cpu" if large and world == 1 else device)
    encode = functools.partial(pool_features, vit.to(device).eval())
    batches = run_network(encode, ds, device, workers)
    for rows, (features, _) in zip(x[rank::world].split(256), batches):
        rows.copy_(features[:, layers])
    all_reduce(x)
    return x, torch.as_tensor(ds.labels, device=device)


def standardize(x, *others):
    """Features (n, ...) to mean 0 and deviation 1, `others` by the same; in place: ImageNet's are 8 GB."""
    some = x[::1 + len(x) // 16384].float()                    # of many, these tell the moments
    std, mean = torch.std_mean(some, 0, correction=0)
    for features in (x, *others):
        features.sub_(mean).div_(std.clamp(min=1e-6))


# --- k-NN, and linear heads on the same stored features ---------------------------------------------------

@torch.no_grad()
def knn(train_x, train_y, test_x, test_y, k=20, chunk=256):
    """Top-1 accuracy (0..1) of weighted k-nearest neighbors under cosine similarity (Wu et al. 2018).

    x features (n, d), y labels (n,) int64. The processes share the test images; `chunk` of them at once.
    """
    rank, world = rank_and_world()
    bank, test_x = F.normalize(train_x), F.normalize(test_x)
    correct = torch.zeros(1, device=bank.device)
    for rows in torch.arange(rank, len(test_x), world).split(chunk):
        similarity, nearest = (test_x[rows] @ bank.T).topk(min(k, len(bank)))     # (chunk, k)
        weight = (similarity / .07).exp()
        votes = F.one_hot(train_y[nearest]) * weight[..., None]                   # (chunk, k, c)
        correct += (votes.sum(1).argmax(1) == test_y[rows]).sum()
    all_reduce(correct)
    return correct.item() / len(test_y)


# What a head sees of [class token, patch mean].
POOLINGS = {"class token": slice(0, 1), "patch mean": slice(-1, None), "both": slice(None)}
# The fast linear probe's learning rates and weight decays.
RATES, DECAYS = (3e-3, 1e-2, 3e-2, .1), (1e-4, .1)


def train_heads(choices, x, y, rows=None, epochs=50, batch_size=1024, seed=0):
    """Linear heads, one for each (layer, pooling, learning rate, weight decay) of `choices`, all at once.

    They share the batches of standardized features x (n, l, s, d), labels y (n,), of `rows` only. AdamW, the
    rate a cosine down to 0; an epoch's last, small batch is left out.
    -> function of features (b, l, s, d): logits (heads, b, c)
    """
    heads, groups = [], []
    for layer, pooling, lr, weight_decay in choices:
        width = x[0, layer, POOLINGS[pooling]].numel()
        head = nn.Linear(width, int(y.max()) + 1, device=y.device)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        heads.append(head)
        groups.append(dict(params=head.parameters(), lr=lr, weight_decay=weight_decay))

    def predict(x):
        x = x.to(y.device).float()
        logits = []
        for head, (layer, pooling, _, _) in zip(heads, choices):
            logits.append(head(x[:, layer, POOLINGS[pooling]].flatten(1)))
        return torch.stack(logits)

    rows = torch.arange(len(x)) if rows is None else rows
    batch_size = min(batch_size, len(rows))
    per_epoch = len(rows) // batch_size
    optimizer = torch.optim.AdamW(groups)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for batch in order.split(batch_size)[:per_epoch]:
            # The sum over the heads: no head's gradient knows of another.
            sum(F.cross_entropy(logits, y[batch]) for logits in predict(x[batch])).backward()
            optimizer.step()
            optimizer.zero_grad()
            cosine.step()
    return predict


@torch.no_grad()
def measure_heads(predict, x, y):
    """The share of x that each head gets right, a list."""
    hits = 0
    for part, labels in zip(x.split(1024), y.split(1024)):
        hits += (predict(part).argmax(-1) == labels).sum(1)
    return (hits.double() / len(x)).tolist()


def linear(train_x, train_y, test_x, test_y, **how):
    """Top-1 accuracy (0..1) of one linear head on standardized features (n, d), labels (n,)."""
    choices = [(0, "both", 1e-2, 1e-4)]
    head = train_heads(choices, train_x[:, None, None], train_y, **how)
    return measure_heads(head, test_x[:, None, None], test_y)[0]


def choose_head(train_x, train_y, test_x, test_y, epochs=30, seed=0):
    """The fast linear probe: of many heads the best on a tenth of the training images, trained anew on all.

    x (n, l, s, d) standardized features, y (n,) labels.
    """
    how = dict(epochs=epochs, seed=seed)
    n, layers, s, _ = train_x.shape
    generator = torch.Generator().manual_seed(train.derive_seed(seed, 1))
    order = torch.randperm(n, generator=generator)
    held, rest = order[:n // 10], order[n // 10:]
    poolings = POOLINGS if s == 2 else ["patch mean"]
    choices = list(itertools.product(range(layers), poolings, RATES, DECAYS))
    heads = train_heads(choices, train_x, train_y, rest, **how)
    scores = measure_heads(heads, train_x[held], train_y[held])
    ranked = sorted(zip(scores, choices))                      # the best one last
    _, best = ranked[-1]
    layer, pooling, lr, weight_decay = best
    head = train_heads([best], train_x, train_y, order, **how)
    return dict(
        linear=measure_heads(head, test_x, test_y)[0],
        held_out={f"block {i + 1}, {name}": score for score, (i, name, _, _) in ranked},
        chosen=f"block {layer + 1}, {pooling}, lr {lr:g}, weight decay {weight_decay:g}")


def evaluate(vit, train_ds, test_ds, device, workers=0, seed=0, what=("knn", "linear"), k=20):
    """{"knn": ..., "linear": ...}: top-1 accuracies (0..1), all settings fixed; train.py's closing table.

    Of [class token, patch mean] after the final norm; the two differ in scale, so they are standardized.
    """
    last = slice(-1, None)
    x, y = extract(vit, train_ds, device, workers, last)
    test_x, test_y = extract(vit, test_ds, device, workers, last)
    standardize(x, test_x)
    x, test_x = (features.flatten(1).to(device).float() for features in (x, test_x))
    found = {}
    if "knn" in what:
        found["knn"] = knn(x, y, test_x, test_y, k)
    if "linear" in what:
        found["linear"] = linear(x, y, test_x, test_y, seed=seed)
    return found


# --- the papers' networks: normalized images, or tokens -> logits (b, heads, c) ----------------------------

class Head(nn.Linear):
    """In float32, under autocast, too: among 1000 classes, bfloat16 changes one prediction in a hundred."""

    def __init__(self, width, classes, std=.02):
        super().__init__(width, classes)
        nn.init.trunc_normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class LinearProbe(nn.Module):
    """The papers' linear probes of a frozen encoder.

    mae   class token after the final norm -> BatchNorm without parameters -> linear layer (MAE, ClusterMIM);
          its moments are of the images that one process sees at once: up to 256 (MAE's code: 512)
    beit  [class token, patch mean] of every block -> a linear layer for each (BEiT, MaPeT)
    """

    def __init__(self, vit, classes, mae):
        super().__init__()
        self.frozen = (vit.eval(),)                            # in a tuple: no part of this module
        self.mae = mae
        if mae:
            self.norm = nn.BatchNorm1d(vit.width, eps=1e-6, affine=False)
            widths = [vit.width]
        else:
            widths = [(1 + vit.prefix) * vit.width] * vit.depth
        self.heads = nn.ModuleList(Head(width, classes, .01) for width in widths)

    def forward(self, images):
        x = pool_features(*self.frozen, images, final_norm=self.mae)
        if self.mae:
            x = self.norm(x[:, -1, 0])[:, None]
        logits = [head(x[:, i].flatten(1)) for i, head in enumerate(self.heads)]
        return torch.stack(logits, 1)


class Classifier(nn.Module):
    """Fine-tuning: mean of the patches -> a new norm (the encoder's own is dropped) -> linear layer."""

    def __init__(self, vit, classes, drop_path=0., head_std=.02):
        super().__init__()
        self.encoder = vit.requires_grad_(True)
        vit.norm = nn.Identity()
        for block, rate in zip(vit.blocks, torch.linspace(0, drop_path, vit.depth).tolist()):
            block.drop_path1.p = block.drop_path2.p = rate
        self.fc_norm = nn.LayerNorm(vit.width, eps=1e-6)
        self.head = Head(vit.width, classes, head_std)

    def forward(self, x):
        patches = self.encoder(x)[:, self.encoder.prefix:]
        return self.head(self.fc_norm(patches.mean(1)))[:, None]


class TokenMLP(nn.Module):
    """MaPeT Table 4: embedding -> linear -> ReLU -> mean over the positions -> linear: a bag of tokens.

    The widths are ViT-T's 192 and four times that: ours, as our copy of the paper lacks its digits.
    """

    def __init__(self, vocab_size, classes, width=192, hidden=768):
        super().__init__()
        self.table, self.hidden = nn.Embedding(vocab_size, width), nn.Linear(width, hidden)
        self.head = Head(hidden, classes)

    def forward(self, tokens):
        # What comes before the mean knows only the code: computed once for every code, not for every patch.
        codes = F.relu(self.hidden(self.table.weight)).float()
        return self.head(F.embedding_bag(tokens.flatten(1), codes, mode="mean"))[:, None]


class TokenEmbed(nn.Embedding):
    """A table of token vectors in place of the patch embedding: (b, y, x) -> (b, n, d)."""

    def forward(self, tokens, order=None):
        return super().forward(tokens.flatten(1))


def token_vit(name, vocab_size, classes, grid, drop_path):
    """MaPeT Table 4's other head: the named ViT on tokens, each of them a patch of one pixel."""
    vit = MODELS[name](image_size=grid, patch_size=1, pos="learned")
    vit.patch_embed = TokenEmbed(vocab_size, vit.width)
    nn.init.trunc_normal_(vit.patch_embed.weight, std=.02)
    return Classifier(vit, classes, drop_path)


# --- their optimizers and recipes -------------------------------------------------------------------------

def layer_groups(model, weight_decay, layer_decay):
    """Parameter groups: the learning rate is multiplied by scale = layer_decay ^ (L + 1 - layer) (BEiT, MAE).

    layer 0: class token, positions, patch embedding; i + 1: block i; L + 1: the rest. No weight decay on
    biases, norms, LayerScale, positions, class token.
    """
    groups = []
    for name, p in model.named_parameters():
        part = name.split(".")
        below = 0                                              # how many layers this one is below the head
        if part[0] == "encoder":
            below = model.encoder.depth + 1
        if part[1] == "blocks":
            below -= int(part[2]) + 1
        free = p.ndim < 2 or part[-1] in ("pos_embed", "cls_token")
        decay = 0. if free else weight_decay
        groups.append(dict(params=[p], weight_decay=decay, scale=layer_decay ** below))
    return groups


class LARS(torch.optim.SGD):
    """SGD with momentum, a matrix moves in proportion to its own norm (You et al. 2017, as in MAE's code).

        g = gradient + decay p;  v <- momentum v + (0.001 |p| / |g|) g;  p <- p - lr v
        1-D:                     v <- momentum v + gradient;             p <- p - lr v
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    p.grad.add_(p, alpha=group["decay"])
                    p_norm, g_norm = p.norm(), p.grad.norm()
                    trust = .001 * p_norm / g_norm
                    p.grad.mul_(torch.where((p_norm > 0) & (g_norm > 0), trust, 1.))
        super().step()


# An explicit flag beats the recipe. base_lr: per 256 images, lr = base_lr * batch / 256.
ADAMW = dict(
    lr=None, base_lr=None, min_lr=0., clip_norm=0.,
    warmup_lr=0., warmup_epochs=0., cosine="warmup",
    layer_decay=1., drop_path=0., head_std=.02,
    smoothing=0., mixup=0., erase=0., randaugment=0.,
    test_crop=.875, interpolation="bicubic")
# Linear probes. mae: He et al. 2022, App. A.1, as in ClusterMIM. beit: MaPeT Sec. D; our copy lacks rate
# and decay, which are of BEiT's code, as are bilinear crops and the decay of all parameters.
PROTOCOLS = {
    "mae": dict(
        ADAMW, base_lr=.1, weight_decay=0.,
        batch_size=16384, epochs=90., warmup_epochs=10.),
    "beit": dict(
        ADAMW, lr=4e-3, weight_decay=1e-4,
        batch_size=1024, epochs=50., interpolation="bilinear")}
# Fine-tuning of ViT-B. mapet: Table 8; mae: App. A.1. RandAugment 9 is timm's m9 of 10.
STRONG = dict(
    ADAMW, batch_size=1024, epochs=100., min_lr=1e-6,
    weight_decay=.05, layer_decay=.65, drop_path=.1,
    smoothing=.1, mixup=.8, erase=.25, randaugment=9.)
# Ours: the embedded data's class is an orientation and a period, so nothing may turn, flip or zoom it.
RECIPES = {
    "mapet": dict(
        STRONG, lr=5e-4, test_crop=.9,
        warmup_epochs=20., warmup_lr=1e-6, cosine="start"),
    "mae": dict(STRONG, base_lr=5e-4, warmup_epochs=5., head_std=2e-5),
    "textures": dict(
        ADAMW, lr=2e-3, min_lr=1e-6, weight_decay=.05,
        batch_size=64, epochs=10., warmup_epochs=1., smoothing=.1)}
BY_WIDTH = {
    ("mapet", 192): dict(lr=2.5e-4, epochs=300., layer_decay=1.),
    ("mapet", 384): dict(lr=5e-3, epochs=200.),
    ("mae", 1024): dict(base_lr=1e-3, epochs=50., layer_decay=.75, drop_path=.2)}
# Ours: MaPeT states no recipe for its Table 4. The second is for textures, on two CPU cores.
TOKENS = dict(
    ADAMW, lr=1e-3, weight_decay=.05, smoothing=.1,
    batch_size=1024, epochs=100., warmup_epochs=5., drop_path=.1)
SMALL_TOKENS = dict(TOKENS, batch_size=128, epochs=20., warmup_epochs=1.)


def complete(args, recipe):
    """The recipe's values where the command line has none; args.chosen: them all, for the checkpoint."""
    if args.epochs and args.warmup_epochs is None:             # a shorter run keeps the share of the warm-up
        args.warmup_epochs = recipe["warmup_epochs"] * min(1, args.epochs / recipe["epochs"])
    for key, value in recipe.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    args.chosen = {key: getattr(args, key) for key in recipe}


# --- what is trained on -----------------------------------------------------------------------------------

def test_view(ds, args):
    """The center 224 of 256 pixels a side (MaPeT's fine-tuning: of 248), from the whole picture."""
    if not ds.from_files:
        return ds
    square = train.center_square(int(ds.image_size / args.test_crop))
    return ds.view(v2.Compose([square, v2.CenterCrop(ds.image_size)]))


def training_view(ds, args):
    """Random crops, mirrored; by the recipe RandAugment and random erasing, which give normalized floats."""
    size, interpolation = ds.image_size, InterpolationMode(args.interpolation)
    crop = v2.RandomResizedCrop(size, (.08, 1), interpolation=interpolation)
    steps = [crop, v2.RandomHorizontalFlip()]
    if ds.name.startswith("textures"):                         # shifted, a twelfth of a side
        steps = [v2.RandomCrop(size, padding=size // 12, padding_mode="reflect")]
    if args.randaugment:
        # timm's two operations, each with probability 1/2; its 9 of 10 is 27 of torchvision's 31. Its small
        # noise on the magnitude (mstd 0.5) is left out. PIL's rotations are the faster ones.
        fill = [round(255 * m) for m in ds.mean]
        one = v2.RandAugment(1, min(30, round(3 * args.randaugment)), 31, interpolation, fill)
        maybe = v2.RandomApply([one], .5)
        steps += [v2.ToPILImage(), maybe, maybe, v2.ToImage()]
    if args.erase:                                             # by noise of unit variance, so after
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(ds.mean, ds.std)]
        steps += [v2.RandomErasing(args.erase, value="random")]
    return ds.view(v2.Compose(steps), args.seed)


def take(ds, n, seed):
    """n images of a data set, drawn by the seed; None: all, in another order."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(ds), generator=generator)[:n].tolist()
    load = functools.partial(load_row, ds.load, rows)
    return train.Images(
        ds.name, load, ds.labels[rows], ds.classes, ds.image_size, ds.from_files,
        mean_std=(ds.mean, ds.std))


def load_row(load, rows, i):
    return load(rows[i])


def open_tokens(file, ds):
    """The data set `ds` with token ids (y, x) in place of its pictures."""
    tokens = load_tokens(file)
    side = math.isqrt(tokens.shape[1])
    if tokens.shape != (len(ds), side * side):
        raise ValueError(f"{file}: tokens {tokens.shape} (images, patches), {ds.name} has {len(ds)} images")
    tokens = torch.from_numpy(tokens.astype(np.int32)).view(-1, side, side)
    return train.Images(ds.name, tokens.__getitem__, ds.labels, ds.classes, side, from_files=False)


# --- training and scoring ---------------------------------------------------------------------------------

def make_optimizer(model, args):
    decay = args.weight_decay
    if not isinstance(model, LinearProbe):
        return torch.optim.AdamW(layer_groups(model, decay, args.layer_decay), fused=True)
    if model.mae:
        return LARS([dict(params=model.parameters(), decay=decay)], momentum=.9)
    return torch.optim.AdamW(model.parameters(), weight_decay=decay, fused=True)


def make_mix(args, classes):
    """MixUp or CutMix, the same chance: (images, labels) -> both mixed."""
    if not args.mixup:
        return v2.Identity()
    mixup = v2.MixUp(alpha=args.mixup, num_classes=classes)
    return v2.RandomChoice([mixup, v2.CutMix(num_classes=classes)])


def fit(model, ds, args, name):
    """Train by the recipe. OUT/NAME.pt is gone on from, if it is of the same settings: OUT/NAME.json."""
    rank, world = rank_and_world()
    path = f"{args.out}/{name}.pt"
    args.batch_size = min(args.batch_size, len(ds) // world * world)
    args.lr = args.lr or args.base_lr * args.batch_size / 256
    settings = dict(args.chosen, data=args.data, images=len(ds), seed=args.seed, weights=args.weights)
    if args.fresh and rank == 0:
        Path(path).unlink(missing_ok=True)
    anew = args.fresh or not os.path.exists(path)
    train.check_settings(f"{args.out}/{name}.json", settings, anew)
    mix = make_mix(args, len(ds.classes))

    def compute_loss(net, images, labels, read, step, rows):
        x, labels = mix(prepare(images, ds), labels)
        loss = 0
        for logits in net(x).unbind(1):
            loss = loss + F.cross_entropy(logits, labels, label_smoothing=args.smoothing)
        return loss, {}

    model.to(args.device).train()
    optimizer = make_optimizer(model, args)
    step, steps = train.train(model, optimizer, ds, args, compute_loss, args.device, path)
    if step < steps:
        print0(f"{path}: at step {step} of {steps}, no result yet; the same command without --steps goes on")
        raise SystemExit
    for buffer in model.buffers():                             # BatchNorm's: each process has seen its part
        if buffer.is_floating_point():
            all_reduce(buffer)
            buffer /= world


def score(model, ds, args):
    """Top-1 accuracies (0..1) of the heads, a list; every image counts once."""
    hits = 0
    model.to(args.device).eval()
    for logits, labels in run_network(model, ds, args.device, args.workers):
        hits += (logits.argmax(-1) == labels[:, None]).sum(0)
    all_reduce(hits)
    return (hits.double() / len(ds)).tolist()


# --- commands: (args, encoder, training set, test set) -> result ------------------------------------------

def run_knn(args, vit, train_ds, test_ds):
    """weighted k-nearest neighbors on frozen features"""
    return evaluate(vit, train_ds, test_ds, args.device, args.workers, what=["knn"], k=args.k)


def run_linear(args, vit, train_ds, test_ds):
    """a linear layer on frozen features"""
    if args.protocol == "fast":
        return run_fast(args, vit, train_ds, test_ds)
    if args.protocol == "mae" and not vit.prefix:
        raise ValueError("--protocol mae reads the class token, this encoder has none: take --protocol beit")
    complete(args, PROTOCOLS[args.protocol])
    model = LinearProbe(vit.to(args.device), len(train_ds.classes), args.protocol == "mae")
    fit(model, training_view(train_ds, args), args, f"linear-{args.protocol}{args.suffix}")
    by_layer = score(model, test_view(test_ds, args), args)
    # BEiT prints the best block on the test images; the last block's is the number that nobody chose.
    return dict(linear=by_layer[-1], by_layer=by_layer)


def run_fast(args, vit, train_ds, test_ds):
    x, y = extract(vit, train_ds, args.device, args.workers)
    test_x, test_y = extract(vit, test_ds, args.device, args.workers)
    standardize(x, test_x)
    return choose_head(x, y, test_x, test_y, round(args.epochs or 30), args.seed)


def run_finetune(args, vit, train_ds, test_ds):
    """train the whole network on labels"""
    complete(args, RECIPES[args.recipe] | BY_WIDTH.get((args.recipe, vit.width), {}))
    model = Classifier(vit, len(train_ds.classes), args.drop_path, args.head_std)
    if args.epochs:
        labelled = take(train_ds, args.labelled, args.seed)
        fit(model, training_view(labelled, args), args, f"finetune{args.suffix}")
    else:
        load_head(model, args.run)
    accuracy, = score(model, test_view(test_ds, args), args)
    return dict(finetune=accuracy)


def load_head(model, path):
    """The norm and the linear layer of a fine-tuned network: ours, MAE's, MaPeT's."""
    state = unwrap_weights(read_checkpoint(path), path)
    try:
        for key, value in model.state_dict().items():
            if not key.startswith("encoder."):
                value.copy_(state[key])
    except (KeyError, RuntimeError):
        raise ValueError(f"{path}: --epochs 0 scores a fine-tuned network: a file with fc_norm and with "
                         f"a head for the {model.head.out_features} classes of --data") from None


def run_tokens(args):
    """classify from the tokens alone"""
    files, splits = make_tokens(args)
    train_ds, test_ds = map(open_tokens, files, splits)
    complete(args, SMALL_TOKENS if args.data == "textures" else TOKENS)
    args.weights = zlib.crc32(Path(files[0]).read_bytes())
    vocab_size = 1 + max(int(load_tokens(file).max()) for file in files)
    classes = len(train_ds.classes)
    torch.manual_seed(args.seed)
    if args.head == "mlp":
        model = TokenMLP(vocab_size, classes)
    else:
        model = token_vit(args.head, vocab_size, classes, train_ds.image_size, args.drop_path)
    fit(model, train_ds, args, f"tokens-{args.head}")
    accuracy, = score(model, test_ds, args)
    most_frequent = np.bincount(train_ds.labels).max() / len(train_ds)
    return dict(tokens=accuracy), dict(tokens=most_frequent), test_ds


def make_tokens(args):
    """Files with the tokens of the training and the test images, and these: by a tokenizer, or given."""
    if args.test_tokens:
        return (args.run, args.test_tokens), open_data(args, args.image_size)
    path = f"{args.run}/tokenizer.pt" if os.path.isdir(args.run) else args.run
    tokenizer = load_tokenizer(path).to(args.device)
    splits = open_data(args, tokenizer.input_size)
    made_by = zlib.crc32(tokenizer.weight.cpu().numpy())
    files = []
    for ds, split in zip(splits, ("train", "test")):
        file = f"{args.out}/tokens-{Path(args.data).name}-{made_by:08x}-{split}.npy"
        tokenize(tokenizer, ds, file, 64, args.workers, args.device)
        files.append(file)
    return files, splits


def cls_attention(vit, images):
    """Where the class token (without one: the mean patch) looks in the last block, mean of heads: (b, n)."""
    x = vit.embed(images)
    for block in vit.blocks[:-1]:
        x = block(x)
    last = vit.blocks[-1]
    q, k, _ = last.attn.qkv(last.norm1(x)).chunk(3, -1)
    q, k = (rearrange(y, "b n (h d) -> b h n d", h=vit.heads) for y in (q, k))
    scores = q @ k.mT / q.shape[-1] ** .5
    attention = scores.softmax(-1).mean(1)
    return attention[:, 0, 1:] if vit.prefix else attention.mean(1)


@torch.no_grad()
def show(args):
    """draw the attention of the class token, and three principal components of the features"""
    vit = from_weights(args.run, args.image_size, args.heads)
    vit = untrain(vit, args) if args.random_init else vit
    vit = vit.to(args.device).eval()
    _, ds = open_data(args, vit.image_size)
    some = range(0, len(ds), math.ceil(len(ds) / 6))
    pixels, _, _ = next(load_batches(ds, some, 6, 0, args.device))
    images = normalize(pixels, ds.mean, ds.std)
    heat = cls_attention(vit, images)[..., None]
    heat = heat / heat.amax(1, keepdim=True)
    colors, = principal_colors(vit(images)[:, vit.prefix:])
    rows = {"image": pixels / 255}
    for label, x in (("attention", heat.expand(colors.shape)), ("features", colors)):
        grid = rearrange(x, "b (y x) c -> b c y x", y=vit.grid)
        rows[label] = F.interpolate(grid, vit.image_size)
    if rank_and_world()[0] == 0:
        draw_rows(rows, f"{args.out}/show.png")


# --- runs side by side ------------------------------------------------------------------------------------

def compare(args):
    """curves of several runs in one picture; their accuracies, mean and deviation over seeds

    Runs of one objective, data and settings but the seed are a group, named after its first run; all others
    are compared with the first group, seed by seed.
    """
    groups, curves = {}, {}
    for folder in args.run:
        end, why = train.read_summary(folder)
        if why:
            print(f"{folder}: left out, {why}")
            continue
        same = json.dumps([end["objective"], end["data"], end["settings"]], sort_keys=True)
        name, by_seed = groups.setdefault(same, (folder, {}))
        by_seed[end["seed"]] = 100 * np.array([end["knn"], end["linear"]])
        curves.setdefault(name, []).append(train.read_metrics(f"{folder}/metrics.jsonl"))
    if not groups:
        raise ValueError("compare: none of these runs has accuracies")
    print("k-NN and linear probe, top-1 %: mean ± deviation over seeds; differences ± standard error")
    groups = dict(groups.values())
    first, reference = next(iter(groups.items()))
    for name, by_seed in groups.items():
        print_row(name, by_seed.values(), 1)
    for name, by_seed in groups.items():
        if name != first:
            differences = [by_seed[seed] - reference[seed] for seed in by_seed if seed in reference]
            print_row(f"{name} - {first}", differences, len(differences) ** .5)
    plt = load_matplotlib()
    if plt:
        train.plot_metrics(plt, curves, f"{args.out or 'runs'}/compare.png")
    return groups


def print_row(name, values, divisor):
    """values: (k-NN, linear probe) of each seed."""
    words = []
    for column in zip(*values):
        spread = np.std(column, ddof=1) / divisor if len(column) > 1 else math.nan
        words.append(f"{np.mean(column):6.1f} ± {spread:.1f}")
    print(f"{name}: {len(values)} seeds", *words)


# --- what the arguments name ------------------------------------------------------------------------------

def open_run(args):
    """Sets args.settings: the flags of the run that is named or that has the file; what follows from them."""
    folder = args.run if os.path.isdir(args.run) else os.path.dirname(args.run)
    file = Path(folder, "settings.json")
    args.settings = settings = json.loads(file.read_text()) if file.exists() else {}
    args.out = args.out or (folder if settings else f"runs/{Path(args.run).stem}")
    os.makedirs(args.out, exist_ok=True)
    if args.data is None:
        args.data = settings.get("data", "textures")
        args.classes = args.classes or settings.get("classes")
    if args.recipe is None:
        by_mae = settings.get("objective") in ("mae", "maskfeat", "clustermim")
        args.recipe = "mae" if by_mae else "mapet"
        if args.data == "textures":
            args.recipe = "textures"


def open_data(args, image_size):
    """(training set, test set), with labels: of --data, or of what the run was trained on."""
    squares = args.settings.get("preset") == "laptop" and not args.settings["crop"]
    train_ds, test_ds, why = train.open_splits(args.data, image_size, args.classes, squares)
    if test_ds is None:
        raise ValueError(f"--data {args.data}: {why}; a probe needs labels: train/CLASS/ and val/CLASS/")
    if args.workers is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = os.cpu_count() // processes if train_ds.from_files else 0
    return train_ds, test_ds


def untrain(vit, args):
    """The same network, untrained, as its run began it."""
    torch.manual_seed(args.seed)
    flags = args.settings
    scale = flags.get("layer_scale", .1) if vit.layer_scale else None
    return ViT(
        vit.image_size, vit.patch_size, vit.width, vit.depth, vit.heads, vit.mlp_ratio, scale,
        pos=flags.get("pos", "learned"), cls_token=bool(vit.prefix), init=flags.get("init", "timm"))


def measure(args):
    """knn, linear, finetune: the result, the floor (the network untrained) or None, the test set."""
    vit = from_weights(args.run, args.image_size, args.heads)
    train_ds, test_ds = open_data(args, vit.image_size)
    networks = {"-random": untrain(vit, args), "": vit}
    if args.random_init:
        del networks[""]
    elif args.no_floor or args.epochs == 0:
        del networks["-random"]
    results = [None]
    for args.suffix, network in networks.items():
        weights = nn.utils.parameters_to_vector(network.parameters())
        args.weights = zlib.crc32(weights.detach().numpy())    # what a checkpoint was trained on
        torch.manual_seed(args.seed)
        results.append(COMMANDS[args.what](args, network, train_ds, test_ds))
    return results[-1], results[-2], test_ds


def report(args, seconds, result, floor, test_ds):
    """Prints the result and appends it to probe.jsonl."""
    source = f"random init of {args.run}" if args.random_init else args.run
    protocols = dict(linear=args.protocol, finetune=args.recipe, tokens=args.head)
    tested_on = f"{test_ds.name}, {len(test_ds)} images"
    line = dict(
        what=args.what, protocol=protocols.get(args.what), source=source, data=args.data, seed=args.seed,
        **result, floor=floor, tested_on=tested_on, seconds=round(seconds, 1))
    train.append_metrics(f"{args.out}/probe.jsonl", **line)
    words = f"floor {100 * floor[args.what]:.1f} %, " if floor else ""
    print0(f"{args.what} {100 * result[args.what]:.1f} % ({words}{source}, {tested_on})")
    for key, value in result.items():
        print0(f"    {key}: {value}")
    return line


# --- command line -----------------------------------------------------------------------------------------

COMMANDS = dict(knn=run_knn, linear=run_linear, finetune=run_finetune,
                tokens=run_tokens, show=show, compare=compare)
CHOICES = {"protocol": ["fast", *PROTOCOLS], "recipe": list(RECIPES), "head": ["mlp", *MODELS]}
# Type -> flags -> help. A flag beats the recipe.
FLAGS = {
    bool: {
        "random-init": "untrained weights: the floor alone",
        "no-floor": "do not measure the untrained network as well",
        "fresh": "start over instead of going on from what is in --out"},
    str: {
        "protocol": "linear: many heads on stored features (default), or a paper's probe",
        "recipe": "finetune (default: the data's, else that of the run's objective)",
        "head": "tokens: the network (default mlp; MaPeT has mlp and vit_tiny)",
        "data": "as in train.py (default: what the run was trained on, else textures)",
        "classes": "file with the class folders to keep, one a line",
        "test-tokens": "tokens: of the test images, with a tokens.npy as RUN",
        "out": "folder of what is written (default: the run's; of compare: runs)",
        "device": "cuda, cpu (default: cuda if there is one)"},
    int: {
        "k": "knn: neighbors that vote (default 20)",
        "labelled": "finetune: use so many labelled images only, drawn by the seed",
        "heads": "attention heads of an encoder of unusual width",
        "image-size": "pixels a side (default: the encoder's)",
        "seed": "of weights, order and transforms (default 0)",
        "workers": "loading processes of each process (default: its share of the cores)",
        "batch-size": "images a step, over all processes",
        "micro-batch": "images at once on one process",
        "steps": "stop after so many optimizer steps of the schedule"},
    float: {
        "epochs": "passes over the training images; finetune --epochs 0 scores a file's network as it is",
        "lr": "peak learning rate, as used",
        "weight-decay": "on matrices only",
        "warmup-epochs": "linear warm-up",
        "layer-decay": "finetune: learning rate of a block, over that of the one above",
        "drop-path": "finetune, tokens: stochastic depth of the last block",
        "smoothing": "of the labels",
        "mixup": "finetune: alpha of MixUp; 0: neither MixUp nor CutMix",
        "erase": "finetune: probability of random erasing",
        "randaugment": "finetune: magnitude from 0 to 10"}}
MAY_BE_ZERO = {"seed", "workers", "weight_decay", "warmup_epochs", "layer_decay", "drop_path",
               "smoothing", "mixup", "erase", "randaugment"}


def parse(argv):
    parser = argparse.ArgumentParser(description="What an encoder has learned, by both papers' evaluations.")
    add = parser.add_argument
    texts = [f"{name}: {run.__doc__.splitlines()[0]}" for name, run in COMMANDS.items()]
    add("what", choices=COMMANDS, help="; ".join(texts))
    add("run", metavar="RUN", nargs="+",
        help="a run's folder, a timm, DINO, DeiT, MAE or MaPeT file, a public name")
    for kind, flags in FLAGS.items():
        for flag, text in flags.items():
            if kind is bool:
                add(f"--{flag}", action="store_true", help=text)
            else:
                add(f"--{flag}", type=kind, choices=CHOICES.get(flag), help=text)
    parser.set_defaults(k=20, seed=0, protocol="fast", head="mlp", log_every=50, save_every=500)
    args = parser.parse_args(argv)
    if args.what != "compare" and len(args.run) > 1:
        parser.error(f"{args.what} takes one RUN, not {len(args.run)}")
    zero = {"epochs"} if args.what == "finetune" else set()
    train.check_numbers(parser, args, MAY_BE_ZERO | zero)
    return args


def run(args):
    if args.what == "compare":
        return compare(args)
    started = time.time()
    args.run, = args.run
    args.device = train.setup(args.device)
    args.compile = args.device.type == "cuda" and args.what != "linear"
    open_run(args)
    if args.what == "show":
        return show(args)
    found = run_tokens(args) if args.what == "tokens" else measure(args)
    return report(args, time.time() - started, *found)


def main(argv=None):
    args = parse(argv)
    with exit_on_error("probe.py"):
        return run(args)


if __name__ == "__main__":
    main()
