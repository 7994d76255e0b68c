"""What was learned: every evaluation of the two papers, on an encoder f of ours or of anybody.

    k-NN           argmax_c  sum of exp(cos(f(x), f(x_i)) / 0.07) over the k nearest x_i of class c
    linear probe   softmax(W f(x) + b), f frozen
    fine-tuning    softmax(W LN(mean of the patches) + b), all of f trained, lower blocks more slowly
    tokens         softmax(W g(tokens) + b): no pixels at all (MaPeT Table 4)

python probe.py knn runs/mapet-textures         or finetune, or show: where [CLS] looks, what the patches share
python probe.py linear runs/mapet-textures      the best of a grid of heads on stored features: seconds
python probe.py linear RUN --protocol mae       or beit: the papers' probes, the encoder runs in every epoch
python probe.py tokens RUN --head mlp           or TOKENS.npy --test-tokens FILE
python probe.py compare runs/mim-* runs/pim-*   several runs: curves, mean and deviation over seeds, differences

RUN is a run's folder, an encoder.pt, a timm/DINO/DeiT/MAE file or a public name; --data another data set (MaPeT
Table 5). Beside each result is the floor, the same network untrained; probe.jsonl in the run's folder has them
all. Nothing is chosen on the test split. Every image counts once, with torchrun, too.

Read down to the ruled line: k-NN, linear probes, fine-tuning, tokens, recipes. To be skipped at first:
features of a data set, the training loop (two branches), the picture, commands.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import re
import time
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

import kmeans
import objectives
import train
from kmeans import (all_gather, all_reduce, barrier, catch_signals, derive_seed, identify, load_batches, make_loader,
                    print0, rank_and_world, setup, track)
from vit import (MODELS, ViT, draw_grid, drop_rates, exit_on_error, from_weights, normalize, patchify, principal_colors,
                 read_checkpoint, save, save_plots)


# --- k-NN -------------------------------------------------------------------------------------------------

@torch.inference_mode()
def knn(train_x, train_y, test_x, test_y, k=20, temperature=.07, chunk=None):
    """Top-1 accuracy (0..1) of weighted k-nearest neighbors under cosine similarity (Wu et al. 2018).

    x features (n, d), y labels (n,) int64. The processes share the test images; chunk of them at once
    (default: a similarity matrix of at most a gigabyte).
    """
    rank, world = rank_and_world()
    chunk = chunk or max(1, 2 ** 28 // len(train_x))
    classes = int(train_y.max()) + 1
    train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    correct = torch.zeros((), device=train_x.device, dtype=torch.float64)
    for x, y in zip(test_x[rank::world].split(chunk), test_y[rank::world].split(chunk)):
        similarity, nearest = (x @ train_x.T).topk(min(k, len(train_x)))             # (chunk, k), best first
        votes = torch.zeros(len(x), classes, device=x.device)
        votes.scatter_add_(1, train_y[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == y).sum()
    all_reduce(correct)
    return (correct / len(test_y)).item()


# --- linear probe: one head, and many at once on the same features ----------------------------------------

def pool_features(vit, images, final_norm=True):
    """images (b, 3, S, S), normalized -> (b, depth, s, d) float32, s: class token, if any, and patch mean.

    final_norm: the last block's are the encoder's output, after the final norm (not so in BEiT's probe).
    """
    out = []
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        x = vit.embed(images)
        for i, block in enumerate(vit.blocks):
            x = block(x)
            y = (vit.norm(x) if final_norm and i == vit.depth - 1 else x).float()
            mean = y[:, vit.prefix:].mean(1, keepdim=True)
            out.append(torch.cat([y[:, :vit.prefix], mean], 1))
    return torch.stack(out, 1)


def standardize(x, rows, moments):
    """x[rows], less the mean, over the standard deviation; x may be float16, elsewhere, in a file."""
    mean, std = moments
    return (x[rows.to(x.device)].to(mean) - mean) / std


class HeadGrid:
    """Linear heads for every (lr, weight decay) of `grid`, layer and pooling, trained on the same batches.

    Features x (b, l, s, d), see pool_features -> logits (b, l, h, c), h = grid x poolings. A pooling is a row of
    s zeros and ones, by which a head's weights are multiplied: ONE matrix product per layer does all.
    """

    def __init__(self, grid, layers, pools, d, classes, device="cpu"):
        self.pools = torch.tensor(pools, dtype=torch.float32, device=device)         # (pooling, s)
        zeros = lambda *shape: torch.zeros(*shape, device=device, requires_grad=True)
        self.weights = [zeros(layers, *self.pools.shape, d, classes) for _ in grid]
        self.biases = [zeros(layers, len(pools), classes) for _ in grid]
        self.optimizer = torch.optim.AdamW(
            [dict(params=[weight, bias], lr=lr, weight_decay=weight_decay)
             for weight, bias, (lr, weight_decay) in zip(self.weights, self.biases, grid)])

    def logits(self, x):
        weight = torch.stack(self.weights) * self.pools[..., None, None]
        weight = rearrange(weight, "g l p s d c -> l (s d) (g p c)")
        bias = rearrange(torch.stack(self.biases), "g l p c -> l 1 (g p c)")
        out = torch.baddbmm(bias, rearrange(x, "b l s d -> l b (s d)"), weight)
        return rearrange(out, "l b (h c) -> b l h c", c=self.biases[0].shape[-1])

    def fit(self, x, y, rows, moments, epochs, batch_size, seed):
        """x (n, l, s, d), y (n,); reads x[rows] only. Cosine to 0; an epoch's last, small batch is left out."""
        batch_size = min(batch_size, len(rows))
        per_epoch = len(rows) // batch_size
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs * per_epoch)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = rows[torch.randperm(len(rows), generator=generator)]
            for batch in order[:per_epoch * batch_size].split(batch_size):
                logits = self.logits(standardize(x, batch, moments))
                target = repeat(y[batch.to(y.device)], "b -> (b l g)", l=logits.shape[1], g=logits.shape[2])
                # The sum over the heads: no head's gradient knows of another.
                (F.cross_entropy(logits.flatten(0, 2), target, reduction="sum") / len(batch)).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                cosine.step()
        return self

    @torch.no_grad()
    def accuracy(self, x, y, rows, moments, chunk=1024):
        """(l, G) float64: the share of x[rows] that each head gets right."""
        logits = (self.logits(standardize(x, some, moments)) for some in rows.split(chunk))
        found = torch.cat([of_chunk.argmax(-1) for of_chunk in logits])
        return (found == y[rows.to(y.device)][:, None, None]).sum(0).double() / len(rows)


