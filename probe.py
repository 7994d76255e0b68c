"""What was learned: every evaluation of the two papers, on an encoder of ours or of anybody.

python probe.py knn runs/mapet-textures         k-NN (Wu et al. 2018): cosine, votes weighted by exp(similarity / 0.07)
python probe.py linear runs/mapet-textures      a grid of linear heads at once on stored features: seconds
python probe.py linear RUN --protocol mae       or beit: the papers' linear probes, the encoder runs in every epoch
python probe.py linear RUN --data stanford_cars transfer to another domain (MaPeT Table 5)
python probe.py finetune RUN                    the whole network, by the papers' recipes (METHODS 1.8, 4.5)
python probe.py tokens RUN --head mlp           no pixels, only the tokens (MaPeT Table 4)
python probe.py show RUN                        a picture: where [CLS] looks, what the patches have in common

RUN is a run's folder, an encoder.pt, a timm/DINO/DeiT/MAE file or a public name. The same network untrained, the floor,
is printed beside every result (not with --no-floor); results are JSON lines in probe.jsonl in the run's folder.
Nothing is chosen on the test split. A frozen encoder is only read: its weights and buffers are hashed before and after.
Every image is counted once, however many processes share the work: torchrun --nproc_per_node 8 probe.py ...
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import kmeans
import train
import objectives
from kmeans import barrier, load_batches, make_loader, print0, rank_and_world
from vit import MODELS, ViT, draw_grid, exit_on_error, from_weights, patchify, principal_colors, read_checkpoint, save

# --- recipes: an explicit flag beats the recipe ---------------------------------------------------------------------

# The papers' linear probes. mae: METHODS 4.5, ClusterMIM's. beit: METHODS 1.8, MaPeT's; its digits are BEiT's example.
# blr is the learning rate per 256 images.
ADAMW = dict(optimizer="adamw", lr=None, blr=None, min_lr=0., warmup_lr=0., warmup_epochs=0., layer_decay=1.,
             beta2=.999, smoothing=0., mixup=0., cutmix=0., drop_path=0.)
PROTOCOLS = {"mae": dict(ADAMW, optimizer="lars", blr=.1, weight_decay=0., batch_size=16384, epochs=90.,
                         warmup_epochs=10.),
             "beit": dict(ADAMW, lr=4e-3, weight_decay=1e-4, batch_size=1024, epochs=50.)}
# Fine-tuning. mapet: Table 8 (METHODS 1.8), for ViT-B; mae: METHODS 4.5, ClusterMIM's. RandAugment 9 is timm's m9: nine
# tenths of the strongest, which torchvision calls 27 of 31, not 9.
STRONG = dict(ADAMW, batch_size=1024, weight_decay=.05, layer_decay=.65, epochs=100., min_lr=1e-6, smoothing=.1,
              mixup=.8, cutmix=1., drop_path=.1, erase=.25, randaugment=9., head_std=.02)
# Ours, for the embedded data: its class is an orientation and a period, so nothing may turn, flip or zoom the picture.
# Chosen on the third stream with 500 labelled images, where an untrained network does (nearly) best with it, too.
TEXTURES = dict(STRONG, lr=2e-3, layer_decay=1., epochs=10., batch_size=64, warmup_epochs=1., mixup=0., cutmix=0.,
                erase=0., randaugment=0., drop_path=0.)
RECIPES = {"mapet": dict(STRONG, lr=5e-4, warmup_epochs=20., warmup_lr=1e-6),
           "mae": dict(STRONG, blr=5e-4, warmup_epochs=5., head_std=2e-5),
           "textures": TEXTURES}
BY_WIDTH = {("mapet", 192): dict(lr=2.5e-4, epochs=300., layer_decay=1.), ("mapet", 384): dict(lr=5e-3, epochs=200.),
            ("mae", 1024): dict(blr=1e-3, epochs=50., layer_decay=.75, drop_path=.2)}
# Ours: MaPeT gives no recipe for its Table 4 (METHODS 9).
TOKENS = dict(ADAMW, lr=1e-3, weight_decay=.05, batch_size=1024, epochs=100., warmup_epochs=5., smoothing=.1,
              drop_path=.1)
SMALL_TOKENS = dict(batch_size=128, epochs=20., warmup_epochs=1.)                # textures, on two CPU cores

# The grid of the fast linear probe: every pair, on every block and pooling.
RATES, DECAYS = (3e-3, 1e-2, 3e-2, .1), (1e-4, .1)
POOLINGS = {2: ("class token", "patch mean", "both"), 1: ("patch mean",)}        # by the number of pooled tokens


# --- pictures -----------------------------------------------------------------------------------------------------

class SingleDraw(v2.RandomResizedCrop):
    """MAE's crop for linear probes, as TensorFlow's: area and shape drawn once, clipped to the picture."""

    def make_params(self, flat_inputs):
        height, width = v2.functional.get_size(flat_inputs[0])
        area = height * width * float(torch.empty(1).uniform_(*self.scale))
        shape = math.exp(float(torch.empty(1).uniform_(*map(math.log, self.ratio))))
        w, h = min(width, round(math.sqrt(area * shape))), min(height, round(math.sqrt(area / shape)))
        top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
        return dict(top=top, left=left, height=h, width=w)


def augmentation(ds, kind, recipe=None):
    """The transform of one picture: "test"; "mae", "beit" or "fast", of linear probes; "finetune", by the recipe."""
    size, files, bicubic = ds.image_size, hasattr(ds, "names"), InterpolationMode.BICUBIC
    if kind == "test":                                              # the papers': 224 of 256
        steps = [v2.Resize(size * 256 // 224, bicubic), v2.CenterCrop(size)] if files else []
    elif files:
        steps = [(SingleDraw if kind == "mae" else v2.RandomResizedCrop)(size, (.08, 1), interpolation=bicubic),
                 v2.RandomHorizontalFlip()]
    else:                                                           # textures: shifted by up to a twelfth of a side
        steps = [v2.RandomCrop(size, padding=size // 12, padding_mode="reflect")]
    if kind == "finetune":
        # timm's two operations, each with probability 1/2. Its small noise on the magnitude (mstd 0.5) is left out.
        one = v2.RandAugment(1, round(3 * recipe.randaugment), 31, bicubic, [round(255 * m) for m in ds.mean])
        steps += [v2.RandomApply([one], .5)] * 2 if recipe.randaugment else []
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(ds.mean, ds.std),
                  v2.RandomErasing(recipe.erase, value="random")]   # noise of unit variance: after normalisation
    return v2.Compose([*steps, v2.PILToTensor()])


# --- features -----------------------------------------------------------------------------------------------------

def fingerprint(module):
    """sha256 of all parameters and buffers of a module: equal before and after means that nothing was changed."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def frozen(vit):
    """The encoder in eval mode; RuntimeError if anything in it changes meanwhile."""
    before = fingerprint(vit.eval())
    yield vit
    if fingerprint(vit) != before:
        raise RuntimeError("the frozen encoder was changed")


