"""What was learned: every evaluation of the two papers, on an encoder f of ours or of anybody.

    k-NN           argmax_c  sum of exp(cos(f(x), f(x_i)) / 0.07) over the k nearest x_i of class c
    linear probe   softmax(W f(x) + b), f frozen
    fine-tuning    softmax(W LN(mean of the patches) + b), all of f trained, lower blocks more slowly
    tokens         softmax(W g(tokens) + b): no pixels at all (MaPeT Table 4)

python probe.py knn runs/mapet-textures           or finetune, or show: what patches share
python probe.py linear runs/mapet-textures        the best of many heads on stored features: a minute
python probe.py linear RUN --protocol mae         or beit: the papers' probes, the encoder runs every epoch
python probe.py linear vit_base --data IMAGENET   untrained, the random-init baseline (finetune: from scratch)
python probe.py finetune FILE --epochs 0          the score of a fine-tuned network, by the head that it has
python probe.py tokens RUN --head mlp             RUN: a run's folder or a tokenizer.pt
python probe.py compare runs/mim-* runs/pim-*     mean and deviation over seeds, paired differences

RUN is a run's folder or encoder.pt, which say the data, too, a timm/DINO/DeiT/MAE/MaPeT file, a public name,
or the name of a ViT size; --data another data set (MaPeT Table 5). All results are in probe.jsonl in the
run's folder, as fractions of 1. Nothing is chosen on the test images: the epoch that counts is the last one.
(MAE's code prints the best on them, BEiT's the best epoch and layer.)
"""
import argparse
import itertools
import json
import os
import zlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2

import train
from kmeans import load_tokenizer, print0, run_network, sample_images, tokenize
from vit import (MODELS, draw_rows, drop_rates, exit_on_error, from_weights, normalize, principal_colors,
                 read_checkpoint, unpatchify, unwrap_weights)


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
        cls, patches = x.split([vit.prefix, vit.n_patches], 1)
        features.append(torch.cat([cls, patches.mean(1, keepdim=True)], 1))
    return torch.stack(features, 1)


def prepare(x, ds):
    """uint8 images are normalized, floats are so already, tokens stay."""
    return normalize(x, ds.mean, ds.std) if x.dtype == torch.uint8 else x


def infer(network, ds, device, workers):
    """network(normalized images) of all images (n, ...), labels (n,), on every process."""
    def forward(images):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return network(prepare(images, ds))

    return run_network(forward, ds, device, workers), torch.as_tensor(ds.labels, device=device)


def extract(vit, splits, device, workers=0, blocks=slice(-1, None)):
    """Features (n, blocks, s, d) and labels (n,) of the training images, then those of the test images.

    The training images' features get mean 0 and deviation 1, the others are treated alike. They are stored in
    float16: ImageNet's of all blocks of ViT-B are 47 GB.
    """
    vit.eval()

    def encode(images):
        return pool_features(vit, images)[:, blocks].half()

    (x, y), (test_x, test_y) = (
        infer(encode, ds, device, workers) for ds in splits)
    std, mean = torch.std_mean(x, 0)
    for features in (x, test_x):
        features.sub_(mean).div_(std.clamp(min=1e-4))          # in place: there is no room for two
    return x, y, test_x, test_y


# --- k-NN, and linear heads on the same stored features ---------------------------------------------------

def knn(train_x, train_y, test_x, test_y, k=20, chunk=256):
    """Top-1 accuracy (0..1) of weighted k-nearest neighbors under cosine similarity (Wu et al. 2018).

    x features (n, ...), y labels (n,) int64; `chunk` test images at once.
    """
    bank, asked = (F.normalize(x.flatten(1).float()) for x in (train_x, test_x))
    correct = 0
    for x, y in zip(asked.split(chunk), test_y.split(chunk)):
        similarity, nearest = (x @ bank.T).topk(min(k, len(bank)))                # (chunk, k)
        weight = (similarity / .07).exp()
        votes = F.one_hot(train_y[nearest]) * weight[..., None]                   # (chunk, k, c)
        correct += (votes.sum(1).argmax(1) == y).sum().item()
    return correct / len(test_y)