def linear(train_x, train_y, test_x, test_y, epochs=50, batch_size=1024, lr=1e-2, weight_decay=1e-4, seed=0):
    """Top-1 accuracy (0..1) of one linear layer on standardized features (n, d), labels (n,)."""
    d, classes = train_x.shape[1], int(train_y.max()) + 1
    as_is = torch.zeros(d, device=train_x.device), torch.ones(d, device=train_x.device)
    head = HeadGrid([(lr, weight_decay)], 1, [[1]], d, classes, train_x.device)
    head.fit(train_x[:, None, None], train_y, torch.arange(len(train_x)), as_is, epochs, batch_size, seed)
    return head.accuracy(test_x[:, None, None], test_y, torch.arange(len(test_x)), as_is).item()


# --- the papers' networks ---------------------------------------------------------------------------------

class Classifier(nn.Module):
    """Fine-tuning: mean of the patches -> a new norm (the encoder's own is dropped) -> linear layer.

    Images, or token ids (b, n), whose patch embedding is a table, -> (b, 1, c).
    """
    n_heads = 1

    def __init__(self, vit, classes, drop_path=0., head_std=.02):
        super().__init__()
        self.encoder, self.depth = vit.requires_grad_(True), vit.depth
        vit.norm = nn.Identity()
        for block, rate in zip(vit.blocks, drop_rates(drop_path, vit.depth)):
            block.drop = rate
        self.fc_norm = nn.LayerNorm(vit.width, eps=1e-6)
        self.head = nn.Linear(vit.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=head_std)
        nn.init.zeros_(self.head.bias)

    def embed(self, x):
        vit = self.encoder
        if x.is_floating_point():
            return vit.embed(x)
        x = vit.patch_embed(x) + vit.pos_embed[:, vit.prefix:]
        return torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)

    def forward(self, x, noise=None):
        x = self.encoder.encode(self.embed(x), noise=noise)[:, self.encoder.prefix:].mean(1)
        return self.head(self.fc_norm(x))[:, None]


class TokenMLP(nn.Module):
    """MaPeT Table 4: embedding -> linear -> ReLU -> mean over the positions -> linear: a bag of tokens.

    Token ids (b, n) -> (b, 1, c). The widths, ViT-T's 192 and four times that, are ours.
    """
    depth, n_heads = 0, 1

    def __init__(self, vocab_size, classes, width=192, hidden=768):
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)
        self.hidden, self.head = nn.Linear(width, hidden), nn.Linear(hidden, classes)

    def forward(self, x, noise=None):
        # What comes before the mean knows only the code: computed once for every code, not for every patch.
        codes = F.relu(self.hidden(self.table.weight)).float()
        return self.head(F.embedding_bag(x, codes, mode="mean"))[:, None]


def token_vit(name, vocab_size, n, classes, drop_path):
    """MaPeT Table 4's other head: the named ViT with a table of token vectors as its patch embedding."""
    vit = MODELS[name](image_size=math.isqrt(n), patch_size=1, pos="learned")
    vit.patch_embed = nn.Embedding(vocab_size, vit.width)
    nn.init.trunc_normal_(vit.patch_embed.weight, std=.02)
    return Classifier(vit, classes, drop_path)


# --- their optimizers and recipes -------------------------------------------------------------------------

def layer_groups(model, weight_decay, layer_decay):
    """Parameter groups: the learning rate is multiplied by scale = layer_decay ^ (L + 1 - layer) (BEiT, MAE).

    layer 0: class token, positions, patch embedding; i + 1: block i; L + 1: the rest. No weight decay on biases,
    norms, LayerScale, positions, class token.
    """
    groups = {}
    for name, p in model.named_parameters():
        first, *rest = name.removeprefix("encoder.").split(".")
        layer = 0 if name.startswith("encoder.") else model.depth + 1
        if first == "blocks":
            layer = int(rest[0]) + 1
        decays = p.ndim > 1 and first not in ("pos_embed", "cls_token")
        scale = layer_decay ** (model.depth + 1 - layer)
        new = dict(params=[], weight_decay=weight_decay if decays else 0., scale=scale)
        groups.setdefault((layer, decays), new)["params"].append(p)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """SGD with momentum, a matrix moves in proportion to its own norm (You et al. 2017, as in MAE's code).

        g = gradient + weight_decay p;  v <- momentum v + (trust |p| / |g|) g;  p <- p - lr v
        1-D:                            v <- momentum v + gradient;             p <- p - lr v
    """

    def __init__(self, params, lr=0., weight_decay=0., momentum=.9, trust=.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                if p.ndim > 1:
                    g = g + group["weight_decay"] * p
                    p_norm, g_norm = p.norm(), g.norm()
                    g = g * torch.where((p_norm > 0) & (g_norm > 0), group["trust"] * p_norm / g_norm, 1.)
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * v)


# An explicit flag beats the recipe. base_lr: per 256 images, lr = base_lr * batch / 256.
ADAMW = dict(optimizer="adamw", lr=None, base_lr=None, min_lr=0., warmup_lr=0., warmup_epochs=0., cosine="warmup",
             layer_decay=1., test_crop=.875, beta2=.999, smoothing=0., mixup=0., cutmix=0., drop_path=0.)
# Linear probes. mae: He et al. 2022, App. A.1, as in ClusterMIM. beit: MaPeT Sec. D; lr and decay are BEiT's.
PROTOCOLS = {"mae": dict(ADAMW, optimizer="lars", base_lr=.1, weight_decay=0., batch_size=16384, epochs=90.,
                         warmup_epochs=10.),
             "beit": dict(ADAMW, lr=4e-3, weight_decay=1e-4, batch_size=1024, epochs=50.)}
# Fine-tuning of ViT-B. mapet: Table 8; mae: App. A.1. RandAugment 9 is timm's m9 of 10.
STRONG = dict(ADAMW, batch_size=1024, weight_decay=.05, layer_decay=.65, epochs=100., min_lr=1e-6,
              smoothing=.1, mixup=.8, cutmix=1., drop_path=.1, erase=.25, randaugment=9., head_std=.02)
# Ours: the embedded data's class is an orientation and a period, so nothing may turn, flip or zoom it.
TEXTURES = dict(STRONG, lr=2e-3, layer_decay=1., epochs=10., batch_size=64, warmup_epochs=1., mixup=0.,
                cutmix=0., erase=0., randaugment=0., drop_path=0.)
RECIPES = {"mapet": dict(STRONG, lr=5e-4, warmup_epochs=20., warmup_lr=1e-6, cosine="start", test_crop=.9),
           "mae": dict(STRONG, base_lr=5e-4, warmup_epochs=5., head_std=2e-5),
           "textures": TEXTURES}
BY_WIDTH = {("mapet", 192): dict(lr=2.5e-4, epochs=300., layer_decay=1.),
            ("mapet", 384): dict(lr=5e-3, epochs=200.),
            ("mae", 1024): dict(base_lr=1e-3, epochs=50., layer_decay=.75, drop_path=.2)}