def pool_features(vit, images, final_norm=True):
    """images (b, 3, S, S), normalised -> (b, layers, 2, d) float32: class token, mean of patches after each block.

    final_norm  the last block's are the encoder's output, after the final norm (else its own, as in BEiT's probe)
    Without a class token there is one pooled token: (b, layers, 1, d).
    """
    x, out = vit.embed(images), []
    for i, block in enumerate(vit.blocks):
        x = block(x)
        y = (vit.norm(x) if final_norm and i == vit.depth - 1 else x).float()
        out.append(torch.cat([y[:, :vit.prefix], y[:, vit.prefix:].mean(1, keepdim=True)], 1))
    return torch.stack(out, 1)


@torch.inference_mode()
def extract_layers(vit, ds, device, workers=0, batch_size=256, layers=slice(None), out=None, shared=False):
    """Features (n, layers, 2, d) of `ds` (see `pooled`), float32 on the device; the same on every process.

    out  zeros to put them in, of this shape; shared: memory that all processes write to, such as a memory map
    Each process encodes every world-th image; the others' rows are zero until the sum over the processes.
    """
    rank, world = rank_and_world()
    vit, mine, done = vit.to(device), range(rank, len(ds), world), 0
    shape = len(ds), len(vit.blocks[layers]), 1 + vit.prefix, vit.width
    features = torch.zeros(shape, device=device) if out is None else out
    bar = tqdm(total=len(mine), unit="image", desc=ds.name, leave=False, disable=rank != 0 or not sys.stderr.isatty())
    with frozen(vit), bar:
        for images, _, _ in load_batches(ds, mine, batch_size, workers, device):
            rows = mine[done:done + len(images)]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                x = pool_features(vit, train.normalize(images, ds))[:, layers]
            features[rows.start:rows.stop:world] = x.to(features)
            done += len(images)
            bar.update(len(images))
    if world > 1 and not shared:
        dist.all_reduce(features)
    barrier()
    return features


def extract(vit, ds, device, workers=0, batch_size=256):
    """Features (n, 2 d) float32, [class token, mean of patches] after the final norm, and labels (n,) int64 of `ds`."""
    features = extract_layers(vit, ds, device, workers, batch_size, slice(-1, None))
    return features.flatten(1), torch.as_tensor(ds.labels, device=device)


def compute_moments(x, rows, chunk=8192):
    """Mean and standard deviation of x[rows], by dimension, in chunks: x (n, ...) may be larger than memory."""
    parts = (x[r.to(x.device)].double() for r in rows.split(chunk))
    mean, square = sum(torch.stack([part.sum(0), part.square().sum(0)]) for part in parts) / len(rows)
    return mean.float(), (square - mean ** 2).clamp_min(1e-12).sqrt().float()