# What a head sees of [class token, patch mean]; of the mean alone, where there is no class token.
POOLINGS = {
    "class token": slice(0, 1),
    "patch mean": slice(-1, None),
    "both": slice(None)}


def train_heads(choices, x, y, rows, epochs=50, batch_size=1024, seed=0):
    """Linear heads, one for each (block, pooling, learning rate, weight decay) of `choices`, all at once.

    They share the batches of standardized features x (n, l, s, d), labels y (n,), of `rows` only. AdamW, the
    rate a cosine down to 0; an epoch's last, small batch is left out.
    -> function of features (b, l, s, d): logits (heads, b, c)
    """
    heads, groups = [], []
    for block, pooling, lr, weight_decay in choices:
        layer, part = block - 1, POOLINGS[pooling]
        head = Head(x[0, layer, part].numel(), int(y.max()) + 1).to(y.device)
        nn.init.zeros_(head.weight)
        heads.append((head, layer, part))
        groups.append(dict(params=head.parameters(), lr=lr, weight_decay=weight_decay))

    def predict(x):
        return torch.stack([head(x[:, layer, part].flatten(1)) for head, layer, part in heads])

    per_epoch = max(1, len(rows) // batch_size)
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
    predicted = torch.cat([predict(part).argmax(-1) for part in x.split(1024)], 1)
    return (predicted == y).double().mean(1).tolist()


def linear(train_x, train_y, test_x, test_y, **how):
    """Top-1 accuracy (0..1) of one linear head on standardized features (n, 1, s, d), labels (n,)."""
    rows = torch.arange(len(train_x))
    head = train_heads([(1, "both", 1e-2, 1e-4)], train_x, train_y, rows, **how)
    return measure_heads(head, test_x, test_y)[0]


def choose_head(train_x, train_y, test_x, test_y, epochs=30, seed=0):
    """The fast linear probe: of many heads the best on a tenth of the training images, trained anew on all.

    x (n, l, s, d) standardized features, y (n,) labels -> [its accuracy (0..1)]; what was chosen is printed
    """
    n, blocks = train_x.shape[:2]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(train.derive_seed(seed, 1)))
    held, rest = order.tensor_split([n // 10 or 1])
    choices = list(itertools.product(
        range(1, blocks + 1), POOLINGS, (3e-3, 1e-2, 3e-2, .1), (1e-4, .1)))
    heads = train_heads(choices, train_x, train_y, rest, epochs, seed=seed)
    held_out, best = max(zip(measure_heads(heads, train_x[held], train_y[held]), choices))
    print0(f"best of {len(choices)} heads: block {best[0]}, {best[1]}, lr {best[2]}, weight decay {best[3]} "
           f"({100 * held_out:.1f} % of held-out training images)")
    head = train_heads([best], train_x, train_y, order, epochs, seed=seed)
    return measure_heads(head, test_x, test_y)


def evaluate(vit, train_ds, test_ds, device, workers=0, seed=0):
    """{"knn": ..., "linear": ...}: top-1 accuracies (0..1), all settings fixed; train.py's closing table.

    Of [class token, patch mean] after the final norm; the two differ in scale, so they are standardized.
    """
    features = extract(vit, (train_ds, test_ds), device, workers)
    return dict(knn=knn(*features), linear=linear(*features, seed=seed))


# --- the papers' networks: normalized images, or tokens (b, n) -> logits (b, heads, c) --------------------

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

    mae   class token (if none: patch mean) after the final norm -> BatchNorm without parameters -> linear
          layer (MAE, ClusterMIM); moments of the images that a process sees at once: up to 256 (MAE: 512)
    beit  [class token, patch mean] of every block -> a linear layer for each (BEiT, MaPeT)
    """

    def __init__(self, vit, classes, mae):
        super().__init__()
        self.frozen = [vit.eval()]                             # in a list: no part of this module
        self.mae = mae
        if mae:
            norm = nn.BatchNorm1d(vit.width, eps=1e-6, affine=False)
            self.heads = nn.Sequential(norm, Head(vit.width, classes, .01))
        else:
            width = (1 + vit.prefix) * vit.width
            self.heads = nn.ModuleList(Head(width, classes, .01) for _ in vit.blocks)

    def forward(self, images):
        x = pool_features(self.frozen[0], images, self.mae)
        if self.mae:
            return self.heads(x[:, -1, 0])[:, None]
        parts = zip(self.heads, x.flatten(2).unbind(1))
        return torch.stack([head(part) for head, part in parts], 1)


class Classifier(nn.Module):
    """Fine-tuning: mean of the patches -> a new norm (the encoder's own is dropped) -> linear layer."""

    def __init__(self, vit, classes, drop_path=0., head_std=.02):
        super().__init__()
        self.encoder = vit.requires_grad_(True)
        vit.norm = nn.Identity()
        for block, rate in zip(vit.blocks, drop_rates(drop_path, vit.depth)):
            block.drop_path.p = rate
        self.fc_norm = nn.LayerNorm(vit.width, eps=1e-6)
        self.head = Head(vit.width, classes, head_std)

    def forward(self, x):
        patches = self.encoder(x)[:, self.encoder.prefix:]
        return self.head(self.fc_norm(patches.mean(1)))[:, None]


class TokenMLP(nn.Module):
    """MaPeT Table 4: embedding -> linear -> ReLU -> mean over the positions -> linear: a bag of tokens.

    The widths are ViT-T's 192 and four times that: ours, as our copy of the paper lacks its digits.
    """

    def __init__(self, vocab_size, classes):
        super().__init__()
        self.table = nn.Embedding(vocab_size, 192)
        self.hidden = nn.Linear(192, 768)
        self.head = Head(768, classes)

    def forward(self, tokens):
        # What comes before the mean knows only the code: computed once for every code, not for every patch.
        codes = F.relu(self.hidden(self.table.weight)).float()
        return self.head(F.embedding_bag(tokens, codes, mode="mean"))[:, None]


class TokenEmbed(nn.Embedding):
    """A table of token vectors in place of the patch embedding: (b, n) -> (b, n, d)."""

    def forward(self, tokens, order=None):
        return super().forward(tokens)


def token_network(name, vocab_size, classes, grid, drop_path):
    """MaPeT Table 4's heads: mlp, or the named ViT on tokens, each of them a patch of one pixel."""
    if name == "mlp":
        return TokenMLP(vocab_size, classes)
    vit = MODELS[name](image_size=grid, patch_size=1, pos="learned")
    vit.patch_embed = TokenEmbed(vocab_size, vit.width)
    nn.init.trunc_normal_(vit.patch_embed.weight, std=.02)
    vit.image_size = vit.n_patches                             # an image of tokens is one row
    return Classifier(vit, classes, drop_path)


# --- their optimizers and recipes -------------------------------------------------------------------------

def layer_groups(model, weight_decay, layer_decay):
    """Parameter groups: the learning rate is multiplied by scale = layer_decay ^ (L + 1 - layer) (BEiT, MAE).

    layer 0: class token, positions, patch embedding; i + 1: block i; L + 1: the rest.
    """
    groups = []
    for name, p in model.named_parameters():
        part = name.split(".")
        below = 0                                              # how many layers this one is below the head
        if part[0] == "encoder":
            below = model.encoder.depth + 1
        if part[1] == "blocks":
            below -= int(part[2]) + 1
        groups.append(dict(
            params=[p], scale=layer_decay ** below,
            weight_decay=weight_decay * train.is_decayed(name, p)))
    return groups


class LARS(torch.optim.SGD):
    """SGD with momentum, a matrix moves in proportion to its own norm (You et al. 2017, as in MAE's code).

        g = gradient;  v <- momentum v + (0.001 |p| / |g|) g;  p <- p - lr v;  1-D: as in SGD
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    trust = .001 * p.norm() / p.grad.norm()
                    p.grad.mul_(trust.nan_to_num(1, 1))        # a gradient of 0 stays 0
        super().step()


# An explicit flag beats the recipe; what a recipe does not name is that of DEFAULTS, 0 unless said. base_lr:
# per 256 images, lr = base_lr * batch / 256. cosine="start": it begins at step 0, under the warm-up (timm).
ZERO = """min_lr clip_norm warmup_lr warmup_epochs weight_decay drop_path smoothing mixup erase
          randaugment"""
DEFAULTS = dict.fromkeys(ZERO.split(), 0.) | dict(
    cosine="warmup", layer_decay=1., head_std=.02, test_crop=.875, interpolation="bicubic")
# Linear probes. mae: He et al. 2022, App. A.1, as in ClusterMIM. beit: MaPeT Sec. D; our copy lacks rate
# and decay, which are of BEiT's code, as are bilinear crops and the decay of all parameters.
PROTOCOLS = {
    "mae": dict(
        DEFAULTS, base_lr=.1,
        batch_size=16384, epochs=90., warmup_epochs=10.),
    "beit": dict(
        DEFAULTS, lr=4e-3, weight_decay=1e-4,
        batch_size=1024, epochs=50., interpolation="bilinear")}
# Fine-tuning of ViT-B. mapet: Table 8; mae: App. A.1. RandAugment 9 is timm's m9 of 10.
STRONG = dict(
    DEFAULTS, batch_size=1024, epochs=100., min_lr=1e-6,
    weight_decay=.05, layer_decay=.65, drop_path=.1,
    smoothing=.1, mixup=.8, erase=.25, randaugment=9)
# Ours: the embedded data's class is an orientation and a period, so nothing may turn, flip or zoom it.
RECIPES = {
    "mapet": dict(
        STRONG, lr=5e-4, test_crop=.9,
        warmup_epochs=20., warmup_lr=1e-6, cosine="start"),
    "mae": dict(STRONG, base_lr=5e-4, warmup_epochs=5., head_std=2e-5),
    "textures": dict(
        DEFAULTS, lr=2e-3, min_lr=1e-6, weight_decay=.05,
        batch_size=64, epochs=10., warmup_epochs=1., smoothing=.1)}
BY_WIDTH = {
    ("mapet", 192): dict(lr=2.5e-4, epochs=300., layer_decay=1.),
    ("mapet", 384): dict(lr=5e-3, epochs=200.),
    ("mae", 1024): dict(base_lr=1e-3, epochs=50., layer_decay=.75, drop_path=.2)}
# Ours: MaPeT states no recipe for its Table 4. The second is for textures, on two CPU cores.
TOKENS = dict(
    DEFAULTS, lr=1e-3, weight_decay=.05, smoothing=.1,
    batch_size=1024, epochs=100., warmup_epochs=5., drop_path=.1)
SMALL_TOKENS = dict(TOKENS, batch_size=128, epochs=20., warmup_epochs=1.)


# --- what is trained on -----------------------------------------------------------------------------------

def test_view(ds, args):
    """The center 224 of 256 pixels a side (MaPeT's fine-tuning: of 248), from the whole picture."""
    if not ds.transform:
        return ds
    return ds.view(v2.Compose([
        train.center_square(int(ds.image_size / args.test_crop)),
        v2.CenterCrop(ds.image_size)]))


def training_view(ds, args):
    """Random crops, mirrored; by the recipe RandAugment, and random erasing, which gives normalized floats.

    torchvision's crops for all; MAE's linear probe has TensorFlow's, of one draw.
    """
    size, interpolation = ds.image_size, InterpolationMode(args.interpolation)
    steps = [
        v2.RandomResizedCrop(size, interpolation=interpolation),              # 8 % of the area, or more
        v2.RandomHorizontalFlip()]
    if args.data == "textures":                                 # shifted, a twelfth of a side
        steps = [v2.RandomCrop(size, padding=size // 12, padding_mode="reflect")]
    if args.randaugment:
        # timm's two operations, each with probability 1/2; its 9 of 10 is 27 of torchvision's 31. Not timm's:
        # torchvision has other operations, all of which grow with the magnitude (timm: "inc1"), and no noise
        # on it (mstd 0.5). PIL's rotations are the faster ones.
        fill = [round(255 * m) for m in ds.mean]
        maybe = v2.RandomApply([
            v2.RandAugment(1, 3 * args.randaugment, 31, interpolation, fill)], .5)
        steps += [v2.ToPILImage(), maybe, maybe, v2.ToImage()]
    if args.erase:                                             # by noise of unit variance: normalized
        steps += [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(ds.mean, ds.std),
            v2.RandomErasing(args.erase, value="random")]
    return ds.view(v2.Compose(steps), seed=args.seed)


# --- training and scoring ---------------------------------------------------------------------------------

def fit(model, ds, args):
    """Train by the recipe. A checkpoint in OUT is gone on from, if it is of the same settings."""
    name = f"{args.out}/{args.what}-{args.variant}-{Path(args.data).name}"
    # Of a small data set all images, but a multiple of 256, which 2, 4 or 8 processes can share.
    args.batch_size = min(args.batch_size, len(ds) // 256 * 256 or len(ds))
    args.lr = args.lr or args.base_lr * args.batch_size / 256
    # RUN may have another name by now: its weights count.
    settings = train.fixed_settings(args) | dict(run=None, images=len(ds), labels=str(ds.classes))
    if args.fresh:
        Path(f"{name}.pt").unlink(missing_ok=True)
    train.check_settings(f"{name}.json", settings, args.fresh)
    mix = v2.Identity()
    if args.mixup:                                             # or CutMix, the same chance
        classes = len(ds.classes)
        mix = v2.RandomChoice([v2.MixUp(alpha=args.mixup, num_classes=classes),
                               v2.CutMix(num_classes=classes)])

    def compute_loss(net, images, labels, read, step, rows):
        x, labels = mix(prepare(images, ds), labels)
        return sum(
            F.cross_entropy(logits, labels, label_smoothing=args.smoothing)
            for logits in net(x).unbind(1)), {}

    if args.what != "linear":
        optimizer = torch.optim.AdamW(layer_groups(model, args.weight_decay, args.layer_decay), fused=True)
    elif args.protocol == "mae":
        optimizer = LARS(model.parameters(), momentum=.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay)
    step, steps = train.train(model.train(), optimizer, ds, args, compute_loss, args.device, f"{name}.pt")
    if step < steps:
        raise SystemExit                                       # without a result


def load_head(model, path):
    """The norm and the linear layer of a fine-tuned network: ours, MAE's, MaPeT's."""
    state = unwrap_weights(read_checkpoint(path), path)
    try:
        for key, value in model.state_dict().items():
            if not key.startswith("encoder."):
                value.copy_(state[key])
    except (KeyError, RuntimeError):
        raise ValueError(f"{path}: --epochs 0 scores a fine-tuned network: a file with fc_norm and with "
                         "a head for the classes of --data") from None


def keep_tokens(ds, tokenizer, args):
    """Tokens (n,) int32 in place of the images; they are made once, for all heads."""
    about = f"{args.weights} {ds.name} {len(ds)} {ds.classes}"
    path = f"{args.out}/tokens-{zlib.crc32(about.encode()):08x}.npy"
    tokens = tokenize(tokenizer, ds, path, args.workers, args.device).astype("int32")
    return ds.view(None, load=torch.from_numpy(tokens).__getitem__)


def learn(args, network, splits):
    """Top-1 accuracies (0..1) of each head that learns by a recipe, on what the encoder or tokenizer says."""
    weights = nn.utils.parameters_to_vector(network.state_dict().values())
    args.weights = zlib.crc32(weights.cpu().numpy())           # what a checkpoint was trained on
    torch.manual_seed(args.seed)
    ds, test_ds = splits
    classes = len(ds.classes)
    if args.what == "tokens":
        train.fill_in(args, SMALL_TOKENS if args.data == "textures" else TOKENS)
        grid = network.image_size // network.patch_size
        model = token_network(args.head, network.vocab_size, classes, grid, args.drop_path)
        ds, test_ds = (keep_tokens(ds, network, args) for ds in splits)
    else:
        if args.what == "linear":
            train.fill_in(args, PROTOCOLS[args.protocol])
            model = LinearProbe(network, classes, args.protocol == "mae")
        else:
            train.fill_in(args, RECIPES[args.recipe] | BY_WIDTH.get((args.recipe, network.width), {}))
            model = Classifier(network, classes, args.drop_path, args.head_std)
        ds, test_ds = training_view(ds, args), test_view(test_ds, args)
    model.to(args.device)
    if args.epochs:
        fit(model, ds, args)
    else:
        load_head(model, args.run)
    logits, labels = infer(model.eval(), test_ds, args.device, args.workers)
    return (logits.argmax(-1) == labels[:, None]).double().mean(0).tolist()


# --- commands ---------------------------------------------------------------------------------------------

@torch.no_grad()
def show(args, vit, ds):
    """OUT/show.png: images, and three principal components of their patches' features as colors."""
    images, _, _ = sample_images(ds, 6, args.device)
    features = vit.eval()(prepare(images, ds))
    colors, = principal_colors(features[:, vit.prefix:])
    patches = colors.repeat(1, 1, vit.patch_size ** 2)
    rows = {"image": images / 255, "features": unpatchify(patches, vit.patch_size)}
    draw_rows(rows, f"{args.out}/show.png")


# --- runs side by side ------------------------------------------------------------------------------------

def compare(args):
    """Accuracies of train.py's closing table: mean and deviation over seeds.

    Runs of one objective, data and settings but the seed are a group, named after its first run; all other
    groups are compared with the first one, seed by seed.
    """
    groups = {}
    for folder in args.run:
        end, why = train.read_summary(folder)
        if why:
            print(f"{folder}: left out, {why}")
            continue
        _, by_seed = groups.setdefault(str(end["settings"] | {"seed": None}), (folder, {}))
        by_seed[end["seed"]] = 100 * torch.tensor([end["knn"], end["linear"]])
    if not groups:
        return
    (first, base), *_ = groups.values()
    print("top-1 %: mean ± deviation over seeds; of a difference ± its standard error\n"
          f"{'runs':<36}  seeds  {'k-NN':<12}  linear probe")
    for name, by_seed in groups.values():
        print_row(name, [*by_seed.values()])
        paired = [by_seed[seed] - base[seed] for seed in by_seed if seed in base]
        if paired and name != first:
            print_row(f"    minus {first}", paired, len(paired) ** .5)


def print_row(name, values, divisor=1):
    """values: (k-NN, linear probe) of each seed; of one seed there is no deviation."""
    columns = []
    for x in torch.stack(values).T:
        deviation = f" ± {x.std() / divisor:.1f}" if len(x) > 1 else ""
        columns.append(f"{x.mean():.1f}{deviation}")
    print(f"{name:<36}  {len(values):<5}  {columns[0]:<12}  {columns[1]}")


# --- what the arguments name ------------------------------------------------------------------------------

def open_network(args):
    """On --device: the encoder that RUN names, or, for tokens, the tokenizer."""
    if args.what == "tokens":
        network = load_tokenizer(f"{args.run}/tokenizer.pt" if os.path.isdir(args.run) else args.run)
        args.image_size = network.input_size
    else:
        source = args.run
        if source in MODELS:                                   # untrained
            torch.manual_seed(args.seed)
            source = MODELS[source]().state_dict()
        network = from_weights(source, args.image_size, args.heads)
        args.image_size = network.image_size
    return network.to(args.device)


def open_data(args):
    """[training set, test set], with labels: of --data, or of what RUN (a run's folder or file) was made of.

    Fills in what follows from RUN: --data and --classes, --out, --workers, --recipe.
    """
    path = Path(args.run)
    folder = path if path.is_dir() else path.parent
    file = folder / "settings.json"
    settings = json.loads(file.read_text()) if file.exists() else {}
    args.out = args.out or (folder if settings else f"runs/{path.stem}")
    if args.data is None:
        args.data = settings.get("data", "textures")
        args.classes = args.classes or settings.get("classes")
    args.recipe = args.recipe or ("textures" if args.data == "textures" else "mapet")
    args.variant = dict(linear=args.protocol, finetune=args.recipe, tokens=args.head).get(args.what)
    *splits, why = train.open_splits(args.data, args.image_size, args.classes)
    if None in splits:
        raise ValueError(f"--data {args.data}: {why}; a probe needs labels: train/CLASS/ and val/CLASS/")
    if settings.get("preset") == "laptop":
        splits = list(map(train.keep_squares, splits))
    if args.workers is None:
        args.workers = train.default_workers(splits[0])
    os.makedirs(args.out, exist_ok=True)
    return splits


# --- command line -----------------------------------------------------------------------------------------

CHOICES = {
    "protocol": ["fast", *PROTOCOLS],
    "recipe": list(RECIPES),
    "head": ["mlp", *MODELS]}
# Type -> flags -> help. A flag beats the recipe.
FLAGS = {
    str: {
        "protocol": "linear: many heads on stored features (default), or a paper's probe "
                    "(beit: of each block, the last counts)",
        "recipe": "finetune (default: textures for textures, else mapet)",
        "head": "tokens: the network (default mlp; MaPeT has mlp and vit_tiny)",
        "data": "as in train.py (default: what the run was trained on, else textures)",
        "classes": "file with the class folders to keep, one a line",
        "out": "folder of what is written (default: the run's)",
        "device": "cuda, cpu (default: cuda if there is one)"},
    int: {
        "heads": "attention heads of an encoder of unusual width",
        "image-size": "pixels a side (default: the encoder's)",
        "seed": "of weights, order and transforms (default 0)",
        "workers": "loading processes of each process (default: its share of the cores)",
        "batch-size": "images a step, over all processes",
        "micro-batch": "images at once on one process",
        "steps": "stop after so many optimizer steps of the schedule"},
    float: {
        "epochs": "passes over the training images; finetune --epochs 0 scores a file's network as it is",
        "lr": "peak learning rate, as used"}}


def parse(argv):
    parser = argparse.ArgumentParser(description="What an encoder has learned, by both papers' evaluations.")
    add = parser.add_argument
    add("what", choices="knn linear finetune tokens show compare".split(),
        help="k-NN; a linear layer on frozen features; all trained on labels; classes from the tokens alone; "
             "a picture; accuracies of several runs")
    add("run", nargs="+",
        help="a run's folder, a timm, DINO, DeiT, MAE or MaPeT file, a public name, or, untrained, one of "
             f"{', '.join(MODELS)}; tokens: a tokenizer.pt")
    for kind, flags in FLAGS.items():
        for flag, text in flags.items():
            add(f"--{flag}", type=kind, choices=CHOICES.get(flag), help=text)
    add("--fresh", action="store_true", help="start over instead of going on from what is in --out")
    parser.set_defaults(seed=0, protocol="fast", head="mlp", log_every=50, save_every=500)
    args = parser.parse_args(argv)
    # Of 0 epochs there is a result only by the head that a file has.
    train.check_numbers(parser, args, {"seed", "workers", args.what == "finetune" and "epochs"})
    return args


def run(args):
    """Measures, prints the result, and appends it to OUT/probe.jsonl."""
    args.run, *more = args.run
    if more:
        raise ValueError(f"{args.what} takes one RUN")
    args.device = train.setup(args.device)
    args.compile = args.what == "finetune" and args.device.type == "cuda" and train.has_compiler()
    network = open_network(args)
    splits = open_data(args)
    where = args.device, args.workers
    if args.what == "show":
        return show(args, network, splits[1])
    if args.what == "knn":
        by_head = [knn(*extract(network, splits, *where))]
    elif args.variant == "fast":
        features = extract(network, splits, *where, slice(None))
        by_head = choose_head(*features, round(args.epochs or 30), args.seed)
    else:
        by_head = learn(args, network, splits)
    # BEiT prints the best block on the test images; the last block's is the number that nobody chose.
    print0(args.what, *[f"{100 * accuracy:.1f}" for accuracy in by_head], f"% ({args.run}, {args.data})")
    line = dict(
        what=args.what, protocol=args.variant, source=args.run,
        data=args.data, seed=args.seed, heads=by_head)
    line[args.what] = by_head[-1]
    train.append_metrics(f"{args.out}/probe.jsonl", **line)
    return line


def main(argv=None):
    args = parse(argv)
    with exit_on_error("probe.py"):
        return compare(args) if args.what == "compare" else run(args)


if __name__ == "__main__":
    main()