# ==========================================================================================================
# Machinery. The method ends here: what follows stores features, trains, draws a picture and takes commands.
# ==========================================================================================================

# --- features of a data set, and what is measured on them -------------------------------------------------

@torch.inference_mode()
def extract_layers(vit, ds, device, workers=0, batch_size=256, layers=slice(None), file=None):
    """`pool_features` of `ds`, (n, layers, 2, d), on every process: on the device, or in a shared `file`.

    Each process encodes every world-th image; the rows of the others are zeros until the sum.
    """
    rank, world = rank_and_world()
    vit, mine, features = vit.to(device).eval(), torch.arange(rank, len(ds), world), file
    if file is None:
        features = torch.zeros(len(ds), len(vit.blocks[layers]), 1 + vit.prefix, vit.width, device=device)
    batches = load_batches(ds, mine, batch_size, workers, device, "features")
    for rows, (images, _, _) in zip(mine.split(batch_size), batches):
        features[rows.to(features.device)] = pool_features(vit, normalize(images, ds))[:, layers].to(features)
    if file is None:
        all_reduce(features)
    barrier()
    return features


def compute_moments(x, rows, chunk=8192):
    """Mean and standard deviation of x[rows] by dimension; x (n, ...) may be larger than memory."""
    parts = (x[some.to(x.device)].double() for some in rows.split(chunk))
    mean, square = sum(torch.stack([part.sum(0), part.square().sum(0)]) for part in parts) / len(rows)
    return mean.float(), (square - mean ** 2).clamp_min(1e-12).sqrt().float()


def evaluate(vit, train_ds, test_ds, device, workers=0, seed=0, what=("knn", "linear"), k=20):
    """{"knn": ..., "linear": ...}: top-1 accuracies (0..1), all settings fixed; train.py's closing table.

    Of [class token, patch mean] after the final norm; the two differ in scale, so they are standardized.
    """
    train_x, test_x = (extract_layers(vit, ds, device, workers, layers=slice(-1, None)).flatten(1)
                       for ds in (train_ds, test_ds))
    train_y, test_y = (torch.as_tensor(ds.labels, device=device) for ds in (train_ds, test_ds))
    mean, std = compute_moments(train_x, torch.arange(len(train_x)))
    with torch.inference_mode():                                # as they were made; in place: 8 GB of ImageNet
        for x in (train_x, test_x):
            x.sub_(mean).div_(std)
    data = train_x, train_y, test_x, test_y
    return {name: knn(*data, k) if name == "knn" else linear(*data, seed=seed) for name in what}


# The grid of the fast linear probe: each pair, on each block and pooling (by the number of pooled tokens).
RATES, DECAYS = (3e-3, 1e-2, 3e-2, .1), (1e-4, .1)
POOLINGS = {2: {"class token": [1, 0], "patch mean": [0, 1], "both": [1, 1]}, 1: {"patch mean": [1]}}