# --- k-NN ---------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def knn(train_x, train_y, test_x, test_y, k=20, temperature=.07, chunk=None):
    """Top-1 accuracy of weighted k-nearest neighbours under cosine similarity; features (n, d), labels (n,).

    k      a number -> accuracy; a list of them -> {k: accuracy}
    chunk  test images at once (default: a similarity matrix of at most a gigabyte); the processes share the test images
    """
    rank, world = rank_and_world()
    ks = [min(int(one), len(train_x)) for one in (k if isinstance(k, (list, tuple)) else [k])]
    chunk, classes = chunk or max(1, 2 ** 28 // len(train_x)), int(train_y.max()) + 1
    bank, mine = F.normalize(train_x, dim=1), slice(rank, None, world)
    correct = torch.zeros(len(ks), device=train_x.device, dtype=torch.float64)
    for x, y in zip(F.normalize(test_x[mine], dim=1).split(chunk), test_y[mine].split(chunk)):
        similarity, nearest = (x @ bank.T).topk(max(ks))                        # (chunk, k), the most similar first
        weight = (similarity / temperature).exp()
        for i, one in enumerate(ks):
            votes = torch.zeros(len(x), classes, device=x.device)
            votes.scatter_add_(1, train_y[nearest[:, :one]], weight[:, :one])
            correct[i] += (votes.argmax(1) == y).sum()
    if world > 1:
        dist.all_reduce(correct)
    accuracy = (correct / len(test_y)).tolist()
    return dict(zip(k, accuracy)) if isinstance(k, (list, tuple)) else accuracy[0]


# --- linear probe, fast: many heads at once on stored features --------------------------------------------------------

class HeadGrid:
    """Linear heads for every (lr, weight decay) of `grid`, layer and pooling, trained at once on the same batches.

    Features x (b, l, s, d), s pooled tokens -> logits (b, l, G, c), G = grid x poolings. A pooling is a row of 0 and 1
    over the pooled tokens: its head sees the others as zeros, so that all are ONE matrix product per layer.
    """

    def __init__(self, grid, layers, pools, d, classes, device="cpu"):
        self.pools = torch.tensor(pools, dtype=torch.float32, device=device)                     # (pooling, s)
        shape = (layers, *self.pools.shape, d, classes)
        self.weights = [torch.zeros(shape, device=device, requires_grad=True) for _ in grid]
        self.biases = [torch.zeros(layers, len(pools), classes, device=device, requires_grad=True) for _ in grid]
        self.optimizer = torch.optim.AdamW([dict(params=[w, b], lr=lr, weight_decay=decay) for w, b, (lr, decay) in
                                            zip(self.weights, self.biases, grid)])

    def logits(self, x):
        weight = torch.stack(self.weights) * self.pools[..., None, None]
        weight = rearrange(weight, "g l p s d c -> l (s d) (g p c)")
        bias = rearrange(torch.stack(self.biases), "g l p c -> l 1 (g p c)")
        out = torch.baddbmm(bias, rearrange(x, "b l s d -> l b (s d)"), weight)
        return rearrange(out, "l b (g c) -> b l g c", c=self.biases[0].shape[-1])

    def fit(self, x, y, rows, moments, epochs, batch_size, seed):
        """x (n, l, s, d), y (n,); only x[rows] is read. Cosine to 0; each epoch's last, smaller batch is dropped."""
        mean, std = moments
        batch_size = min(batch_size, len(rows))
        plan = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs * (len(rows) // batch_size))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = rows[torch.randperm(len(rows), generator=generator)]
            for batch in order[:len(rows) - len(rows) % batch_size].split(batch_size):
                logits = self.logits((x[batch.to(x.device)].to(mean) - mean) / std)
                target = repeat(y[batch.to(y.device)], "b -> (b l g)", l=logits.shape[1], g=logits.shape[2])
                # The sum over the heads: no head's gradient knows of another.
                (F.cross_entropy(logits.flatten(0, 2), target, reduction="sum") / len(batch)).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                plan.step()
        return self

    @torch.no_grad()
    def accuracy(self, x, y, rows, moments, chunk=1024):
        """(l, G) float64: the share of x[rows] that each head gets right."""
        mean, std = moments
        right = sum((self.logits((x[r.to(x.device)].to(mean) - mean) / std).argmax(-1) ==
                     y[r.to(y.device)][:, None, None]).sum(0) for r in rows.split(chunk))
        return right.double() / len(rows)


def linear(train_x, train_y, test_x, test_y, epochs=50, batch_size=1024, lr=1e-2, weight_decay=1e-4, seed=0):
    """Top-1 accuracy of one linear layer; features (n, d), standardised, labels (n,): train.py's fixed probe.

    AdamW, cosine to 0, weights from zero; the test labels are used for nothing but the returned accuracy.
    """
    d, classes = train_x.shape[1], int(train_y.max()) + 1
    as_is = torch.zeros(d, device=train_x.device), torch.ones(d, device=train_x.device)
    head = HeadGrid([(lr, weight_decay)], 1, [[1]], d, classes, train_x.device)
    head.fit(train_x[:, None, None], train_y, torch.arange(len(train_x)), as_is, epochs, batch_size, seed)
    return head.accuracy(test_x[:, None, None], test_y, torch.arange(len(test_x)), as_is).item()


def choose_head(x, y, n, test_x, test_y, rates=RATES, decays=DECAYS, epochs=50, batch_size=1024, seed=0):
    """The fast linear probe: the best head of a grid by held-out training images, then its test accuracy.

    x (views * n, l, s, d), y (views * n,): views of the same n training images, the first as they are. A tenth of the
    images is held out of every view; the chosen head is then trained again on all of them. -> dict
    """
    device, classes, layers = y.device, int(y.max()) + 1, x.shape[1]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(train.derive_seed(seed, 1)))
    held, kept = order[:max(1, n // 10)], order[max(1, n // 10):]
    kept, everything = torch.cat([kept + v * n for v in range(len(x) // n)]), torch.arange(len(x))
    grid = [(lr, decay) for lr in rates for decay in decays]
    names, pools = POOLINGS[x.shape[2]], [[1, 0], [0, 1], [1, 1]] if x.shape[2] == 2 else [[1]]
    scale = [m.to(device) for m in compute_moments(x, kept)]
    heads = HeadGrid(grid, layers, pools, x.shape[-1], classes, device).fit(x, y, kept, scale, epochs, batch_size, seed)
    scores = heads.accuracy(x, y, held, scale)                                  # (l, grid * pooling)
    layer, g = divmod(scores.argmax().item(), scores.shape[1])
    (lr, decay), pool = grid[g // len(pools)], g % len(pools)

    of_layer, scale = slice(layer, layer + 1), [m.to(device) for m in compute_moments(x[:, layer:layer + 1], everything)]
    head = HeadGrid([(lr, decay)], 1, [pools[pool]], x.shape[-1], classes, device)
    head.fit(x[:, of_layer], y, everything, scale, epochs, batch_size, seed)
    accuracy = head.accuracy(test_x[:, of_layer], test_y, torch.arange(len(test_x)), scale).item()
    return dict(linear=accuracy, held_out=scores.max().item(), heads=scores.numel(),
                chosen=dict(layer=layer + 1, pooling=names[pool], lr=lr, weight_decay=decay))


def evaluate(vit, train_ds, test_ds, device, workers=0, seed=0, what=("knn", "linear"), k=20):
    """{"knn": ..., "linear": ...}: top-1 accuracies (fractions of 1), all settings fixed; train.py's closing table."""
    train_x, train_y = extract(vit, train_ds, device, workers)
    test_x, test_y = extract(vit, test_ds, device, workers)
    mean, std = compute_moments(train_x, torch.arange(len(train_x)))        # class token and patch mean differ in scale
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    data = train_x, train_y, test_x, test_y
    return {name: knn(*data, k) if name == "knn" else linear(*data, seed=seed) for name in what}


# --- training: linear probes with a running encoder, fine-tuning, tokens ----------------------------------------------

class LARS(torch.optim.Optimizer):
    """SGD with momentum whose matrices move by a step in proportion to their own norm (You et al. 2017, as MAE's).

    v <- 0.9 v + g q,  p <- p - lr v;   g: gradient + weight_decay p,  q = trust |p| / |g|;   1-D: the gradient alone
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
                    size, move = p.norm(), g.norm()
                    g = g * torch.where((size > 0) & (move > 0), group["trust"] * size / move, 1.)
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * v)


def layer_groups(model, weight_decay, layer_decay):
    """Parameter groups with `scale`, the layer-wise factor of the learning rate: layer_decay ^ (L + 1 - id).

    id 0: class token, positions, patch embedding; i + 1: block i; L + 1: the rest (METHODS 4.5). No weight decay on
    biases, norms, LayerScale, positions, class token.
    """
    groups = {}
    for name, p in model.named_parameters():
        first, *rest = name.removeprefix("encoder.").split(".")
        layer = int(rest[0]) + 1 if first == "blocks" else 0 if name.startswith("encoder.") else model.depth + 1
        bare = p.ndim < 2 or first in ("pos_embed", "cls_token")
        new = dict(params=[], weight_decay=0. if bare else weight_decay, scale=layer_decay ** (model.depth + 1 - layer))
        groups.setdefault((layer, bare), new)["params"].append(p)
    return list(groups.values())


class Heads(nn.Module):
    """The papers' linear probes: one linear layer per feature, on a frozen encoder. Features (b, l, d) -> (b, l, c).

    encode  images, normalised -> features; it belongs to no module, so that nothing trains, saves or shares it
    norm    a BatchNorm without parameters before the linear layer (MAE)
    """
    depth = 0

    def __init__(self, encode, layers, d, classes, norm):
        super().__init__()
        self.encode, self.n_heads = encode, layers
        self.norms = nn.ModuleList(nn.BatchNorm1d(d, eps=1e-6, affine=False) if norm else nn.Identity()
                                   for _ in range(layers))
        self.heads = nn.ModuleList(nn.Linear(d, classes) for _ in range(layers))
        for head in self.heads:
            nn.init.trunc_normal_(head.weight, std=.01)
            nn.init.zeros_(head.bias)

    def forward(self, x, noise=None):
        x = self.encode(x) if x.ndim == 4 else x
        return torch.stack([head(norm(x[:, i])) for i, (norm, head) in enumerate(zip(self.norms, self.heads))], 1)


class Classifier(nn.Module):
    """Fine-tuning: mean of the patch tokens -> a new norm, fc_norm -> linear layer; images or token ids -> (b, 1, c).

    The encoder's own final norm is dropped. Token ids (b, n), integers, go through a patch embedding that is a table.
    """

    n_heads = 1

    def __init__(self, vit, classes, drop_path=0., head_std=.02):
        super().__init__()
        self.encoder, self.depth = vit.requires_grad_(True), vit.depth
        vit.norm = nn.Identity()
        for i, block in enumerate(vit.blocks):
            block.drop = drop_path * i / max(vit.depth - 1, 1)
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
    """MaPeT Table 4: embedding -> linear -> ReLU -> mean over the positions -> linear. No positions: a bag of tokens.

    Token ids (b, n) -> (b, 1, c). The widths are lost in the paper; ViT-T's 192 and four times that are ours.
    """
    depth, n_heads = 0, 1

    def __init__(self, vocab_size, classes, width=192, hidden=768):
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)
        self.hidden, self.head = nn.Linear(width, hidden), nn.Linear(hidden, classes)

    def forward(self, x, noise=None):
        # What comes before the mean knows only the code: it is computed once for every code, not once for every patch.
        codes = F.relu(self.hidden(self.table.weight)).float()
        return self.head(F.embedding_bag(x, codes, mode="mean"))[:, None]


def token_vit(name, vocab_size, n, classes, drop_path):
    """MaPeT Table 4's other head: the named ViT with a table of token vectors in place of its patch embedding."""
    vit = MODELS[name](image_size=math.isqrt(n), patch_size=1, pos="learned")
    vit.patch_embed = nn.Embedding(vocab_size, vit.width)
    nn.init.trunc_normal_(vit.patch_embed.weight, std=.02)
    return Classifier(vit, classes, drop_path)


class Tokens(Dataset):
    """Token ids (n,) int64 and label of each image; keys as in `View`."""

    def __init__(self, tokens, labels, name):
        self.tokens, self.labels, self.name = tokens, labels, name

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, key):
        i = key[-1] if isinstance(key, tuple) else key
        x, y = torch.from_numpy(self.tokens[i].astype(np.int64)), int(self.labels[i])
        return (x, y, i, i) if isinstance(key, tuple) else (x, y, i)

    def note_unreadable(self, wanted, read):
        """Tokens cannot be damaged one by one."""


def on_device(x, ds, device):
    x = x.to(device, non_blocking=True)
    return train.normalize(x, ds) if x.dtype == torch.uint8 else x


def mix_images(x, y, classes, recipe, *seed):
    """MixUp or CutMix, by a coin, of a group of images; y (b,) becomes (b, c), the classes' shares (MAE, MaPeT)."""
    kinds = [kind(alpha=alpha, num_classes=classes)
             for kind, alpha in ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix)) if alpha]
    return train.augment((x, y), v2.RandomChoice(kinds), *seed) if kinds else (x, y)


def gather_batch(parts):
    """This process's micro-batches [(features, labels)] and all the others': the global batch, in its order."""
    joined = [torch.cat(column) for column in zip(*parts)]
    if dist.is_initialized():
        of_all = [[torch.empty_like(x) for _ in range(dist.get_world_size())] for x in joined]
        for x, out in zip(joined, of_all):
            dist.all_gather(out, x.contiguous())
        joined = [torch.cat(out) for out in of_all]
    return joined


def plan_steps(recipe, n, args, frozen_encoder):
    """How the steps over n images are cut: batch, one process's share and micro-batch, steps, warm-up, peak lr."""
    world = rank_and_world()[1]
    share = min(recipe.batch_size, n) // world
    if share == 0:
        raise ValueError(f"a batch of {min(recipe.batch_size, n)} images cannot be shared by {world} processes")
    micro = math.gcd(share, args.micro_batch or (256 if frozen_encoder else share))
    batch = share * world
    steps = max(1, round(recipe.epochs * (n // batch)))
    return argparse.Namespace(
        batch=batch, first=rank_and_world()[0] * share, share=share, micro=micro, steps=steps,
        stop_at=min(steps, args.steps or steps), warmup=round(recipe.warmup_epochs * (n // batch)),
        save_every=max(200, n // batch),
        lr=recipe.lr if recipe.lr is not None else recipe.blr * batch / 256)


def micro_batches(ds, rows, p, start, recipe, args, classes):
    """(inputs on the device, labels (b,) or shares of the classes (b, c)): from step `start`, this process's."""
    keys = train.schedule(len(rows), p.batch, args.seed, start, p.stop_at, slice(p.first, p.first + p.share),
                          p.share // p.micro)
    keys = ([(epoch, int(rows[i])) for epoch, i in some] for some in keys)
    # The papers mix within one GPU's share; here within eighths of the batch, so that the processes do not matter.
    group = math.gcd(p.micro, max(2, recipe.batch_size // 8))
    for number, (x, y, wanted, read) in enumerate(make_loader(ds, keys, args.workers, args.torch_device)):
        ds.note_unreadable(wanted, read)
        step, m = divmod(number, p.share // p.micro)
        at = (p.first + m * p.micro) // group
        x, y = on_device(x, ds, args.torch_device), y.to(args.torch_device)
        pairs = [mix_images(*some, classes, recipe, args.seed, start + step, at + g)
                 for g, some in enumerate(zip(x.split(group), y.split(group)))]
        yield [torch.cat(column) for column in zip(*pairs)]


def fit(model, ds, rows, recipe, args, path, classes, **about):
    """Train `model` (logits (b, heads, c)) on ds[(epoch, i)], i in rows; goes on from `path`, and saves there.

    Returns the model, or None if it was stopped before the end. As in train.py everything is a function of (seed, step)
    for the global batch. With a frozen encoder (model.encode) every process gets the features of the whole batch and
    trains the same small heads; otherwise the processes share the batch.
    """
    rank, world = rank_and_world()
    device, encode = args.torch_device, getattr(model, "encode", None)
    p = plan_steps(recipe, len(rows), args, encode)
    settings = argparse.Namespace(**vars(recipe), **about, images=len(rows), seed=args.seed)
    model = model.to(device).train()
    kind = {"adamw": lambda groups: torch.optim.AdamW(groups, betas=(.9, recipe.beta2)), "lars": LARS}[recipe.optimizer]
    optimizer, step = kind(layer_groups(model, recipe.weight_decay, recipe.layer_decay)), 0
    if os.path.exists(path) and not args.fresh:
        state = train.resume(path, settings)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    barrier()                                            # everybody has looked before anybody writes
    if rank == 0 and step < p.stop_at:
        print(f"{path}: {len(rows)} images, {p.steps} steps of {p.batch}, lr {p.lr:g}" +
              (f"; going on at step {step}" if step else ""), flush=True)
    net = model if world == 1 or encode else \
        DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    stream, generator = micro_batches(ds, rows, p, step, recipe, args, classes), torch.Generator(device)
    with kmeans.catch_signals() as received_anywhere, tqdm(total=p.stop_at, initial=step, unit="step", leave=False,
                                          disable=rank != 0 or not sys.stderr.isatty()) as bar:
        stopping = False
        while step < p.stop_at and not stopping:
            lr = train.learning_rate(step, p.steps, p.warmup, p.lr, recipe.warmup_lr, recipe.min_lr)
            for of_layer in optimizer.param_groups:
                of_layer["lr"] = of_layer["scale"] * lr
            generator.manual_seed(train.derive_seed(args.seed, step))
            noise = torch.rand(2 * model.depth, p.batch, generator=generator, device=device)
            noise = noise[:, p.first:p.first + p.share]
            parts = (next(stream) for _ in range(p.share // p.micro))
            if encode:
                parts, noise = [gather_batch([(encode(x), y) for x, y in parts])], noise[:, :0]
            # The gradients of all micro-batches are one batch's: the processes exchange them once, with the last.
            last = max(1, noise.shape[1] // p.micro) - 1
            for m, (x, y) in enumerate(parts):
                with net.no_sync() if net is not model and m < last else contextlib.nullcontext():
                    loss(net, x, y, noise[:, m * p.micro:(m + 1) * p.micro], recipe.smoothing).div(last + 1).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()
            stopping = received_anywhere()
            if stopping or step == p.stop_at or step % p.save_every == 0:
                if not torch.stack([value.detach().sum() for value in model.parameters()]).isfinite().all():
                    raise ValueError(f"step {step}: the weights are not finite; try a lower --lr (now {p.lr:g})")
                if rank == 0:
                    save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                                    args=vars(settings)), path)
    barrier()
    return model.eval() if step == p.steps else None


def loss(net, x, y, noise, smoothing):
    """Cross-entropy of each head, summed over the heads."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        logits = net(x, noise)
    return sum(F.cross_entropy(of_head, y, label_smoothing=smoothing) for of_head in logits.float().unbind(1))


@torch.inference_mode()
def score(model, ds, args, batch_size=256):
    """(heads, 2) top-1 and top-5 accuracy over `ds`; every image counts once."""
    (rank, world), device = rank_and_world(), args.torch_device
    hits = torch.zeros(model.n_heads, 2, device=device, dtype=torch.float64)
    for x, y, _ in load_batches(ds, range(rank, len(ds), world), batch_size, args.workers):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(on_device(x, ds, device))
        right = logits.topk(min(5, logits.shape[-1])).indices == y.to(device)[:, None, None]
        hits += torch.stack([right[..., 0].sum(0), right.any(-1).sum(0)], 1)
    if world > 1:
        dist.all_reduce(hits)
    return hits / len(ds)


# --- attention and features as a picture ------------------------------------------------------------------------------

@torch.inference_mode()
def cls_attention(vit, images):
    """Where the class token looks in the last block, mean over the heads: (b, n), normalised images in.

    Without a class token: where the patches look on average.
    """
    x = vit.embed(images)
    for block in vit.blocks[:-1]:
        x = block(x)
    block = vit.blocks[-1]
    q, k, _ = rearrange(block.attn.qkv(block.norm1(x)), "b q (three h d) -> three b h q d", three=3, h=block.attn.heads)
    attention = (einsum(q, k, "b h q d, b h s d -> b h q s") * q.shape[-1] ** -.5).softmax(-1).mean(1)  # (b, q, s)
    return attention[:, 0, 1:] if vit.prefix else attention.mean(1)


@torch.inference_mode()
def show(vit, ds, args, path):
    """PNG: a few images, under each where the class token looks, and three principal components as colors."""
    vit, ids = vit.to(args.torch_device).eval(), range(0, len(ds), max(1, len(ds) // args.images))[:args.images]
    pixels = torch.stack([ds[i][0] for i in ids]).to(args.torch_device)
    images = train.normalize(pixels, ds)
    enlarge = lambda x: F.interpolate(rearrange(x, "b (y x) c -> b c y x", y=vit.grid), pixels.shape[-2:])
    heat = cls_attention(vit, images)
    heat = repeat(heat / heat.amax(1, keepdim=True), "b n -> b n 3")
    colors, = principal_colors(vit(images)[:, vit.prefix:])
    draw_grid([pixels / 255, enlarge(heat), enlarge(colors)], path, ("image", "attention", "features"))


# --- one function for each command --------------------------------------------------------------------------------

def run_settings(folder):
    """The settings (dict) of the run in `folder`, empty if it is none of ours."""
    last = os.path.join(folder, "last.pt")
    settings = read_checkpoint(last).get("args", {}) if os.path.exists(last) else {}
    return settings if isinstance(settings, dict) and "objective" in settings else {}


def open_encoder(args):
    """(encoder that the arguments name, the same untrained, settings of its run)."""
    source = args.encoder or ""
    ours = os.path.isdir(source) or os.path.basename(source) in ("encoder.pt", "last.pt")
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    settings, vit = run_settings(folder) if ours else {}, from_weights(source, args.image_size) if source else None
    name = os.path.splitext(os.path.basename(source))[0] or f"random-{args.model}"
    args.run = args.out or (folder if ours else os.path.join("runs", name))
    torch.manual_seed(args.seed)
    if settings:
        settings = {**settings, "image_size": vit.image_size}
        floor = train.build(argparse.Namespace(**{**settings, "seed": args.seed}), 2).encoder
    elif vit:
        floor = ViT(vit.image_size, vit.patch_size, vit.width, vit.depth, vit.blocks[0].attn.heads,
                    vit.blocks[0].mlp.fc1.out_features / vit.width, cls_token=bool(vit.prefix),
                    layer_scale=.1 if hasattr(vit.blocks[0].ls1, "gamma") else None)
    else:
        floor = MODELS[args.model](**{key: value for key, value in (("image_size", args.image_size),
                                                                    ("patch_size", args.patch_size)) if value})
    return floor if args.random_init else vit, floor, settings


def open_data(args, image_size, settings):
    args.data = args.data or settings.get("data", "textures")
    train_ds, test_ds = train.open_splits(args.data, image_size, args.classes or settings.get("classes"))
    if test_ds is None:
        raise ValueError(f"--data {args.data}: a probe needs labels, in train/CLASS/ and in val/CLASS/")
    return train_ds, test_ds


def in_run(args, name):
    """The path of a file of the run; makes the folder."""
    os.makedirs(args.run, exist_ok=True)
    return os.path.join(args.run, name)


def n_classes(ds):
    return len(ds.classes) if ds.classes else 1 + int(ds.labels.max())


def resolve_recipe(recipe, args):
    """The recipe with what the command line says otherwise."""
    given = {key: value for key, value in vars(args).items() if key in recipe and value is not None}
    if several := [key for key, value in given.items() if isinstance(value, list) and len(value) > 1]:
        raise ValueError(f"--{several[0].replace('_', '-')}: several at once go with --protocol fast only")
    given = {key: value[0] if isinstance(value, list) else value for key, value in given.items()}
    if "epochs" in given:                                           # another length keeps the share of the warm-up
        recipe = {**recipe, "warmup_epochs": recipe["warmup_epochs"] * given["epochs"] / recipe["epochs"]}
    return argparse.Namespace(**{**recipe, **given})


def run_knn(args, vit, train_ds, test_ds, tag):
    by_k = evaluate(vit, train_ds, test_ds, args.torch_device, args.workers, what=("knn",), k=args.k)["knn"]
    return dict(knn=by_k[args.k[0]], k=by_k)


def run_fast(args, vit, train_ds, test_ds, tag):
    """Features, in memory or, beyond --memory, in a file of the run's folder; then the grid."""
    device, n = args.torch_device, len(train_ds)
    shape, path = (n, vit.depth, 1 + vit.prefix, vit.width), in_run(args, "features.npy")
    on_disk = 4 * math.prod(shape) > args.memory * 2 ** 30
    if on_disk:
        if rank_and_world()[0] == 0:
            np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
        barrier()
    x = torch.from_numpy(np.lib.format.open_memmap(path, "r+")) if on_disk else torch.zeros(shape, device=device)
    extract_layers(vit, train_ds, device, args.workers, out=x, shared=on_disk)
    y = torch.as_tensor(train_ds.labels, device=device)
    test_x, test_y = extract_layers(vit, test_ds, device, args.workers), torch.as_tensor(test_ds.labels, device=device)
    result = choose_head(x, y, n, test_x, test_y, args.lr or RATES, args.weight_decay or DECAYS,
                         round(args.epochs or 30), args.batch_size or 1024, args.seed)
    barrier()
    if on_disk and rank_and_world()[0] == 0:
        os.remove(path)
    return result


def run_protocol(args, vit, train_ds, test_ds, tag):
    """The papers' linear probes: the encoder runs anew on a random view of every image in every epoch."""
    recipe, mae = resolve_recipe(PROTOCOLS[args.protocol], args), args.protocol == "mae"
    if mae and not vit.prefix:
        raise ValueError("--protocol mae reads the class token, and this encoder has none: take --protocol beit")

    @torch.no_grad()
    def encode(images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
            x = pool_features(vit, images, final_norm=mae)
        return x[:, -1:, 0] if mae else x.flatten(2)         # BEiT: class token beside patch mean, of every block
    with frozen(vit.to(args.torch_device)):
        torch.manual_seed(args.seed)
        layers, tokens = (1, 1) if mae else (vit.depth, 1 + vit.prefix)
        model = Heads(encode, layers, tokens * vit.width, n_classes(train_ds), mae)
        view = train.Augmented(train_ds, augmentation(train_ds, args.protocol), args.seed)
        model = fit(model, view, range(len(train_ds)), recipe, args, in_run(args, f"linear-{args.protocol}{tag}.pt"), None,
                    data=args.data, weights=fingerprint(vit)[:16])
        if model is None:
            return None
        top1 = score(model, train.with_transform(test_ds, augmentation(test_ds, "test")), args)[:, 0].tolist()
    # BEiT prints the best block on the test images; the last block's is the number that nobody chose.
    return dict(linear=top1[-1], **({} if mae else dict(best_layer=max(top1), by_layer=top1)))


def run_finetune(args, vit, train_ds, test_ds, tag):
    rows = torch.randperm(len(train_ds), generator=torch.Generator().manual_seed(args.seed))[:args.labelled].tolist()
    paper = "mae" if args.objective in ("mae", "maskfeat", "clustermim") else "mapet"
    kind = args.recipe or ("textures" if args.data == "textures" else paper)
    recipe = resolve_recipe({**RECIPES[kind], **BY_WIDTH.get((kind, vit.width), {})}, args)
    weights, classes = fingerprint(vit)[:16], n_classes(train_ds)
    torch.manual_seed(args.seed)
    model = Classifier(vit, classes, recipe.drop_path, recipe.head_std)
    model = fit(model, train.Augmented(train_ds, augmentation(train_ds, "finetune", recipe), args.seed), rows, recipe, args,
                in_run(args, f"finetune{tag}.pt"), classes, data=args.data, weights=weights)
    if model is None:
        return None
    top1, top5 = score(model, train.with_transform(test_ds, augmentation(test_ds, "test")), args)[0].tolist()
    return dict(finetune=top1, top5=top5, recipe=kind, labelled=len(rows))


def token_sets(args):
    """(training `Tokens`, test `Tokens`, codebook size, classes) from a run's folder, a tokenizer.pt or a tokens.npy.

    With tokens.npy alone a random fifth of the training images takes the place of the test split.
    """
    folder = args.encoder if os.path.isdir(args.encoder) else os.path.dirname(args.encoder)
    settings = run_settings(folder)
    args.run, path = args.out or folder or ".", args.encoder
    if os.path.isdir(path):
        path = os.path.join(folder, "tokenizer.pt")
        path = path if os.path.exists(path) else os.path.join(folder, "tokens.npy")
        if not os.path.exists(path):
            raise ValueError(f"{folder}: neither tokenizer.pt nor tokens.npy in it; name a tokenizer, or a run that predicts "
                             "tokens")
    if path.endswith(".npy"):
        tokens = kmeans.load_tokens(path)
        ds, _ = open_data(args, args.image_size or settings.get("image_size"), settings)
        if len(tokens) != len(ds):
            raise ValueError(f"{path}: tokens of {len(tokens)} images, but {ds.name} has {len(ds)}")
        order = np.random.default_rng(args.seed).permutation(len(tokens))
        held, kept = np.split(order, [len(order) // 5])
        parts = [Tokens(tokens[rows], ds.labels[rows], f"{ds.name}, {name}")
                 for rows, name in ((kept, "four fifths"), (held, "a held-out fifth"))]
        return *parts, 1 + int(tokens.max()), n_classes(ds)
    tokenizer = kmeans.load_tokenizer(path).to(args.torch_device)
    splits, data = open_data(args, tokenizer.input_size, settings), os.path.basename(os.path.normpath(args.data))
    names = ["tokens.npy" if args.data == settings.get("data") else f"tokens-{data}.npy", f"tokens-{data}-test.npy"]
    made = [Tokens(kmeans.tokenize(tokenizer, ds, in_run(args, name), device=args.torch_device, workers=args.workers),
                   ds.labels, ds.name) for name, ds in zip(names, splits)]
    return *made, tokenizer.vocab_size, n_classes(splits[0])


def run_tokens(args):
    """MaPeT Table 4. No floor but chance: there is no encoder."""
    train_ds, test_ds, vocab_size, classes = token_sets(args)
    recipe = resolve_recipe(dict(TOKENS, **(SMALL_TOKENS if args.data == "textures" else {})), args)
    torch.manual_seed(args.seed)
    if args.head == "mlp":
        model = TokenMLP(vocab_size, classes)
    else:
        model = token_vit(args.head, vocab_size, train_ds.tokens.shape[1], classes, recipe.drop_path)
    digest = hashlib.sha256(np.ascontiguousarray(train_ds.tokens)).hexdigest()[:16]
    model = fit(model, train_ds, range(len(train_ds)), recipe, args, in_run(args, f"tokens-{args.head}.pt"), classes,
                data=args.data, head=args.head, digest=digest)
    if model is None:
        return None
    top1, top5 = score(model, test_ds, args)[0].tolist()
    chance = np.bincount(train_ds.labels).max() / len(train_ds)       # always the most frequent class
    return dict(tokens=top1, top5=top5, head=args.head, vocab_size=vocab_size, chance=chance,
                tested_on=f"{test_ds.name}, {len(test_ds)} images")


# --- the end of a run of train.py ---------------------------------------------------------------------------

def draw_predictions(args, model, ds, test, targets, device):
    """OUT/predictions.png: held-out images (or else training images), what was hidden, what was predicted."""
    held_out = ds if test is None else test
    few = range(0, len(held_out), math.ceil(len(held_out) / 8))
    images, _, read = next(load_batches(held_out, few, 8, 0, device))
    patch_pictures, path = None, os.path.join(args.out, "predictions.png")
    if model.needs == "tokens":                 # a code is drawn as the mean of its patches: of pixels, the centroid
        sums = torch.zeros(targets.size, 3 * args.patch_size ** 2, device=device)
        counts = torch.zeros(targets.size, 1, device=device)
        few = range(0, len(ds), math.ceil(len(ds) / 500))
        for pixels, _, index in load_batches(ds, few, 64, args.workers, device):
            tokens = targets.of(pixels, index).flatten()
            sums.index_add_(0, tokens, patchify(pixels, args.patch_size).flatten(0, 1) / 255)
            counts += tokens.bincount(minlength=targets.size)[:, None]
        patch_pictures = torch.where(counts > 0, sums / counts.clamp(min=1), .5)
    given = targets.of(images, read if held_out is ds else None)
    rows, labels = objectives.picture_predictions(
        model, images / 255, ds.mean, ds.std, given, patch_pictures, args.seed)
    draw_grid(rows, path, labels)
    print0(f"drawn in {path}: {'training' if held_out is ds else 'held-out'} images; rows {', '.join(labels)}")


def print_table(args, vit, step, ds, test, device, started):
    """k-NN and linear probe of the trained and of the random encoder; the summary line of metrics.jsonl."""
    path = os.path.join(args.out, "metrics.jsonl")
    done = [line for line in train.read_metrics(path) if line.get("summary") and line["step"] == step]
    if done:
        summary = done[-1]
    else:
        print0("k-NN and linear probe of the trained and of the random encoder")
        floor = train.build(args, 2).encoder.to(device)
        trained, random = (evaluate(net, ds, test, device, args.workers, args.seed) for net in (vit, floor))
        summary = dict(summary=True, step=step, linear=trained["linear"], linear_random=random["linear"],
                       knn=trained["knn"], knn_random=random["knn"], seconds=round(time.time() - started, 1),
                       objective=args.objective)
        train.append_metrics(path, **summary)
    print0(f"\n{'':<18}{'k-NN':>8}{'linear probe':>15}   top-1 % on {test.name}, {len(test)} images")
    for name, suffix in (("random encoder", "_random"), ("trained encoder", "")):
        print0(f"{name:<18}{100 * summary['knn' + suffix]:>8.1f}{100 * summary['linear' + suffix]:>15.1f}")


# --- command line -------------------------------------------------------------------------------------------------

RUN = {"knn": run_knn, "finetune": run_finetune, "linear": lambda args, *rest: (
    run_fast if args.protocol == "fast" else run_protocol)(args, *rest)}


def measure(args):
    """The result of one command as a dict, printed and appended to probe.jsonl; None if it was stopped."""
    rank, _, args.torch_device = train.setup(args.device)
    started, result, floor = time.time(), None, None
    if args.what == "tokens":
        args.no_floor = args.random_init = False
        if result := run_tokens(args):
            floor = {"tokens": result.pop("chance")}
    else:
        vit, untrained, settings = open_encoder(args)
        splits = open_data(args, vit.image_size, settings)
        args.objective = settings.get("objective")
        if args.what == "show":
            path = in_run(args, "show.png")
            if rank == 0:
                show(vit, splits[1], args, path)
                print(f"{path}: image, attention of the class token, three principal components of the patch features")
            return dict(show=path)
        result = RUN[args.what](args, vit, *splits, "")
        if result and not (args.no_floor or args.random_init):
            floor = RUN[args.what](args, untrained, *splits, "-floor")
        result and result.update(tested_on=f"{splits[1].name}, {len(splits[1])} images")
    if result is None or floor is None and not (args.no_floor or args.random_init):
        if rank == 0:
            print("stopped before the end; the same command goes on from there")
        return None
    source = args.encoder or f"random {args.model}"
    source = f"random init of {source}" if args.random_init and args.encoder else source
    line = dict(what=args.what, source=source, data=args.data, seed=args.seed, **result, floor=floor,
                seconds=round(time.time() - started, 1))
    if rank == 0:
        report(args, line)
        with open(in_run(args, "probe.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")
    return line


def report(args, line):
    name = args.what if args.what != "linear" else f"linear ({args.protocol})"
    floor = f"   (floor {100 * line['floor'][args.what]:.1f})" if line["floor"] else ""
    print(f"{name} {100 * line[args.what]:.1f} %{floor}   {line['source']}, {line['tested_on']}")
    for key in ("k", "top5", "best_layer", "by_layer", "held_out", "heads", "chosen"):
        if key in line:
            print(f"    {key}: {line[key]}")


MAY_BE_ZERO = {"seed", "workers", "weight_decay", "warmup_epochs", "drop_path", "smoothing", "layer_decay", "mixup",
               "cutmix", "erase", "randaugment"}
# Settings of a training: a flag beats the recipe.
SETTINGS = {"--epochs": "passes over the training images", "--batch-size": "images a step, over all processes",
            "--lr": "peak learning rate, as used", "--weight-decay": "", "--warmup-epochs": "linear warm-up",
            "--drop-path": "stochastic depth of the last block", "--smoothing": "of the labels"}
FINETUNE_SETTINGS = {"--layer-decay": "factor of the learning rate from a block to the one below",
                     "--mixup": "its alpha, 0 = off", "--cutmix": "its alpha, 0 = off",
                     "--erase": "probability of random erasing",
                     "--randaugment": "magnitude on timm's scale of 10, 0 = off"}


def parse(argv):
    parser = argparse.ArgumentParser(description="What an encoder has learned, by the evaluations of the two papers.")
    commands = parser.add_subparsers(dest="what", required=True)

    def command(name, text, settings=()):
        run = "a run's folder, a tokenizer.pt or a tokens.npy" if name == "tokens" else \
            "a run's folder, an encoder.pt, a timm/DINO/DeiT/MAE file or a public name"
        add = commands.add_parser(name, help=text, description=text).add_argument
        add("encoder", nargs=None if name == "tokens" else "?", metavar="RUN", help=run)
        add("--data", help="as in train.py (default: what the run was trained on, else textures)")
        add("--classes", metavar="FILE", help="class folders to keep, one a line")
        add("--image-size", type=int, help="pixels a side (default: the encoder's)")
        add("--out", metavar="FOLDER", help="of what is written (default: the run's folder)")
        add("--seed", type=int, default=0)
        add("--workers", type=int, default=0, help="loading processes per GPU")
        add("--device", help="cuda, cpu (default: cuda if there is one)")
        if name not in ("tokens", "show"):
            add("--no-floor", action="store_true", help="do not measure the untrained network as well")
        if name != "tokens":
            add("--random-init", action="store_true", help="the floor alone: untrained weights")
            add("--model", choices=list(MODELS), default="vit_micro", help="with --random-init and no RUN")
            add("--patch-size", type=int, help="pixels a side, with --random-init and no RUN")
        for flag, text in dict(settings).items():
            grid = name == "linear" and flag in ("--lr", "--weight-decay")
            add(flag, type=int if flag == "--batch-size" else float, nargs="+" if grid else None,
                help=text + (" (fast: one or several)" if grid else ""))
        if settings:
            add("--fresh", action="store_true", help="start over instead of going on from what is in --out")
            add("--steps", type=int, metavar="N", help="stop after N optimiser steps of the schedule")
            add("--micro-batch", type=int, metavar="N", help="images at once on one process")
        return add

    add = command("knn", "weighted k-nearest neighbours on frozen features")
    add("--k", type=int, nargs="+", default=[20], help="neighbours that vote, one or several (default 20)")
    add = command("linear", "a linear layer on frozen features", settings=SETTINGS)
    add("--protocol", choices=["fast", *PROTOCOLS], default="fast", help="fast: a grid on stored features (default)")
    add("--memory", type=float, default=8, metavar="GB", help="fast: beyond it features go into a file (default 8)")
    add = command("finetune", "train the whole network on labels", settings={**SETTINGS, **FINETUNE_SETTINGS})
    add("--recipe", choices=list(RECIPES), help="(default: the data's, else that of the run's objective)")
    add("--labelled", type=int, metavar="N", help="use N labelled images only, drawn by the seed")
    add = command("tokens", "classify from the tokens alone", settings=SETTINGS)
    add("--head", choices=["mlp", *MODELS], default="mlp", help="(paper: mlp and vit_tiny)")
    add = command("show", "draw the attention of the class token, and the features")
    add("--images", type=int, default=6, help="rows of the picture")
    args = parser.parse_args(argv)
    if args.what != "tokens" and not args.encoder and not args.random_init:
        parser.error("name a run's folder or an encoder.pt, or say --random-init")
    for key, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and not (
                    math.isfinite(number) and (number > 0 or key in MAY_BE_ZERO and number == 0)):
                wanted = "from 0 up" if key in MAY_BE_ZERO else "above 0"
                parser.error(f"--{key.replace('_', '-')} {number}: a number {wanted} is wanted")
    return args


def main(argv=None):
    args = parse(argv)
    with exit_on_error("probe.py"):
        return measure(args)


if __name__ == "__main__":
    main()