def choose_head(x, y, test_x, test_y, rates=RATES, decays=DECAYS, epochs=50, batch_size=1024, seed=0):
    """The fast linear probe: a grid's best head on held-out training images, trained again on all. -> dict

    x, test_x (n, l, s, d) features, y, test_y (n,) labels; a tenth of the training images is held out.
    """
    n, layers, s, d = x.shape
    order = torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(seed, 1)))
    held, kept = order[:max(1, n // 10)], order[max(1, n // 10):]
    grid = list(itertools.product(rates, decays))
    names, pools = zip(*POOLINGS[s].items())

    def train_heads(grid, x, pools, rows):
        moments = [m.to(y.device) for m in compute_moments(x, rows)]
        heads = HeadGrid(grid, x.shape[1], pools, d, int(y.max()) + 1, y.device)
        return heads.fit(x, y, rows, moments, epochs, batch_size, seed), moments

    heads, moments = train_heads(grid, x, pools, kept)
    scores = heads.accuracy(x, y, held, moments)                               # (l, grid * pooling)
    layer, g = divmod(scores.argmax().item(), scores.shape[1])
    (lr, decay), pool = grid[g // len(pools)], g % len(pools)
    x, test_x = x[:, layer:layer + 1], test_x[:, layer:layer + 1]
    head, moments = train_heads([(lr, decay)], x, [pools[pool]], torch.arange(n))
    accuracy = head.accuracy(test_x, test_y, torch.arange(len(test_x)), moments).item()
    each = scores.view(layers, len(grid), len(pools))
    return dict(linear=accuracy, held_out=scores.max().item(), heads=scores.numel(),
                held_out_by_layer=each.amax((1, 2)).tolist(),
                held_out_by_pooling=dict(zip(names, each.amax((0, 1)).tolist())),
                chosen=dict(layer=layer + 1, pooling=names[pool], lr=lr, weight_decay=decay))


# --- what is trained on: pictures, transformed and mixed; tokens ------------------------------------------

def make_transform(ds, kind, recipe=None):
    """Transform of a picture: "test"; "linear", of the papers' linear probes; "finetune", by the recipe."""
    size, is_file, bicubic = ds.image_size, hasattr(ds, "names"), InterpolationMode.BICUBIC
    if kind == "test":                                              # 224 of 256; MaPeT's fine-tuning: of 248
        larger = int(size / (recipe.test_crop if recipe else .875))
        steps = [v2.Resize(larger, bicubic), v2.CenterCrop(size)] if is_file else [v2.Identity()]
    elif is_file:
        steps = [v2.RandomResizedCrop(size, (.08, 1), interpolation=bicubic), v2.RandomHorizontalFlip()]
    else:                                                           # textures: shifted, a twelfth of a side
        steps = [v2.RandomCrop(size, padding=size // 12, padding_mode="reflect")]
    if kind == "finetune":
        steps += [v2.ToPILImage()]                                  # whose rotations are the faster ones
        # timm's two operations, each with probability 1/2; its 9 of 10 is 27 of torchvision's 31. Its small
        # noise on the magnitude (mstd 0.5) is left out. Erased is by unit noise: after normalization.
        fill = [round(255 * m) for m in ds.mean]
        one = v2.RandAugment(1, round(3 * recipe.randaugment), 31, bicubic, fill)
        steps += [v2.RandomApply([one], .5)] * 2 if recipe.randaugment else []
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(ds.mean, ds.std),
                  v2.RandomErasing(recipe.erase, value="random")]
    return v2.Compose(steps)


def mix_images(x, y, classes, recipe, *seed):
    """MixUp or CutMix, by a coin, of a group of images; y (b,) becomes (b, c), shares of the classes."""
    alphas = (v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix)
    kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in alphas if alpha]
    return train.augment((x, y), v2.RandomChoice(kinds), *seed) if kinds else (x, y)


class Tokens(Dataset):
    """Token ids (n,) int64, label, index of each image: a data set without pictures."""
    mean = std = None

    def __init__(self, tokens, labels, name):
        self.tokens, self.labels, self.name = tokens, labels, name

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return torch.from_numpy(self.tokens[i].astype(np.int64)), int(self.labels[i]), i

    def note_unreadable(self, wanted, read):
        """Tokens cannot be damaged one by one."""


def prepare_inputs(x, ds, device):
    """To the device; uint8 images are normalized, floats are so already, tokens stay."""
    x = x.to(device, non_blocking=True)
    return normalize(x, ds) if x.dtype == torch.uint8 else x


# --- the training loop: heads on a frozen encoder, or a whole network -------------------------------------

class LinearProbe(nn.Module):
    """The papers' linear probes of a frozen encoder: images (b, 3, S, S), normalized -> logits (b, heads, c).

    mae   class token after the final norm -> BatchNorm without parameters -> linear layer (MAE, ClusterMIM)
    beit  [class token, patch mean] of every block -> a linear layer for each (BEiT, MaPeT)
    """
    depth = 0

    def __init__(self, vit, classes, protocol):
        super().__init__()
        self.frozen = (vit.eval(),)              # in a tuple, no part of this module: not trained, not saved
        self.mae = protocol == "mae"
        self.n_heads, d = (1, vit.width) if self.mae else (vit.depth, (1 + vit.prefix) * vit.width)
        self.norm = nn.BatchNorm1d(d, eps=1e-6, affine=False) if self.mae else nn.Identity()
        self.heads = nn.ModuleList(nn.Linear(d, classes) for _ in range(self.n_heads))
        for head in self.heads:
            nn.init.trunc_normal_(head.weight, std=.01)
            nn.init.zeros_(head.bias)

    @torch.no_grad()
    def encode(self, images):
        """Features (b, heads, d) float32."""
        x = pool_features(*self.frozen, images, final_norm=self.mae)
        return x[:, -1:, 0] if self.mae else x.flatten(2)

    def classify(self, x):
        return torch.stack([head(self.norm(x[:, i])) for i, head in enumerate(self.heads)], 1)

    def forward(self, images):
        return self.classify(self.encode(images))


def compute_loss(logits, y, smoothing):
    """Sum of the heads' cross-entropies: logits (b, heads, c), labels (b,) or class shares (b, c)."""
    return sum(F.cross_entropy(head, y, label_smoothing=smoothing) for head in logits.float().unbind(1))


def backward_heads(model, micro_batches, smoothing):
    """Gradients on a frozen encoder: every process trains the same heads on features of the whole batch."""
    parts = map(torch.cat, zip(*[(model.encode(x), y) for x, y in micro_batches]))
    features, labels = (all_gather(part, dim=0) for part in parts)          # the global batch in its order
    with torch.autocast(features.device.type, torch.bfloat16, enabled=features.is_cuda):
        logits = model.classify(features)
    compute_loss(logits, labels, smoothing).backward()


def backward_network(net, micro_batches, noises, smoothing):
    """Gradients of a whole network; processes exchange them with the last micro-batch.

    noises: (2 depth, b) for each micro-batch, uniform numbers that decide stochastic depth
    """
    for m, ((x, y), noise) in enumerate(zip(micro_batches, noises)):
        alone = isinstance(net, DistributedDataParallel) and m < len(noises) - 1
        with net.no_sync() if alone else contextlib.nullcontext():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                logits = net(x, noise)
            (compute_loss(logits, y, smoothing) / len(noises)).backward()


def load_micro_batches(ds, rows, batch, mine, micro, start, stop, recipe, args, classes):
    """This process's inputs, on the device, labels (b,) or class shares (b, c), of steps start..stop-1."""
    device, accumulate = args.torch_device, (mine.stop - mine.start) // micro
    keys = train.schedule(len(rows), batch, args.seed, start, stop, mine, accumulate)
    keys = ([(epoch, int(rows[i])) for epoch, i in some] for some in keys)
    # The papers mix within one GPU's share; here within 64ths of the batch: up to 64 processes do not matter.
    group = max(2, batch // 64)
    if (recipe.mixup or recipe.cutmix) and micro < batch and micro % group:
        raise ValueError(f"--micro-batch: {micro} images at once, but MixUp takes groups of {group}")
    for number, (x, y, wanted, read) in enumerate(make_loader(ds, keys, args.workers, device)):
        ds.note_unreadable(wanted, read)
        step, m = divmod(number, accumulate)
        groups = zip(prepare_inputs(x, ds, device).split(group), y.to(device, non_blocking=True).split(group))
        first = (mine.start + m * micro) // group
        mixed = [mix_images(*few, classes, recipe, args.seed, start + step, g) for g, few in enumerate(groups, first)]
        yield [torch.cat(column) for column in zip(*mixed)]


class Stopped(Exception):
    """A training ended early, by --steps or by a signal: there is no result."""


def fit(model, ds, rows, recipe, args, name, classes=None, **identity):
    """Train `model` on ds[(epoch, i)], i in rows; goes on from `name`, if of the same recipe and identity.

    As in train.py everything is a function of (seed, step) for the global batch. Raises Stopped.
    """
    (rank, world), device, step = rank_and_world(), args.torch_device, 0
    path, frozen = os.path.join(args.run, name), isinstance(model, LinearProbe)
    if recipe.batch_size % world:
        raise ValueError(f"--batch-size {recipe.batch_size} is not a multiple of {world} processes")
    batch = min(recipe.batch_size, len(rows))
    if batch % world:
        raise ValueError(f"{world} processes cannot share a batch of {batch}, all images there are: " +
                         (f"--batch-size {batch - batch % world}" if batch > world else "fewer processes"))
    share = batch // world                                              # of a global batch: this process's
    micro = math.gcd(share, args.micro_batch or (256 if frozen else share))              # images at once
    mine = slice(rank * share, (rank + 1) * share)
    per_epoch = len(rows) // batch
    steps, warmup = max(1, round(recipe.epochs * per_epoch)), round(recipe.warmup_epochs * per_epoch)
    stop_at = min(steps, args.steps or steps)
    peak = recipe.base_lr * batch / 256 if recipe.lr is None else recipe.lr

    settings = argparse.Namespace(**vars(recipe), **identity, seed=args.seed,
                                  images=f"{len(rows)} of {identify(ds.ds)}")
    model = model.to(device).train()
    groups = layer_groups(model, recipe.weight_decay, recipe.layer_decay)
    lars = recipe.optimizer == "lars"
    optimizer = LARS(groups) if lars else torch.optim.AdamW(groups, betas=(.9, recipe.beta2), fused=True)
    if os.path.exists(path) and not args.fresh:
        state = train.resume(path, settings)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    barrier()                                            # everybody has looked before anybody writes
    if step < stop_at:
        print0(f"{path}: {len(rows)} images, {steps} steps of {batch}, lr {peak:g}" +
               (f"; going on at step {step}" if step else ""))
    net = model if world == 1 or frozen else DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None)
    micro_batches = load_micro_batches(ds, rows, batch, mine, micro, step, stop_at, recipe, args, classes)
    if device.type == "cuda" and not frozen:
        model.compile()                                  # in place, so that parameter names stay
    generator = torch.Generator(device)
    with catch_signals() as ask_all:
        for step in track(range(step, stop_at), name, stop_at - step, "steps"):
            lr = train.learning_rate(step, steps, warmup, peak, recipe.warmup_lr, recipe.min_lr, recipe.cosine)
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * lr
            of_step = itertools.islice(micro_batches, share // micro)
            if frozen:
                backward_heads(model, of_step, recipe.smoothing)
            else:
                generator.manual_seed(derive_seed(args.seed, step))
                noise = torch.rand(2 * model.depth, batch, generator=generator, device=device)[:, mine]
                backward_network(net, of_step, noise.split(micro, dim=1), recipe.smoothing)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            stopping = ask_all() == 2
            if stopping or step == stop_at or step % max(200, per_epoch) == 0:
                if not nn.utils.parameters_to_vector(model.parameters()).isfinite().all():
                    raise ValueError(f"step {step}: weights are not finite; try a lower --lr ({peak:g})")
                if rank == 0:
                    save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                              args=vars(settings)), path)
            if stopping:
                break
    barrier()
    if step < steps:
        by_signal = step < stop_at
        why = "a signal; the same command goes on" if by_signal else "--steps; leave it out or raise it to go on"
        print0(f"{path}: stopped at step {step} of {steps} by {why}")
        raise Stopped
    return model.eval()


@torch.inference_mode()
def score(model, ds, args, batch_size=256):
    """(heads, 2) top-1 and top-5 accuracy over `ds`; every image counts once."""
    (rank, world), device = rank_and_world(), args.torch_device
    hits = torch.zeros(model.n_heads, 2, device=device, dtype=torch.float64)
    for x, y, _ in load_batches(ds, range(rank, len(ds), world), batch_size, args.workers, what="test"):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(prepare_inputs(x, ds, device))
        right = logits.topk(min(5, logits.shape[-1])).indices == y.to(device)[:, None, None]
        hits += torch.stack([right[..., 0].sum(0), right.any(-1).sum(0)], 1)
    all_reduce(hits)
    return hits / len(ds)


def checksum(vit):
    """Of the weights: by it a checkpoint knows the encoder that it was trained on."""
    return zlib.crc32(nn.utils.parameters_to_vector(vit.parameters()).detach().cpu().numpy())


# --- pictures; the table at the end of a run of train.py --------------------------------------------------

@torch.inference_mode()
def cls_attention(vit, images):
    """Where the class token (without one: the mean patch) looks in the last block, mean of heads: (b, n)."""
    x = vit.embed(images)
    for block in vit.blocks[:-1]:
        x = block(x)
    block = vit.blocks[-1]
    qkv = block.attn.qkv(block.norm1(x))
    q, k, _ = rearrange(qkv, "b q (three h d) -> three b h q d", three=3, h=block.attn.heads)
    attention = (einsum(q, k, "b h q d, b h s d -> b h q s") * q.shape[-1] ** -.5).softmax(-1).mean(1)
    return attention[:, 0, 1:] if vit.prefix else attention.mean(1)


@torch.inference_mode()
def show(args, vit, ds):
    """show.png: images, and below where the class token looks, and three principal components as colors."""
    vit, path = vit.to(args.torch_device).eval(), os.path.join(args.run, "show.png")
    spread = range(0, len(ds), max(1, len(ds) // args.images))[:args.images]
    pixels = torch.stack([ds[i][0] for i in spread]).to(args.torch_device)
    images = normalize(pixels, ds)
    enlarge = lambda x: F.interpolate(rearrange(x, "b (y x) c -> b c y x", y=vit.grid), pixels.shape[-2:])
    heat = cls_attention(vit, images)
    heat = repeat(heat / heat.amax(1, keepdim=True), "b n -> b n 3")
    colors, = principal_colors(vit(images)[:, vit.prefix:])
    if rank_and_world()[0] == 0:
        draw_grid([pixels / 255, enlarge(heat), enlarge(colors)], path, ("image", "attention", "features"))
    print0(f"{path}: image, attention of the class token, three principal components of the features")
    return dict(show=path)


def draw_predictions(args, model, ds, test, targets, device):
    """OUT/predictions.png: held-out images (or else training images), what was hidden, what was predicted."""
    held_out = ds if test is None else test
    few = range(0, len(held_out), math.ceil(len(held_out) / 8))
    images, _, read = next(load_batches(held_out, few, 8, 0, device))
    patch_pictures, path = None, os.path.join(args.out, "predictions.png")
    if model.needs == "tokens":          # a code is drawn as the mean of its patches: of pixels, the centroid
        few = load_batches(ds, range(0, len(ds), math.ceil(len(ds) / 500)), 64, args.workers, device)
        found = [(targets.of(pixels, index), patchify(pixels, args.patch_size)) for pixels, _, index in few]
        tokens, patches = (torch.cat(parts).flatten(0, 1) for parts in zip(*found))
        sums = torch.zeros(targets.size, patches.shape[1], device=device).index_add_(0, tokens, patches / 255)
        counts = tokens.bincount(minlength=targets.size)[:, None]
        patch_pictures = torch.where(counts > 0, sums / counts.clamp(min=1), .5)
    given = targets.of(images, read if held_out is ds else None)
    rows, labels = objectives.picture_predictions(
        model, images / 255, ds.mean, ds.std, given, patch_pictures, args.seed)
    draw_grid(rows, path, labels)
    print0(f"drawn in {path}: {'training' if held_out is ds else 'held-out'} images; rows {', '.join(labels)}")


def print_table(args, vit, step, steps, ds, test, device, started):
    """k-NN and linear probe of the trained and of the random encoder; the summary line of metrics.jsonl."""
    path = os.path.join(args.out, "metrics.jsonl")
    done = [line for line in train.read_metrics(path) if line.get("summary") and line["step"] == step]
    if not done:
        print0("k-NN and linear probe of the trained and of the random encoder")
        floor = train.build(args, 2).encoder.to(device)
        trained, random = (evaluate(net, ds, test, device, args.workers, args.seed) for net in (vit, floor))
        done = [dict(summary=True, step=step, linear=trained["linear"], linear_random=random["linear"],
                     knn=trained["knn"], knn_random=random["knn"], seconds=round(time.time() - started, 1),
                     objective=args.objective, seed=args.seed, tokens=args.tokens, data=args.data, steps=steps)]
        train.append_metrics(path, **done[-1])
    print0(f"\n{'':<18}{'k-NN':>8}{'linear probe':>15}   top-1 % on {test.name}, {len(test)} images")
    for name, suffix in (("random encoder", "_random"), ("trained encoder", "")):
        print0(f"{name:<18}{100 * done[-1]['knn' + suffix]:>8.1f}{100 * done[-1]['linear' + suffix]:>15.1f}")


# --- runs side by side -------------------------------------------------------------------------------------

def paired_test(a, b):
    """Student's t-test for pairs (two or more): how likely is so large a mean difference by chance alone."""
    d = np.subtract(a, b)
    if not d.any():
        return 1.
    with np.errstate(divide="ignore"):
        t = abs(d.mean()) / (d.std(ddof=1) / math.sqrt(len(d)))
    # Student's density with len(d) - 1 degrees of freedom, by the angle: t = tan(angle) sqrt(len(d) - 1).
    angle = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (len(d) - 2)
    return density[angle >= math.atan(t / math.sqrt(len(d) - 1))].sum() / density.sum()


def compare(args):
    """compare.png: the curves of runs. Printed: accuracies, mean and deviation over seeds, and differences.

    Runs whose folders differ only in their seed at the end (runs/mim-0, runs/mim-1; runs/mim-textures and
    runs/mim-textures-seed1) are one group. All others are compared with the first group. Unfinished runs have
    a curve only.
    """
    groups, results = {}, {}
    for folder in dict.fromkeys(map(os.path.normpath, args.encoder)):  # once, however often it is named
        lines = train.read_metrics(os.path.join(folder, "metrics.jsonl"))
        if not lines:
            raise ValueError(f"{folder}: no metrics.jsonl of train.py in it")
        end, why = train.read_summary(folder)
        name = re.sub(rf"-(seed)?{end['seed'] if end else '[0-9]+'}$", "", folder)
        groups.setdefault(name, []).append(lines)
        if why:
            print(f"{folder}: a curve only, {why}")
            continue
        if end["seed"] in results.setdefault(name, {}):
            raise ValueError(f"{folder}: another run of {name} has seed {end['seed']}, too: rename one")
        results[name][end["seed"]] = [100 * end["knn"], 100 * end["linear"]]
    # Groups are named by the end of their folders' names, where that tells them apart.
    ends = [os.path.basename(name) for name in groups]
    label = lambda name: os.path.basename(name) if ends.count(os.path.basename(name)) == 1 else name
    groups, results = ({label(name): group for name, group in kind.items()} for kind in (groups, results))
    path = os.path.join(args.out or "runs", "compare.png")
    save_plots(train.plot_metrics(groups), path)
    columns = max(map(len, groups)) + 2
    print(f"{'':{columns}}{'seeds':>6}{'k-NN':>14}{'linear probe':>15}   top-1 %, mean and standard deviation")
    for name in groups:
        values = np.array(list(results.get(name, {}).values()))
        words = [f"{mean:.1f}" + (f" ± {deviation:.1f}" if len(values) > 1 else "") for mean, deviation in
                 zip(values.mean(0), values.std(0, ddof=min(1, len(values) - 1)))] if len(values) else ["-", "-"]
        print(f"{name:{columns}}{len(values):>6}{words[0]:>14}{words[1]:>15}")
    first, *others = results or [None]
    if others:
        print(f"minus {first}, seed by seed; p of a paired t-test: below 0.05, chance alone is unlikely")
    for name in others:
        seeds = sorted(results[first].keys() & results[name].keys())
        if len(seeds) < 2:
            print(f"{name:{columns}}{len(seeds):>6}   too few seeds that both have")
            continue
        a, b = (np.array([results[group][seed] for seed in seeds]).T for group in (name, first))
        words = [f"{x.mean() - y.mean():+.1f} (p {paired_test(x, y):.3f})" for x, y in zip(a, b)]
        print(f"{name:{columns}}{len(seeds):>6}{words[0]:>18}{words[1]:>18}")
    print(f"drawn in {path}")
    return results


# --- commands: what the arguments name, one function for each, the command line ----------------------------

def read_settings(path):
    """(folder of the run's file or folder `path`, its settings as a dict, empty if it is none of ours)."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    last = os.path.join(folder, "last.pt")
    settings = read_checkpoint(last).get("args") if os.path.exists(last) else None
    return folder, settings if isinstance(settings, dict) and "objective" in settings else {}


def open_encoder(args):
    """(the encoder that is named, the same untrained, settings of its run); sets args.run, for results."""
    name, settings = os.path.basename(args.encoder), {}
    args.run = os.path.join("runs", os.path.splitext(name)[0])
    if os.path.isdir(args.encoder) or name in ("encoder.pt", "last.pt"):
        args.run, settings = read_settings(args.encoder)
    args.run = args.out or args.run
    vit = from_weights(args.encoder, args.image_size)
    heads, hidden = vit.blocks[0].attn.heads, vit.blocks[0].mlp.fc1.out_features
    torch.manual_seed(args.seed)
    floor = ViT(vit.image_size, vit.patch_size, vit.width, vit.depth, heads, hidden / vit.width,
                settings.get("layer_scale", .1) if vit.layer_scale else None, cls_token=bool(vit.prefix),
                pos=settings.get("pos", "learned"), init=settings.get("init", "timm"))
    return floor if args.random_init else vit, floor, settings


def open_data(args, image_size, settings):
    """(training, test) data set with labels: --data, or what the run was trained on; makes args.run."""
    args.data = args.data or settings.get("data", "textures")
    train_ds, test_ds = train.open_splits(args.data, image_size, args.classes or settings.get("classes"))
    if test_ds is None:
        raise ValueError(f"--data {args.data}: a probe needs labels, in train/CLASS/ and in val/CLASS/")
    os.makedirs(args.run, exist_ok=True)
    return train_ds, test_ds


def open_tokens(args):
    """(training, test) `Tokens` and codebook size, of a run's folder, a tokenizer.pt or a tokens.npy."""
    folder, settings = read_settings(args.encoder)
    path = os.path.join(folder, "tokenizer.pt") if os.path.isdir(args.encoder) else args.encoder
    args.run = args.out or folder
    if path.endswith(".npy") != bool(args.test_tokens):
        raise ValueError(f"{path}: --test-tokens, of the test images, goes with a tokens.npy, only with one")
    if args.test_tokens:
        splits = open_data(args, args.image_size or settings.get("image_size"), settings)
        tokens = [kmeans.load_tokens(file) for file in (path, args.test_tokens)]
        vocab_size = 1 + max(int(some.max()) for some in tokens)
    else:
        tokenizer = kmeans.load_tokenizer(path).to(args.torch_device)
        splits, vocab_size = open_data(args, tokenizer.input_size, settings), tokenizer.vocab_size
        data = os.path.basename(os.path.normpath(args.data))
        own = args.data == settings.get("data")
        names = "tokens.npy" if own else f"tokens-{data}.npy", f"tokens-{data}-test.npy"
        tokens = [kmeans.tokenize(tokenizer, ds, os.path.join(args.run, name), device=args.torch_device,
                                  workers=args.workers) for name, ds in zip(names, splits)]
    for file, some, ds in zip((path, args.test_tokens), tokens, splits):
        if some.shape != (len(ds), tokens[0].shape[1]):
            raise ValueError(f"{file}: tokens of {some.shape[0]} images x {some.shape[1]} patches, not the "
                             f"{len(ds)} images of {ds.name} x {tokens[0].shape[1]}")
    return *(Tokens(some, ds.labels, ds.name) for some, ds in zip(tokens, splits)), vocab_size


def apply_flags(recipe, args):
    """The recipe with what the command line says otherwise."""
    given = {key: value for key, value in vars(args).items() if key in recipe and value is not None}
    for key, value in given.items():
        if isinstance(value, list) and len(value) > 1:
            raise ValueError(f"--{key.replace('_', '-')}: several at once go with --protocol fast only")
        given[key] = value[0] if isinstance(value, list) else value
    if "epochs" in given:                                   # a shorter run keeps the share of the warm-up
        share = min(1, given["epochs"] / recipe["epochs"])
        recipe = {**recipe, "warmup_epochs": recipe["warmup_epochs"] * share}
    train.check_shares(args, "smoothing erase", "drop_path")
    if given.get("randaugment", 0) > 10:
        raise ValueError(f"--randaugment {given['randaugment']:g}: a magnitude from 0 to 10")
    return argparse.Namespace(**{**recipe, **given})


def run_knn(args, vit, train_ds, test_ds, suffix):
    return evaluate(vit, train_ds, test_ds, args.torch_device, args.workers, what=("knn",), k=args.k)


def run_fast(args, vit, train_ds, test_ds, suffix):
    """The fast linear probe. Beyond --memory, features are in a file: float16, shared, removed at the end."""
    device, shape = args.torch_device, (len(train_ds), vit.depth, 1 + vit.prefix, vit.width)
    path, file, rank = os.path.join(args.run, "features.npy"), None, rank_and_world()[0]
    y, test_y = (torch.as_tensor(ds.labels, device=device) for ds in (train_ds, test_ds))
    try:
        if 4 * math.prod(shape) > args.memory * 2 ** 30:
            if rank == 0:
                row = np.zeros(shape[1:], np.float16)  # all of it: a map of a file with holes dies
                kmeans.write_rows(path, shape, itertools.repeat(row, shape[0]))        # on a full disk
            barrier()
            file = torch.from_numpy(np.load(path, mmap_mode="r+"))
        x = extract_layers(vit, train_ds, device, args.workers, file=file)
        test_x = extract_layers(vit, test_ds, device, args.workers)
        return choose_head(x, y, test_x, test_y, args.lr or RATES, args.weight_decay or DECAYS,
                           round(args.epochs or 30), args.batch_size or 1024, args.seed)
    finally:
        if rank == 0 and os.path.exists(path):
            os.remove(path)


def run_protocol(args, vit, train_ds, test_ds, suffix):
    """The papers' linear probes: the encoder runs anew on a random view of every image in every epoch."""
    recipe, mae = apply_flags(PROTOCOLS[args.protocol], args), args.protocol == "mae"
    if mae and not vit.prefix:
        raise ValueError("--protocol mae reads the class token, this encoder has none: take --protocol beit")
    torch.manual_seed(args.seed)
    model = LinearProbe(vit.to(args.torch_device), 1 + int(train_ds.labels.max()), args.protocol)
    views = train.Augmented(train_ds, make_transform(train_ds, "linear"), args.seed)
    model = fit(model, views, range(len(train_ds)), recipe, args, f"linear-{args.protocol}{suffix}.pt",
                data=args.data, weights=checksum(vit))
    top1 = score(model, train.with_transform(test_ds, make_transform(test_ds, "test")), args)[:, 0].tolist()
    # BEiT prints the best block on the test images; the last block's is the number that nobody chose.
    return dict(linear=top1[-1], **({} if mae else dict(best_layer=max(top1), by_layer=top1)))


def run_finetune(args, vit, train_ds, test_ds, suffix):
    order = torch.randperm(len(train_ds), generator=torch.Generator().manual_seed(args.seed))
    rows = order[:args.labelled].tolist()
    paper = "mae" if args.objective in ("mae", "maskfeat", "clustermim") else "mapet"
    kind = args.recipe or ("textures" if args.data == "textures" else paper)
    recipe = apply_flags({**RECIPES[kind], **BY_WIDTH.get((kind, vit.width), {})}, args)
    classes, weights = 1 + int(train_ds.labels.max()), checksum(vit)
    torch.manual_seed(args.seed)
    model = Classifier(vit, classes, recipe.drop_path, recipe.head_std)
    views = train.Augmented(train_ds, make_transform(train_ds, "finetune", recipe), args.seed)
    model = fit(model, views, rows, recipe, args, f"finetune{suffix}.pt", classes, data=args.data, weights=weights)
    seen = train.with_transform(test_ds, make_transform(test_ds, "test", recipe))
    top1, top5 = score(model, seen, args)[0].tolist()
    return dict(finetune=top1, top5=top5, recipe=kind, labelled=len(rows))


# Ours: MaPeT gives no recipe for its Table 4. The second is for textures, on two CPU cores.
TOKENS = dict(ADAMW, lr=1e-3, weight_decay=.05, batch_size=1024, epochs=100., warmup_epochs=5., smoothing=.1,
              drop_path=.1)
SMALL_TOKENS = dict(TOKENS, batch_size=128, epochs=20., warmup_epochs=1.)


def run_tokens(args):
    """MaPeT Table 4. No floor but chance, the most frequent class: there is no encoder."""
    train_ds, test_ds, vocab_size = open_tokens(args)
    recipe = apply_flags(SMALL_TOKENS if args.data == "textures" else TOKENS, args)
    counts, n = np.bincount(train_ds.labels), train_ds.tokens.shape[1]
    torch.manual_seed(args.seed)
    model = TokenMLP(vocab_size, len(counts)) if args.head == "mlp" else token_vit(
        args.head, vocab_size, n, len(counts), recipe.drop_path)
    model = fit(model, train.Augmented(train_ds, None), range(len(train_ds)), recipe, args,
                f"tokens-{args.head}.pt", data=args.data, head=args.head, digest=zlib.crc32(train_ds.tokens))
    top1, top5 = score(model, test_ds, args)[0].tolist()
    floor = dict(tokens=counts.max() / len(train_ds))
    return dict(tokens=top1, top5=top5, head=args.head, vocab_size=vocab_size), test_ds, floor


COMMANDS = dict(knn=run_knn, fast=run_fast, mae=run_protocol, beit=run_protocol, finetune=run_finetune)


def measure(args):
    """The result of one command as a dict, printed and appended to probe.jsonl; None if it was stopped."""
    if args.what == "compare":
        return compare(args)
    (rank, _, args.torch_device), started = setup(args.device), time.time()
    source, floor = args.encoder, None
    if args.what == "tokens":
        result, test_ds, floor = run_tokens(args)
    else:
        vit, untrained, settings = open_encoder(args)
        args.objective = settings.get("objective")
        train_ds, test_ds = open_data(args, vit.image_size, settings)
        if args.what == "show":
            return show(args, vit, test_ds)
        run = COMMANDS[args.protocol if args.what == "linear" else args.what]
        result = run(args, vit, train_ds, test_ds, "")
        if args.random_init:
            source = f"random init of {source}"
        elif not args.no_floor:
            floor = run(args, untrained, train_ds, test_ds, "-floor")
    line = dict(what=args.what, source=source, data=args.data, seed=args.seed, **result,
                tested_on=f"{test_ds.name}, {len(test_ds)} images", floor=floor,
                seconds=round(time.time() - started, 1))
    if rank == 0:
        report(args, line)
        with open(os.path.join(args.run, "probe.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")
    return line


def report(args, line):
    """Print a result, accuracies in percent."""
    percent = lambda values: ", ".join(f"{100 * value:.1f} %" for value in np.atleast_1d(values))
    name = args.what if args.what != "linear" else f"linear ({args.protocol})"
    floor = f"   (floor {percent(line['floor'][args.what])})" if line["floor"] else ""
    print(f"{name} {percent(line[args.what])}{floor}   {line['source']}, {line['tested_on']}")
    for key in ("top5", "best_layer", "by_layer", "held_out", "held_out_by_layer"):
        if key in line:
            print(f"    {key}: {percent(line[key])}")
    if "chosen" in line:
        by_pooling = (f"{name} {percent(value)}" for name, value in line["held_out_by_pooling"].items())
        print(f"    held_out_by_pooling: {', '.join(by_pooling)}")
        print(f"    best of {line['heads']} heads: {line['chosen']}")


HELP = {"knn": "weighted k-nearest neighbors on frozen features", "linear": "a linear layer on frozen features",
        "finetune": "train the whole network on labels", "tokens": "classify from the tokens alone",
        "show": "draw the attention of the class token, and the features",
        "compare": "curves of several runs in one picture; their accuracies, mean and deviation over seeds"}
ALL, TRAINING = ("knn", "linear", "finetune", "tokens", "show"), ("linear", "finetune", "tokens")
# Flag: the commands that have it, type or choices (None: a switch), default, help. A flag beats the recipe.
FLAGS = {
    "random-init": (("knn", "linear", "finetune", "show"), None, False, "untrained weights: the floor alone"),
    "no-floor": (("knn", "linear", "finetune"), None, False, "do not measure the untrained network as well"),
    "k": (("knn",), int, 20, "neighbors that vote"),
    "protocol": (("linear",), ["fast", *PROTOCOLS], "fast", "fast: a grid on stored features; or the papers'"),
    "memory": (("linear",), float, 8, "GB; features of fast beyond go into a file"),
    "recipe": (("finetune",), list(RECIPES), None, "default: the data's, else that of the run's objective"),
    "labelled": (("finetune",), int, None, "use so many labelled images only, drawn by the seed"),
    "head": (("tokens",), ["mlp", *MODELS], "mlp", "MaPeT has mlp and vit_tiny"),
    "test-tokens": (("tokens",), str, None, "of the test images, with a tokens.npy as RUN"),
    "images": (("show",), int, 6, "columns of the picture"),
    "data": (ALL, str, None, "as in train.py (default: what the run was trained on, else textures)"),
    "classes": (ALL, str, None, "file with the class folders to keep, one a line"),
    "image-size": (ALL, int, None, "pixels a side (default: the encoder's)"),
    "out": ((*ALL, "compare"), str, None, "folder of what is written (default: the run's; of compare: runs)"),
    "seed": (ALL, int, 0, "of weights, order and transforms"),
    "workers": (ALL, int, 0, "loading processes per GPU"),
    "device": (ALL, str, None, "cuda, cpu (default: cuda if there is one)"),
    "epochs": (TRAINING, float, None, "passes over the training images"),
    "batch-size": (TRAINING, int, None, "images a step, over all processes"),
    "lr": (TRAINING, float, None, "peak learning rate, as used; one or several for linear's fast"),
    "weight-decay": (TRAINING, float, None, "on matrices only; one or several for linear's fast"),
    "warmup-epochs": (TRAINING, float, None, "linear warm-up"),
    "drop-path": (TRAINING, float, None, "stochastic depth of the last block"),
    "smoothing": (TRAINING, float, None, "of the labels"),
    "layer-decay": (("finetune",), float, None, "learning rate of a block, over that of the one above"),
    "mixup": (("finetune",), float, None, "its alpha, 0 = off"),
    "cutmix": (("finetune",), float, None, "its alpha, 0 = off"),
    "erase": (("finetune",), float, None, "probability of random erasing"),
    "randaugment": (("finetune",), float, None, "magnitude (timm: of 10), 0 = off"),
    "fresh": (TRAINING, None, False, "start over instead of going on from what is in --out"),
    "steps": (TRAINING, int, None, "stop after so many optimizer steps of the schedule"),
    "micro-batch": (TRAINING, int, None, "images at once on one process"),
}
MAY_BE_ZERO = set("seed workers weight_decay warmup_epochs drop_path smoothing layer_decay mixup cutmix erase "
                  "randaugment".split())


def parse(argv):
    parser = argparse.ArgumentParser(description="What an encoder has learned, by both papers' evaluations.")
    commands = parser.add_subparsers(dest="what", required=True)
    for what, text in HELP.items():
        add = commands.add_parser(what, help=text, description=text).add_argument
        add("encoder", metavar="RUN", nargs="+" if what == "compare" else None, help="a run's folder, " + (
            "a tokenizer.pt or a tokens.npy" if what == "tokens" else "or several" if what == "compare" else
            "an encoder.pt, a timm/DINO/DeiT/MAE file or a public name"))
        for flag, (where, kind, default, text) in FLAGS.items():
            options = {"choices" if isinstance(kind, list) else "type": kind, "default": default}
            if what == "linear" and flag in ("lr", "weight-decay"):
                options["nargs"] = "+"
            if what in where:
                add(f"--{flag}", help=text + (f" (default {default})" if default else ""),
                    **(options if kind else dict(action="store_true")))
    args = parser.parse_args(argv)
    train.check_numbers(parser, args, MAY_BE_ZERO)
    return args


def main(argv=None):
    args = parse(argv)
    with exit_on_error("probe.py"), contextlib.suppress(Stopped):
        return measure(args)


if __name__ == "__main__":
    main()
