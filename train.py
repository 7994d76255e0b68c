"""Data, the one training loop, checkpoints.

torchrun --nproc_per_node 1 train.py --objective mapet                    embedded data, two CPU cores, minutes
torchrun --nproc_per_node 8 train.py --objective mapet --data IMAGENET    the paper's recipe, MaPeT Table 7

One command goes the whole way: images -> K-means tokens -> pre-training -> k-NN and linear probe. What it
makes is in --out, and the same command again goes on where it stopped.

Nothing depends on when or where it runs: the order of the images, their augmentation, the permutations z and
the stochastic depth of step s are functions of (seed, s) for the *global* batch, of which each process takes
its rows. So a resumed run equals an unbroken one bit for bit (on the CPU), and 1, 2 or 8 processes run the
same experiment.

Read down to the ruled line: recipes of both papers, order of the images, learning rate, targets, the loop.
Below it, to be skipped at first: data sets, the run's files, tokens, the command line.
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import timeit
import zipfile
import zlib

import numpy as np
import torch
import torchvision.datasets as tv
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import kmeans
import objectives
import tcas
from kmeans import (all_gather, all_reduce, barrier, catch_signals, derive_seed, first_on_machine, make_loader, print0,
                    rank_and_world, setup)
from vit import (MODELS, count_flops, draw_plot, exit_on_error, normalize, read_checkpoint, save, save_plots,
                 to_channels, to_device, write_atomically)

try:
    from torchvision.io import decode_jpeg, read_file
except ImportError:                         # torchvision 0.29 says that it will move its decoders out
    decode_jpeg = None

# --- recipes: an explicit flag beats the recipe -----------------------------------------------------------

# MaPeT: Table 7, for ImageNet and every other folder of images; the rows of MaPeT's own tables. Lost in our text:
# the cutting points of ViT-T, S and B (B gets Table 6's best, 70 % hidden, T and S the released code's 75 %). Not
# stated: PIM's (MaPeT's), MIM's hidden share (BEiT's), positions and weights of its CAE (CAE's code).
# ClusterMIM: Sec. 4.1, ViT-S, B and L alike. Not stated: base learning rate and warm-up (MAE's), and whether its
# MAE row standardized the pixels (the released code's default: no).
# textures: ours, for two CPU cores; learning rate, cut and K were chosen on its split "val".
SETTINGS = {            # MaPeT, ClusterMIM, textures
    "model":            ("vit_base", "vit_base", "vit_micro", "size of the ViT"),
    "image_size":       (224, 224, 48, "pixels a side"),
    "patch_size":       (16, 16, 8, "pixels a side"),
    "pos":              ("learned", "sincos", "sincos", "positions: learned, or sincos: fixed"),
    "init":             ("timm", "mae", "timm", "weights: timm's std 0.02, or mae: Xavier"),
    "drop_path":        (.1, 0., 0., "stochastic depth of the last block"),
    "layer_scale":      (.1, 0., 0., "initial LayerScale, 0 = none"),
    "decoder_depth":    (4, 8, 1, "blocks: of mae, maskfeat, clustermim; of cae's regressor and decoder"),
    "features":         ("clip", "pixel", None, "what K-means clusters: pixel, pixel-norm, hog, dino, deit, mae, "
                         "clip or a ViT's file; what mae (pixel, pixel-norm), maskfeat (hog, dino, ...) predict"),
    "vocab_size":       (8192, 50, None, "codebook size K"),
    "fraction":         (.05, .05, .05, "of each image's patches, for K-means (ClusterMIM's code takes all)"),
    "label_smoothing":  (0., 0., 0., "of the cross-entropy with tokens"),
    "crop":             (0., .2, 0., "least area of a random crop, half of them mirrored; 0: center square"),
    "jitter":           (.4, 0., 0., "color jitter: brightness, contrast, saturation"),
    "epochs":           (300., 200., 6., "passes over the data: the schedule's length"),
    "batch_size":       (2048, 4096, 32, "images a step, over all processes"),
    "lr":               (1.5e-3, None, 1.5e-3, "peak learning rate, as used"),
    "base_lr":          (None, 1.5e-4, None, "the same per 256 images: lr = base lr * batch / 256"),
    "min_lr":           (1e-5, 0., 1e-5, "at the end of the cosine"),
    "warmup_lr":        (1e-6, 0., 1e-6, "at the first step"),
    "warmup_epochs":    (10., 40., .3, "linear warm-up; fewer --epochs shrink it"),
    "cosine":           ("start", "warmup", "warmup", "begins at step 0 (start), or after the warm-up"),
    "weight_decay":     (.05, .05, .05, "AdamW, on matrices only"),
    "beta2":            (.999, .95, .95, "AdamW"),
    "clip_norm":        (3., 0., 1., "largest gradient norm, 0 = any"),
    "save_every":       (1000, 1000, 200, "steps between checkpoints"),
}
MAPET, CLUSTERMIM, TEXTURES = ({key: row[i] for key, row in SETTINGS.items()} for i in range(3))
# Learned tokenizers: VQ-KD's recipe (BEiT v2's code); its teacher is CLIP's ViT-B/16, here DINO's. The others' are
# for convolutions: what is not named is VQ-KD's. DALL-E's is of its App. A, VQGAN's of its code (4.5e-6 an image).
VQKD = dict(MAPET, features="dino_vitb16", vocab_size=8192, decoder_depth=3, crop=.08, jitter=0., layer_scale=0.,
            drop_path=0., epochs=100., batch_size=512, lr=2e-4, weight_decay=1e-4, beta2=.99, clip_norm=0.,
            cosine="warmup")
# MaskFeat is the row of ClusterMIM's tables; its own paper's recipe is for mask tokens in the encoder.
PAPERS = dict(
    mae=dict(CLUSTERMIM, vocab_size=None), maskfeat=dict(CLUSTERMIM, vocab_size=None, features="hog"),
    clustermim=CLUSTERMIM, cae=dict(MAPET, pos="sincos", init="mae"), beit=MAPET, mim=MAPET, pim=MAPET, mapet=MAPET,
    dvae=dict(VQKD, features="pixel", lr=1e-4, min_lr=1.25e-6, beta2=.999),
    vq=dict(VQKD, features="pixel", vocab_size=1024, batch_size=64, lr=64 * 4.5e-6),
    peco=dict(VQKD, batch_size=128, lr=5e-5, beta2=.999), vqkd=VQKD)
SMALL = {"cifar10": (32, 4), "cifar100": (32, 4), "stl10": (96, 12)}     # ours: pixels a side, of a patch


def recipe(objective, data, model=None):
    """The settings of an objective on a data set, as a dict of flags; `model`: of --model, or None."""
    kind, _, mask_ratio = objectives.OBJECTIVES[objective]
    chosen = dict(PAPERS[objective], mask_ratio=mask_ratio)
    teacher = "hog" if objective in ("peco", "vqkd") else "pixel"  # on small data: ours, no download
    codebook = dict(features=teacher, vocab_size=64) if chosen["vocab_size"] else {}
    if data in SMALL:
        size, p = SMALL[data]
        chosen.update(codebook, model="vit_tiny", batch_size=512, image_size=size, patch_size=p)
    if objective in ("pim", "mapet") and (model or chosen["model"]) == "vit_base":
        chosen["mask_ratio"] = .7                                     # MaPeT Table 6
    if data == "textures":
        hidden = mask_ratio and (.75 if kind is objectives.MaskedAutoencoder else .5)
        features = codebook.get("features", chosen["features"])
        chosen.update({**TEXTURES, **codebook, "features": features}, mask_ratio=hidden)
        if objective in objectives.TOKENIZERS:  # 3 epochs are enough, and std 0.02 starts slowly
            chosen.update(epochs=3., init="mae")
    return chosen


# --- what a step is: which images, which learning rate, which parameters, which targets -------------------

def schedule(n, batch, seed, start, stop, rows, accumulate):
    """Yields, for each micro-batch of this process, its items (epoch, i); steps start..stop-1.

    An epoch is a permutation of the n images, cut into global batches; the rest is dropped. It is a function of
    (seed, epoch) alone, different for different pairs, and drawn once an epoch, not at each step.
    `rows` is this process's slice of the global batch, handed out in `accumulate` equal micro-batches.
    """
    per_epoch, order = n // batch, None
    for step in range(start, stop):
        epoch, k = divmod(step, per_epoch)
        if order is None or k == 0:
            generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
            order = torch.randperm(n, generator=generator)
        mine = order[k * batch:(k + 1) * batch][rows].tolist()
        micro = len(mine) // accumulate
        for m in range(accumulate):
            yield [(epoch, i) for i in mine[m * micro:(m + 1) * micro]]


def learning_rate(step, steps, warmup, peak, start, end, cosine="warmup"):
    """Linear warm-up from `start` to `peak`, then half a cosine down to `end`, step by step.

    cosine   "warmup": it begins after the warm-up (MAE, ClusterMIM, BEiT); "start": at step 0 (MaPeT, timm)
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    first = warmup if cosine == "warmup" else 0
    done = (step - first) / max(1, steps - first)
    return end + (peak - end) * .5 * (1 + math.cos(math.pi * done))


def make_optimizer(model, args):
    """AdamW; weight decay on matrices only: not on biases, norms, LayerScale, positions, class token.

    The mask token, (1, 1, d), is decayed, as in the released code (ClusterMIM's also decays the class token).
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    free = {name for name, p in trained.items() if p.ndim < 2 or name.endswith(("pos_embed", "cls_token"))}
    decayed = [p for name, p in trained.items() if name not in free]
    groups = [dict(params=decayed, weight_decay=args.weight_decay),
              dict(params=[trained[name] for name in trained if name in free], weight_decay=0.)]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(.9, args.beta2), fused=True)


def build(args, size):
    """The objective around a new ViT, initialized by the seed; size: of its codebook, or of its features."""
    torch.manual_seed(args.seed)
    vit = MODELS[args.model](image_size=args.image_size, patch_size=args.patch_size, drop_path=args.drop_path,
                             layer_scale=args.layer_scale or None, pos=args.pos, init=args.init)
    teacher = "hog" if args.features == "hog" else "features"
    target = dict(mae=args.features, maskfeat=teacher).get(args.objective)
    mask_ratio = args.mask_ratio if args.cut is None else None
    vocab_size = args.vocab_size if args.objective in objectives.TOKENIZERS else size
    return objectives.make(args.objective, vit, vocab_size, args.cut, mask_ratio, target, args.label_smoothing,
                           args.decoder_depth, values=size)


class Targets:
    """What an objective is given besides images. Tokenizer and teacher stay outside the model: no gradient, no
    weight decay, no room in checkpoints, no initialization that wipes them (a trap in ClusterMIM's code).

    stored  tokens (images, n) of the center squares, extracted once (MaPeT); or None
    make    function of uint8 images, as augmented: tokens (b, n), or features (b, n, size); or None
    size    codebook size, or values a patch
    layers  normalized images -> [(b, rows, d), ...]: what a perceptual loss compares (PeCo); or None
    """

    def __init__(self, stored=None, make=None, size=None, layers=None):
        self.stored, self.make, self.size, self.layers = stored, make, size, layers

    def of(self, images, indices=None):
        """Tokens or features of uint8 images (b, 3, S, S); indices: theirs in the training set, or None."""
        if self.stored is not None and indices is not None:
            return to_device(torch.from_numpy(self.stored[indices.numpy()].astype(np.int64)), images.device)
        return self.make(images) if self.make else None


# --- the loop ---------------------------------------------------------------------------------------------

def train(args, ds, targets, state, device, lap=lambda phase: None):
    """Pre-train from the checkpoint `state` (or None): (objective, step, steps), or None when a signal came.

    Writes last.pt and metrics.jsonl as it goes, encoder.pt at the end. lap: told when a phase of a step ends.
    """
    rank, world = rank_and_world()
    per_epoch = len(ds) // args.batch_size
    steps, warmup = max(1, round(args.epochs * per_epoch)), round(args.warmup_epochs * per_epoch)
    stop_at = min(steps, args.steps or steps)
    share, micro = divide_batch(args, world)                   # images of this process: a step; at once
    accumulate, mine = share // micro, slice(rank * share, (rank + 1) * share)

    # --- model, optimizer, where we are, images
    model = build(args, targets.size).to(device)
    model.layers = targets.layers
    optimizer = make_optimizer(model, args)
    step = saved = state["step"] if state else 0
    if state:
        restore_state(state, model, optimizer)
        print0(f"going on from {args.out}/last.pt at step {step}")
    if step == 0 and args.objective in ("vq", "peco", "vqkd"):
        start_codebook(args, model, ds, device, mine, micro)
    log = Log(args, model, targets, state, device)
    print0(f"{describe(model, args)}. {steps} steps of {args.batch_size} images ({world} processes x {accumulate} x "
           f"{micro}), lr {args.lr:g}, {'bfloat16' if device.type == 'cuda' else 'float32'} on {device}")
    if args.compile:
        model.compile()                                             # in place, so that parameter names stay
    net = model if world == 1 else DistributedDataParallel(
        model, [device] if device.type == "cuda" else None, broadcast_buffers=False, gradient_as_bucket_view=True)
    images_of = Augmented(ds, random_crop(ds.image_size, args.crop) if args.crop else None, args.seed)
    jitter = ColorJitter(args.jitter, len(ds), args.seed)
    keys = schedule(len(ds), args.batch_size, args.seed, step, stop_at, mine, accumulate)
    loader = iter(make_loader(images_of, keys, args.workers, device))

    generator, saved_at = torch.Generator(device), time.time()
    with catch_signals() as ask_all:
        while step < stop_at:
            # --- one step: a function of (seed, step) and the parameters
            lr = learning_rate(step, steps, warmup, args.lr, args.warmup_lr, args.min_lr, args.cosine)
            for group in optimizer.param_groups:
                group["lr"] = lr
            order = model.draw_order(args.batch_size, derive_seed(args.seed, step), device, mine)
            generator.manual_seed(derive_seed(args.seed, step, 1))      # for stochastic depth
            noise = torch.rand(model.noise_rows, args.batch_size, device=device, generator=generator)[:, mine]
            for m in range(accumulate):
                lap("targets")
                images, _, wanted, read = next(loader)
                lap("waiting for data")
                ds.note_unreadable(wanted, read)
                images = jitter(images.to(device, non_blocking=True), step // per_epoch, wanted)
                given, part = targets.of(images, read), slice(m * micro, (m + 1) * micro)
                lap("targets")
                last = m == accumulate - 1
                # All micro-batches make one gradient: the processes exchange it once, with the last.
                with contextlib.nullcontext() if world == 1 or last else net.no_sync():
                    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        loss, logs = net(normalize(images, ds), given, order=order[part], noise=noise[:, part])
                    lap("forward")
                    (loss / accumulate).backward()
                lap("backward")
                log.add(loss, logs)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm or math.inf)

            # --- is it due to log, to save, to stop?
            request = ask_all(late=time.time() > saved_at + 60 * args.save_minutes)     # 1: to save, 2: to stop
            log_due = (step + 1) % args.log_every == 0 or step + 1 in (1, stop_at)
            save_due = (step + 1) % args.save_every == 0 or step + 1 == stop_at or request > 0
            # The norm is the same on every process, and not finite if any loss is not. To read it, the CPU must wait
            # for the GPU: there only before a log or a save, so that no broken weights are saved.
            if (device.type == "cpu" or log_due or save_due) and not torch.isfinite(norm + log.sums[0]):
                kept = f"{args.out}/last.pt keeps step {saved}" if saved else "No checkpoint was written yet"
                raise ValueError(f"step {step + 1}: the loss or its gradient is not finite. {kept}; "
                                 f"try a lower --lr (now {args.lr:g})")
            model.before_step()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            model.end_step(step / steps, all_reduce, all_gather)
            lap("optimizer")
            if log_due:
                log.write(step, step / per_epoch, lr, steps)
            if save_due:
                saved, saved_at = step, time.time()
                state = collect_state(model, optimizer, args, step, epoch=step // per_epoch, sums=log.add_up())
                if rank == 0:
                    save(state, f"{args.out}/last.pt")
            lap("log, save")
            if request == 2:
                return print0(f"stopped at step {step} by a signal; the same command goes on from there")
    if rank == 0:
        save({key: value.cpu() for key, value in model.encoder.state_dict().items()}, f"{args.out}/encoder.pt")
    barrier()
    return model, step, steps


# ==========================================================================================================
# Machinery. The method ends here: what follows reads data, keeps the run's files and parses the command line.
# ==========================================================================================================

def render_textures(seed, indices, size=48):
    """Images `indices` of stream `seed`: float32 (m, 3, size, size), unit variance; labels (m,) int64.

    label = 5 * period + orientation of the stripes that fill the object. All else is nuisance: its shape and
    pose, stripe phase, contrast and bending, colors, a fainter striped background (the class is what the
    *object* is made of) and pixel noise (raw pixels are weak). The phase of bent stripes cannot be told from
    their neighbors, orientation and period can: a mean-squared prediction of a hidden patch is nearly flat,
    a distribution over tokens still says which texture it is.
    """
    rngs = [np.random.default_rng([seed, int(index)]) for index in indices]  # and on nothing else
    draws = np.array([rng.random(40) for rng in rngs], np.float32).T[:, :, None, None]         # (40, m, 1, 1)
    noise = np.array([rng.standard_normal((3, size, size), np.float32) for rng in rngs])
    between = lambda low, high, u: low + (high - low) * u
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32)

    def stripes(angle, period, u):                               # 6 or 9 cycles per image, random phase, bent
        bend_x = np.sin(between(5, 9, u[0]) * x + between(0, 6.3, u[1]))
        bend_y = np.sin(between(5, 9, u[2]) * y + between(0, 6.3, u[3]))
        along = x * np.cos(angle) + y * np.sin(angle)
        return np.sin((6 + 3 * period) * math.pi * along + .8 * (bend_x + bend_y) + between(0, 6.3, u[4]))

    def paint(pattern, u):                                       # (m, 3, size, size), in a random color
        gray = between(-.25, .25, u[0])
        return np.stack([gray + between(-.15, .15, channel) + pattern for channel in u[1:4]], 1)

    label = np.floor(10 * draws[0])
    period, orientation = np.divmod(label, 5)
    angle = orientation * math.pi / 5 + between(-.12, .12, draws[7])
    contrast = .45 * between(.6, 1.4, draws[6])
    foreground = paint(contrast * stripes(angle, period, draws[8:13]), draws[13:17])
    angle, period = between(0, math.pi, draws[17]), np.floor(2 * draws[18])
    background = paint(.25 * stripes(angle, period, draws[19:24]), draws[24:28])

    square, scale, turn = np.floor(2 * draws[1]), between(.75, .9, draws[2]), between(-.15, .15, draws[3])
    a, b = (x - between(-.2, .2, draws[4])) / scale, (y - between(-.2, .2, draws[5])) / scale
    a, b = a * np.cos(turn) + b * np.sin(turn), b * np.cos(turn) - a * np.sin(turn)      # object coordinates
    radius = np.hypot(a, b)
    ring = (radius < 1.05) & (radius > .5)
    inside = np.where(square, np.maximum(abs(a), abs(b)) < .85, ring)[:, None]
    return (np.where(inside, foreground, background) + .3 * noise) / .45, label.ravel().astype(np.int64)


class Textures(Dataset):
    """The embedded data in memory: .images (n, 3, 48, 48) uint8, whose 256 levels span +-3.5 deviations."""
    mean, std, image_size = (.5, .5, .5), (1 / 7, 1 / 7, 1 / 7), 48
    classes = [f"{cycles} cycles at {angle} degrees" for cycles in (6, 9) for angle in range(0, 180, 36)]
    streams = {"train": (1, 12000), "test": (2, 2000), "val": (3, 2000)}      # "val" is for choosing anything

    def __init__(self, split):
        seed, n = self.streams[split]
        parts = [render_textures(seed, range(i, i + 250)) for i in range(0, n, 250)]
        levels = [np.clip(np.rint((values / 7 + .5) * 255), 0, 255).astype(np.uint8) for values, _ in parts]
        self.images = torch.from_numpy(np.concatenate(levels))
        self.labels = np.concatenate([labels for _, labels in parts])
        self.name, self.transform = f"textures/{split}", v2.Identity()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), int(self.labels[i]), i

    def note_unreadable(self, wanted, read):
        """Nothing here can be damaged; see Pictures."""


# --- pictures of any kind ---------------------------------------------------------------------------------

def center_square(size):
    """Short side resized (bicubic), then cropped: what MaPeT's images and their stored tokens share."""
    return v2.Compose([v2.Resize(size, InterpolationMode.BICUBIC), v2.CenterCrop(size)])


class Pictures(Dataset):
    """Pictures of any size and mode -> center square uint8 (3, S, S), label (-1: none), index really read.

    names    (n,) of the files in folder `root`, as bytes: an array is shared by forked loading processes, a list
             would be copied page by page; or None with `source`, whose items begin with a PIL image
    labels   (n,) int64 or None; classes: their names or None
    squares  Squares or None: center squares that were decoded before
    A neighbor stands in for a damaged picture, because a run of days must not die of one file.
    """
    mean, std = (.485, .456, .406), (.229, .224, .225)           # of ImageNet, on the scale 0..1

    def __init__(self, name, root, names, labels, classes, image_size, source=None):
        self.name, self.root, self.names, self.classes, self.source = name, root, names, classes, source
        self.image_size, self.transform, self.squares = image_size, center_square(image_size), None
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.unreadable = set()

    def __len__(self):
        return len(self.names if self.source is None else self.source)

    def path(self, i):
        return os.path.join(self.root, f"picture {i}" if self.names is None else os.fsdecode(self.names[i]))

    def load(self, i):
        """The whole picture i, uint8 (3, H, W)."""
        return read_rgb(self.path(i)) if self.source is None else pil_to_tensor(self.source[i][0].convert("RGB"))

    def open(self, i):
        """Picture i, transformed; decoded only if its square was not kept."""
        if self.squares is None:
            return self.transform(self.load(i))
        square = self.squares.read(i)
        if square is None or self.image_size != self.squares.size:  # k-CLIP's tokens want twice the pixels
            picture = self.load(i)
            image = self.transform(picture)
            if square is None:
                self.squares.write(i, image if self.image_size == self.squares.size else
                                   center_square(self.squares.size)(picture))
            return image
        return square

    def __getitem__(self, i):
        for j in [(i + k) % len(self) for k in range(100)]:
            with contextlib.suppress(Exception):                 # decoders raise half a dozen kinds
                return self.open(j), -1 if self.labels is None else int(self.labels[j]), j
        raise OSError(f"{self.path(i)} and its neighbors cannot be read: is the folder still there?")

    def note_unreadable(self, wanted, read):
        """Name the pictures for which a neighbor stood in; more than 1 % is an error. Indices (b,)."""
        for i in set(wanted[wanted != read].tolist()) - self.unreadable:
            self.unreadable.add(i)
            count = f"{len(self.unreadable)} of {len(self)}"
            tqdm.write(f"cannot read {self.path(i)}: its neighbor stands in ({count} so far)", sys.stderr)
            if len(self.unreadable) > .01 * len(self):
                raise OSError(f"{count} pictures cannot be read, more than 1 %: the first is "      # its own
                              f"{self.path(min(self.unreadable))}; replace or remove them")


def read_rgb(path):
    """Any picture file -> uint8 (3, H, W) as a viewer shows it: EXIF rotation, 16-bit grays scaled, on white.

    Plain JPEGs by torchvision's decoder, whose pixels are PIL's; all else, also what it refuses, by PIL.
    """
    if decode_jpeg and path.lower().endswith((".jpg", ".jpeg")):
        with contextlib.suppress(RuntimeError):                  # damaged, or no JPEG: PIL says which
            image = decode_jpeg(read_file(path), apply_exif_orientation=True)
            if len(image) != 4:                                  # CMYK
                return image.expand(3, -1, -1)
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                           # 16 bits a pixel: PIL would clip them at 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return pil_to_tensor(image.convert("RGB"))


class Squares:
    """Center squares uint8 (3, size, size) in one file: decoded once, for all epochs and runs.

    A row is whole pages of the disk, so that machines may fill one file together, and ends with a checksum of
    its pixels: one that was never written, or half, is None. Read and written by position, as a memory map of
    a disk that fails kills the process.
    """

    def __init__(self, path, n, size):
        self.path, self.size, self.bytes = path, size, 3 * size * size
        self.row = -(-(self.bytes + 8) // 4096) * 4096
        self.total = n * self.row

    def reserve(self):
        """Make room on the disk for all rows; OSError if there is none."""
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with open(self.path, "ab") as file:
            missing = self.total - file.tell()
            if missing > shutil.disk_usage(self.path).free:
                raise OSError("no room")
            if missing and hasattr(os, "posix_fallocate"):       # not on macOS
                os.posix_fallocate(file.fileno(), 0, self.total)

    def checksum(self, row):
        """Of a row (row,) uint8 without its end: 64-bit words added up, plus 1: zeros are no square."""
        return (int(row[:-8].view(np.uint64).sum()) + 1) % 2 ** 64

    def read(self, i):
        row, read = np.empty(self.row, np.uint8), 0
        with contextlib.suppress(OSError):                       # the disk fails: it is decoded again
            read = os.preadv(open_file(self.path, os.getpid()), [row], i * self.row)
        if read < self.row:
            return None
        whole = row[-8:].view(np.uint64)[0] == self.checksum(row)
        return torch.from_numpy(row[:self.bytes]).view(3, self.size, self.size) if whole else None

    def write(self, i, image):
        row = np.zeros(self.row, np.uint8)
        row[:self.bytes] = image.flatten().numpy()
        row[-8:].view(np.uint64)[0] = self.checksum(row)
        with contextlib.suppress(OSError):                       # a full disk after all: it is decoded again
            os.pwrite(open_file(self.path, os.getpid()), row, i * self.row)


@functools.lru_cache
def open_file(path, process):
    """A file to read and write by position, opened once in each process."""
    return os.open(path, os.O_RDWR)


# Data sets of torchvision: name -> (class, arguments of the training split, of the test split).
SPLITS = dict(split="train"), dict(split="test")
NAMED = {
    "cifar10": (tv.CIFAR10, dict(train=True), dict(train=False)),
    "cifar100": (tv.CIFAR100, dict(train=True), dict(train=False)),
    "stl10": (tv.STL10, *SPLITS),
    "food101": (tv.Food101, *SPLITS),
    "flowers102": (tv.Flowers102, *SPLITS),
    "oxford_pets": (tv.OxfordIIITPet, dict(split="trainval"), dict(split="test")),
    "stanford_cars": (tv.StanfordCars, *SPLITS),
    "fgvc_aircraft": (tv.FGVCAircraft, dict(split="trainval"), dict(split="test")),
}


def open_dataset(spec, split="train", image_size=None, classes=None):
    """The data set `spec`, split "train" or "test": items (uint8 (3, S, S), label or -1, index really read).

    spec     "textures" (embedded), a name in NAMED (downloaded into data/), a folder in ImageNet's layout
             (train/CLASS/*.jpg, val/CLASS/*.jpg) or any folder of pictures without labels
    classes  a file with one class folder a line: keep these only (ImageNet-100)
    None for the test split of a folder that has none. ValueError for anything else that is missing.
    """
    if classes and (spec == "textures" or spec in NAMED):
        raise ValueError("--classes picks class folders: it goes with --data FOLDER only")
    if spec == "textures":
        if image_size not in (None, 48):
            raise ValueError(f"textures is rendered at 48 pixels, not {image_size}")
        return Textures(split)
    size = image_size or SMALL.get(spec, (224,))[0]
    if spec in NAMED:
        return open_named(spec, split, size)
    if not os.path.isdir(spec):
        raise ValueError(f"--data {spec}: no such folder, nor a data set of that name ({', '.join(NAMED)})")
    return open_folder(spec, split, size, classes)


def open_splits(spec, image_size=None, classes=None):
    """(training split, test split); the second is None unless both have labels, of the same classes."""
    ds, test = (open_dataset(spec, split, image_size, classes) for split in ("train", "test"))
    if test is None or ds.labels is None or test.labels is None:
        return ds, None
    if ds.classes != test.classes:
        lone = min(set(ds.classes) ^ set(test.classes))
        raise ValueError(f"--data {spec}: both splits must have the same class folders; {lone} is in one")
    return ds, test


def open_named(name, split, image_size):
    kind, for_training, for_test = NAMED[name]
    options = for_training if split == "train" else for_test
    try:
        with first_on_machine():
            try:
                pictures = kind("data", **options)
            except RuntimeError:                                 # not there, or not whole
                pictures = kind("data", download=True, **options)
    except ImportError as error:
        raise ValueError(f"--data {name}: torchvision needs {error.name} for it: pip install it") from None
    except (OSError, RuntimeError, ValueError) as error:         # no network, a dead address
        cars = ("; put cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat into "
                "data/stanford_cars/, and pip install scipy") * (name == "stanford_cars")
        why = str(error).splitlines()[0]
        raise ValueError(f"--data {name}: not in data/ and cannot be fetched ({why}){cars}") from None
    keys = [key for key in ("targets", "labels", "_labels") if hasattr(pictures, key)]
    labels = getattr(pictures, keys[0]) if keys else [label for _, label in pictures._samples]
    classes = getattr(pictures, "classes", None)
    return Pictures(f"{name}/{split}", name, None, labels, classes, image_size, source=pictures)


def open_folder(folder, split, image_size, classes_file=None):
    roots = [os.path.join(folder, name) for name in (["train"] if split == "train" else ["val", "test"])]
    root = next(filter(os.path.isdir, roots), folder if split == "train" else None)
    if root is None:
        return None
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if root != folder else []
    classes = found or None
    if classes_file:
        classes = []
        with contextlib.suppress(UnicodeDecodeError), open(classes_file, encoding="utf-8") as file:
            classes = sorted({line.strip() for line in file} - {""})
        if not classes or (missing := set(classes) - set(found)):
            what = f"no class folder {min(missing)} in {root}" if classes else "it names no folder, one a line"
            raise ValueError(f"--classes {classes_file}: {what}")
    names, labels = list_pictures(root, classes)
    return Pictures(f"{folder}/{split}", root, names, labels, classes, image_size)


def walk(top):
    """(folder, its files) of all folders from `top` down; links are followed, but not back."""
    real = lambda path: os.path.join(os.path.realpath(path), "")
    way = {top: [real(top)]}                                     # what was gone through to get to a folder
    for folder, below, files in os.walk(top, followlinks=True):
        for name in list(below):
            path = os.path.join(folder, name)
            if any(step.startswith(real(path)) for step in way[folder]):
                below.remove(name)
            way[path] = [*way[folder], real(path)]
        yield folder, files


def list_pictures(root, classes):
    """(names (n,) of the pictures below root, as bytes; labels (n,) int64, or None), sorted by folder.

    The list of a million files takes seconds: it is kept, with the time of the last change of every folder,
    and made anew when one differs. Of the processes of a machine the first does that.
    """
    where = zlib.crc32("\n".join([os.path.abspath(root), *(classes or [])]).encode())
    kept = os.path.join(torch.hub.get_dir(), "listings", f"{where:08x}.npz")
    with first_on_machine():
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):  # none yet, or damaged
            with np.load(kept) as listing:
                times = [os.stat(folder).st_mtime_ns for folder in listing["folders"].tolist()]
                if times == listing["times"].tolist():
                    return listing["names"], listing["labels"] if classes else None
        names, labels, folders = [], [], []
        for label, top in enumerate([os.path.join(root, name) for name in classes] if classes else [root]):
            found = 0
            for folder, files in sorted(walk(top)):
                files = sorted(name for name in files if name.lower().endswith(IMG_EXTENSIONS))
                paths = [os.fsencode(os.path.relpath(os.path.join(folder, name), root)) for name in files]
                names.append(np.array(paths, dtype=bytes))
                labels.append(np.full(len(files), label))
                folders.append(folder)
                found += len(files)
            if not found:
                raise ValueError(f"--data {top}: no pictures in it ({', '.join(IMG_EXTENSIONS)})")
        names, labels = np.concatenate(names), np.concatenate(labels)
        with contextlib.suppress(OSError):  # no room, no right: then it is made each time
            os.makedirs(os.path.dirname(kept), exist_ok=True)
            times = [os.stat(folder).st_mtime_ns for folder in folders]
            with write_atomically(kept) as temporary, open(temporary, "wb") as file:
                np.savez(file, names=names, labels=labels, folders=folders, times=times)
        return names, labels if classes else None


def with_transform(ds, transform, **changes):
    """`ds` with another transform (of the whole picture) in place of its center square."""
    ds = copy.copy(ds)
    vars(ds).update({"transform": transform, "squares": None, **changes})
    return ds


def augment(x, transform, *seed):
    """transform(x), with the random numbers that `seed` determines and nothing else."""
    generator = torch.default_generator  # torch.manual_seed would ask for GPUs each time
    state = generator.get_state()
    generator.manual_seed(derive_seed(*seed))
    try:
        return transform(x)
    finally:
        generator.set_state(state)


class Augmented(Dataset):
    """Item (epoch, i): an image under a random transform, its label, i, and the index really read.

    What is random in it is a function of (seed, epoch, i); without a transform it is the data set's own item.
    """

    def __init__(self, ds, transform=None, seed=0):
        self.ds, self.random, self.seed = ds, transform is not None, seed
        if self.random:
            self.ds = with_transform(ds, transform)
        self.mean, self.std, self.note_unreadable = ds.mean, ds.std, ds.note_unreadable

    def __getitem__(self, key):
        epoch, i = key
        image, label, read = augment(i, self.ds.__getitem__, self.seed, epoch, i) if self.random else self.ds[i]
        return image, label, i, read


def random_crop(size, area):
    """A random crop, at least `area` of the picture, resized (bicubic), half of them mirrored (MAE, ClusterMIM)."""
    return v2.Compose([v2.RandomResizedCrop(size, (area, 1), interpolation=InterpolationMode.BICUBIC),
                       v2.RandomHorizontalFlip()])


class ColorJitter:
    """v2.ColorJitter of brightness, contrast and saturation, batched, on any device.

    Factors and order of an image are a function of (seed, epoch, image).
    """

    def __init__(self, strength, n, seed):
        self.strength, self.n, self.seed, self.epoch = strength, n, seed, None

    def __call__(self, images, epoch, index):
        """uint8 images (b, 3, S, S), those at index (b,) of the n of the data set -> the same, jittered."""
        if not self.strength:
            return images
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, 2))
            self.epoch, self.draws = epoch, torch.rand(self.n, 6, generator=generator)
        draws = to_device(self.draws[index], images.device)
        low, high = max(0., 1 - self.strength), 1 + self.strength
        given = images, low + (high - low) * draws[:, :3], draws[:, 3:].argsort(1)
        most = len(images) if images.is_cuda else 4                 # what fits a CPU's cache
        return torch.cat([jitter_colors(*part) for part in zip(*(x.split(most) for x in given))])


def jitter_colors(images, factors, order):
    """uint8 images (b, 3, S, S), each by its factors (b, 3), of brightness, contrast, saturation, in its order.

    Each operation blends with something, factor x + (1 - factor) y: with black, with the mean gray, with its
    grays; and rounds to uint8, as torchvision's functions do.
    """
    x = images.float()
    for operation in order.unbind(1):
        factor = factors.gather(1, operation[:, None])[..., None, None]
        red, green, blue = x.split(1, dim=1)
        gray = (.2989 * red + .587 * green + .114 * blue).floor()
        operation = operation[:, None, None, None]
        other = torch.where(operation == 2, gray, gray.mean((1, 2, 3), keepdim=True) * (operation == 1))
        x = (factor * x + (1 - factor) * other).clamp(0, 255).floor()
    return x.to(torch.uint8)


# --- the run's files, tokens and plan ---------------------------------------------------------------------

def read_metrics(path):
    """The whole lines of a metrics.jsonl, as dicts; a killed run may have left half a line."""
    return [json.loads(line) for line in open(path) if line.endswith("}\n")] if os.path.exists(path) else []


def read_summary(folder):
    """(the last line of a run that came to its end, None), or (None, why there is none)."""
    found = [line for line in read_metrics(os.path.join(folder, "metrics.jsonl")) if line.get("summary")]
    if not found:
        return None, "no accuracies in metrics.jsonl"
    end = found[-1]
    if end["step"] < end["steps"]:
        return None, f"it stopped at step {end['step']} of {end['steps']}"
    return end, None


def append_metrics(path, **line):
    """One JSON object a line, on rank 0."""
    if rank_and_world()[0] == 0:
        try:
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error.strerror}); last.pt is kept") from None


def plot_metrics(runs, levels={}):
    """A plot of each quantity that was logged. runs: {label: [lines of metrics.jsonl, ...]}; levels: of the loss."""
    plots = {}
    for label, lines in ((label, lines) for label, several in runs.items() for lines in several):
        lines = [line for line in lines if "loss" in line]
        names = lines[0].keys() - {"step", "epoch", "lr", "images_per_second"} if lines else ()
        for name in names:
            kind = "loss on tokens" if name == "loss" and "accuracy" in lines[0] else name  # not one scale
            curve = [line["epoch"] for line in lines], [line[name] for line in lines]
            plots.setdefault(kind, {}).setdefault(label, []).append(curve)
    first = lambda kind: (not kind.startswith("loss"), kind)
    return [draw_plot("epoch", kind, plots[kind], levels=levels if "loss" in kind else {})
            for kind in sorted(plots, key=first)]


def draw_curves(args, codes, entropy):
    """OUT/curves.png: what metrics.jsonl has, by epochs; beside the loss on tokens, that of two guesses."""
    levels, path = {}, f"{args.out}/curves.png"
    if codes:
        levels[f"ln {codes} = {math.log(codes):.3f}, a uniform guess"] = math.log(codes)
    if entropy:
        levels[f"{entropy:.3f}, a guess by code frequency"] = entropy
    save_plots(plot_metrics({args.objective: [read_metrics(f"{args.out}/metrics.jsonl")]}, levels), path)
    print0(f"drawn in {path}: the loss, and what was logged with it")


class Log:
    """Mean losses since the last line, over all processes, to metrics.jsonl and to the screen.

    A run that goes on from a checkpoint first drops the lines that the killed one wrote after it.
    """

    def __init__(self, args, model, targets, state, device):
        self.path, self.names = os.path.join(args.out, "metrics.jsonl"), ("loss", *model.logs)
        rank, zeros = rank_and_world()[0], torch.zeros(len(self.names) + 1, device=device)
        self.sums = state["sums"].to(device) if state and rank == 0 else zeros  # of all processes: count once
        self.step, self.time, self.batch_size = state["step"] if state else 0, time.time(), args.batch_size
        self.ln_k = f" (ln K {math.log(targets.size):.3f})" if model.needs == "tokens" else ""
        if rank == 0:
            kept = [line for line in read_metrics(self.path) if line.get("step", math.inf) <= self.step]
            with write_atomically(self.path) as temporary, open(temporary, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)

    def add(self, loss, logs):
        """Of one micro-batch: nothing is read back, so that no GPU is waited for."""
        others = [logs[name] for name in self.names[1:]]
        self.sums += torch.stack([loss.detach(), *others, torch.ones_like(loss)])

    def add_up(self):
        """The sums of all processes."""
        sums = self.sums.clone()
        all_reduce(sums)
        return sums

    def write(self, step, epoch, lr, steps):
        sums = self.add_up()
        means = dict(zip(self.names, (sums[:-1] / sums[-1]).tolist()))
        self.sums.zero_()
        speed = (step - self.step) * self.batch_size / (time.time() - self.time)
        self.step, self.time = step, time.time()
        append_metrics(self.path, step=step, epoch=epoch, lr=lr, **means, images_per_second=round(speed, 1))
        words = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        print0(f"step {step}/{steps}  {words}{self.ln_k}  lr {lr:.2e}  {speed:.3g} images/s")


# Flags that may change between a run and its continuation, because they do not change what is computed.
FREE = set("out cache device workers steps fresh compile probe plan benchmark rate save_minutes save_every log_every "
           "micro_batch".split())


def resume(path, args):
    """The checkpoint to go on from; ValueError if it is damaged, foreign, or of a run with other settings."""
    state = read_checkpoint(path)
    if not isinstance(state, dict) or not {"model", "optimizer", "step", "args"} <= state.keys():
        raise ValueError(f"{path}: not a checkpoint of this script; --fresh starts over")
    there, here = state["args"], vars(args)
    differ = [f"--{key.replace('_', '-')} {there.get(key)} there, {here[key]} here" for key in here
              if key not in FREE and there.get(key) != here[key]]
    if differ:
        raise ValueError(f"{path} is of a run with other settings ({'; '.join(differ)}): "
                         "take these, another --out, or --fresh to start over")
    return state


def collect_state(model, optimizer, args, step, **more):
    """All that the steps after `step` depend on: a dict of tensors, numbers and strings, for last.pt.

    Its keys: model, optimizer (their state_dict), args (a dict), step, rng (torch's random state); and `more`.
    """
    return dict(model=model.state_dict(), optimizer=optimizer.state_dict(), args=vars(args), step=step,
                rng=torch.get_rng_state(), **more)


def restore_state(state, model, optimizer):
    """Put back what `collect_state` collected: model, optimizer, torch's random numbers go on from there."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])


def start_over(args):
    """Remove what an earlier run left in --out, but not a file that the command line names."""
    named = [os.path.abspath(path) for path in (args.tokenizer, args.tokens) if path]
    for name in ("last.pt", "encoder.pt", "metrics.jsonl", "curves.png", "predictions.png", "tokens.npy",
                 "tokenizer.pt"):
        path = os.path.abspath(f"{args.out}/{name}")
        if os.path.exists(path) and path not in named:
            os.remove(path)


def read_inputs(args, ds, needs, device):
    """(tokenizer, Targets), each None if the run has to make it: nothing is written or removed yet."""
    n, path = (args.image_size // args.patch_size) ** 2, args.tokenizer or f"{args.out}/tokenizer.pt"
    if needs is None:
        return None, Targets()
    if needs in ("features", "layers"):
        teacher = kmeans.blank_tokenizer(ds, args.features, args.patch_size).to(device)
    if needs == "features":
        return None, Targets(make=teacher.rows, size=teacher.rows(ds[0][0][None].to(device)).shape[-1])
    if needs == "layers":
        mean, std, own_mean, own_std = (to_channels(v, device) for v in (ds.mean, ds.std, teacher.mean, teacher.std))
        layers = lambda images: teacher.extract.layers((images * std + mean - own_mean) / own_std)
        layers(normalize(ds[0][0][None].to(device), ds))               # can it be had?
        return None, Targets(layers=layers)
    if args.tokens:
        tokens = kmeans.load_tokens(args.tokens)
        if tokens.shape != (len(ds), n):
            raise ValueError(f"{args.tokens}: tokens {tokens.shape} (images, patches), but {ds.name} has {len(ds)} "
                             f"images and the model {n} patches")
        largest = max(int(tokens[i:i + 4096].max()) for i in range(0, len(tokens), 4096))
        if args.vocab_size and largest >= args.vocab_size:
            raise ValueError(f"{args.tokens}: its token {largest} is beyond the codebook of {args.vocab_size}")
        return None, Targets(tokens, size=args.vocab_size or largest + 1)
    if args.tokenizer or os.path.exists(path) and not args.fresh:
        tokenizer = kmeans.load_tokenizer(path)
        made = {} if args.tokenizer else tokenizer.made or {}          # a run's own: by its settings
        for key in ("patch_size", "image_size", "vocab_size", "features", *made):
            here, there = getattr(args, key), made[key] if key in made else getattr(tokenizer, key)
            if here != there and (here or key in made):
                raise ValueError(f"{path}: its {key.replace('_', ' ')} is {there}, this run's is {here}" +
                                 ("" if args.tokenizer else "; --fresh makes a new one"))
        return tokenizer.to(device), None
    kmeans.blank_tokenizer(ds, args.features, args.patch_size)      # can the features be had?
    return None, None


def keep_squares(args, ds):
    """Let center squares be decoded once, if the disk has room; the first process of a machine asks."""
    if args.crop or not args.cache or not isinstance(ds, Pictures) or not hasattr(os, "preadv"):  # Windows
        return
    what = f"{os.path.abspath(ds.root)} {kmeans.identify(ds)}".encode()
    name = re.sub(r"[^\w.-]+", "_", f"{ds.name.strip('/')}-{ds.image_size}-{zlib.crc32(what):08x}.squares")
    squares = Squares(os.path.join(args.cache, name), len(ds), ds.image_size)
    size = f"{squares.total / 1e9:.3g} GB"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            squares.reserve()
            print0(f"center squares are kept in {squares.path}: {size}")
        except OSError as error:
            with contextlib.suppress(OSError):
                if not isinstance(error, PermissionError):     # another user's file stays
                    os.remove(squares.path)
            why = error.strerror or error
            print0(f"pictures are decoded in every epoch: {args.cache} cannot keep "
                   f"their squares, {size} ({why})")
    barrier()
    if not os.access(squares.path, os.R_OK | os.W_OK):
        return
    for i in sorted({0, len(ds) // 2, len(ds) - 1}):
        square = squares.read(i)
        with contextlib.suppress(OSError):
            if square is not None and (square.float() - ds.open(i)).abs().mean() > 1:  # decoders differ less
                raise ValueError(f"{squares.path} is of other pictures than {ds.path(i)}: remove it")
    ds.squares = squares


def make_targets(args, ds, tokenizer, device):
    """Targets by a tokenizer; K-means is fitted on the training images where `read_inputs` found none.

    Tokenizer and tokens are kept in --out. With --crop none are stored: they are made of each crop.
    """
    how = dict(device=device, workers=args.workers)
    at_size = lambda size: ds if size == ds.image_size else with_transform(
        ds, center_square(size), image_size=size, squares=getattr(ds, "squares", None))
    if tokenizer is None:
        print0(f"fitting a K-means tokenizer: {args.features} features, K = {args.vocab_size}, "
               f"{args.fraction:.0%} of the patches")
        tokenizer = kmeans.fit_tokenizer(
            at_size(args.image_size * (2 if args.features == "clip" else 1)), args.features, args.vocab_size,
            patch_size=args.patch_size, image_size=args.image_size, fraction=args.fraction, seed=args.seed,
            images=args.fit_images,
            **how)
    if rank_and_world()[0] == 0:
        tokenizer.save(f"{args.out}/tokenizer.pt")
    barrier()
    tokenizer, tokens = tokenizer.to(device), None
    if not args.crop:
        tokens = kmeans.tokenize(tokenizer, at_size(tokenizer.input_size), f"{args.out}/tokens.npy", **how)
    return Targets(tokens, tokenizer, tokenizer.vocab_size)


def start_codebook(args, model, ds, device, mine, micro):
    """Hard codes start as K-means of the new encoder's z of the first batch (VQ-KD's code; 10 iterations)."""
    first = [i for _, i in next(schedule(len(ds), args.batch_size, args.seed, 0, 1, mine, 1))]
    model.eval()                                               # without stochastic depth
    with torch.no_grad():
        z = [model.encode_patches(normalize(images, ds)).flatten(0, 1)
             for images, _, _ in kmeans.load_batches(ds, first, micro, args.workers, device)]
    model.train()
    metric = "cosine" if model.unit else "euclidean"
    found = kmeans.KMeans(args.vocab_size, metric, max_iter=10, seed=args.seed).fit(torch.cat(z))
    model.codebook.data.copy_(found.centroids)


def save_tokenizer(args, model, ds, device):
    """OUT/tokenizer.pt of a learned tokenizer, and what its tokens of some images are worth."""
    encoder, centroids, metric = model.export()
    tokenizer = kmeans.KMeansTokenizer(args.objective, centroids, metric, args.patch_size, args.image_size,
                                       ds.mean, ds.std, encoder)
    tokenizer.save(f"{args.out}/tokenizer.pt")
    few = range(0, len(ds), math.ceil(len(ds) / 2000))
    found = [(tokenizer.to(device)(images).cpu(), labels) for images, labels, _ in
             kmeans.load_batches(ds, few, 64, args.workers, device)]
    tokens, labels = (torch.cat(parts).numpy() for parts in zip(*found))
    if tokens.size < 20 * tokenizer.vocab_size * len(ds.classes or [0]):
        # TCAS of so few patches a cell would be too low.
        print0(f"TCAS: python tcas.py score --tokenizer {args.out}/tokenizer.pt")
        labels = None
    lines, _ = tcas.describe_codebook(tokens, labels if ds.classes else None, tokenizer.vocab_size, args.seed)
    print0("\n".join(lines))


def describe(model, args):
    millions = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    target = "tokens" if model.needs == "tokens" else args.features
    return (f"{args.objective}: {args.model}, {millions:.2f}M trained parameters, cut {model.cut}: {model.targets} "
            f"of {model.encoder.n_patches} patches are hidden; to predict: {target}")


def count_step(args):
    """(model on no device, floating-point operations of an image's step, bytes kept for the backward pass).

    Half of float32's bytes, as in bfloat16; scaled_dot_product_attention keeps no attention weights.
    """
    with torch.device("meta"):
        # A teacher's features are about 1024 wide.
        size = {"vqkd": 1024, **dict.fromkeys(("dvae", "vq", "peco"))}
        model = build(args, size.get(args.objective, args.vocab_size or 1024))
        n, heads, kept = model.encoder.n_patches, model.encoder.blocks[0].attn.heads, {}
        order = torch.zeros(1, n, dtype=torch.long)
        given = torch.zeros(1, n, 1024) if model.needs == "features" else order
        inputs = torch.zeros(1, 3, args.image_size, args.image_size), given, order, torch.zeros(model.noise_rows, 1)
        flops = 3 * count_flops(model, *inputs)                    # backward: twice forward

        def keep(x):
            weights = x.ndim == 3 and len(x) == heads and min(x.shape[1:]) > model.encoder.width // heads
            kept[x.untyped_storage()._cdata] = 0 if weights else x.numel() * x.element_size()
            return x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(*inputs)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    return model, flops, sum(size for storage, size in kept.items() if storage not in own) // 2


def print_plan(args, ds, world):
    """What the run would take, on 1, 8 and 64 processes; a rate that is assumed is said to be."""
    model, flops, activations = count_step(args)
    images = max(1, round(args.epochs * (len(ds) // args.batch_size))) * args.batch_size
    rate, why = args.rate, "as given"
    if not rate:
        rate, why = .4 * 989e12 / flops, "assumed: 40 % of an H200's 989 bfloat16 TFLOP/s"
    print0(f"{describe(model, args)}\n{images} images in steps of {args.batch_size}; {flops / 1e9:.3g} GFLOP an image, "
           f"forward and backward, without tokenizer and teacher\n"
           f"{rate:.4g} images/s a process ({why}): " +
           ", ".join(f"{images / rate / n / 3600:.3g} hours on {n}" for n in (1, 8, 64)))
    parameters = sum(p.numel() for p in model.parameters())
    micro = divide_batch(args, world)[1]
    print0(f"memory of a process: {16 * parameters / 1e9:.3g} GB of weights, gradients and AdamW, and about "
           f"{micro * activations / 1e9:.3g} GB of activations of {micro} images at once (--micro-batch)")
    files = isinstance(ds, Pictures)
    stored = "none: tokens are made of each crop" if args.crop else (
        f"{2 * len(ds) * model.encoder.n_patches / 1e9:.3g} GB of tokens" * (model.needs == "tokens") +
        f", {3 * len(ds) * args.image_size ** 2 / 1e9:.3g} GB of center squares (--cache)" * files)
    print0(f"disk: {stored.lstrip(', ') or 'nothing to speak of'}")
    if files:
        ds = Augmented(ds, random_crop(ds.image_size, args.crop) if args.crop else None, args.seed)
        few = range(0, len(ds.ds), max(1, len(ds.ds) // 64))
        torch.set_num_threads(1)                                   # as in a loading process
        seconds = min(timeit.repeat(lambda: [ds[0, i] for i in few], number=1, repeat=2)) / len(few)
        until = "" if args.crop else "; where squares are kept, for the first epoch only"
        print0(f"input: {1e3 * seconds:.2g} ms an image on a core of this machine: {rate * seconds:.2g} cores a "
               f"process{until}")


class Laps:
    """Seconds of every phase of a step, the device's work included; the first steps, a warm-up, do not count."""

    def __init__(self, device, skip):
        self.device, self.skip, self.seconds, self.steps, self.last = device, skip, {}, 0, time.perf_counter()

    def __call__(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0) + now - self.last
        self.last = now
        if phase == "log, save":
            self.steps += 1
            if self.steps == self.skip:
                self.seconds = {}


def benchmark(args, ds, tokenizer, targets, device):
    """Time of a step, by phases, memory, and the share of the rate of a matrix product; nothing is kept.

    Tokens are all 0 if there are none: what they say makes no step faster. Phases are waited for: a run, in
    which the CPU goes ahead of the GPU, is a little faster.
    """
    (rank, world), args = rank_and_world(), copy.copy(args)
    args.steps = 5 + (args.steps or 30)
    _, flops, _ = count_step(args)
    if targets is None and args.crop:
        if tokenizer is None:
            tokenizer = kmeans.blank_tokenizer(ds, args.features, args.patch_size, k=args.vocab_size).to(device)
            tokenizer.centroids = torch.randn(args.vocab_size, tokenizer.rows(ds[0][0][None].to(device)).shape[-1])
        targets = Targets(make=tokenizer.to(device), size=tokenizer.vocab_size)
    elif targets is None:
        shape = len(ds), (args.image_size // args.patch_size) ** 2
        size = tokenizer.vocab_size if tokenizer else args.vocab_size
        targets = Targets(np.broadcast_to(np.uint16(0), shape), size=size)
    laps = Laps(device, skip=5)
    with tempfile.TemporaryDirectory() as args.out:
        if train(args, ds, targets, None, device, laps) is None:
            return
    steps, seconds = laps.steps - laps.skip, sum(laps.seconds.values())
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    side = 8192 if device.type == "cuda" else 2048
    x = torch.randn(side, side, device=device, dtype=kind)
    product = 2 * len(x) ** 3 / kmeans.measure_seconds(lambda: x @ x)[0]
    rate = args.batch_size * steps / seconds
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else kmeans.read_peak_memory()
    print0(f"\n{rate:.4g} images/s of {world} processes, {1e3 * seconds / steps:.4g} ms a step of {args.batch_size}: " +
           ", ".join(f"{phase} {value / seconds:.1%}" for phase, value in laps.seconds.items()))
    print0(f"peak memory of a process {peak / 1e9:.3g} GB; {rate * flops / 1e12:.3g} TFLOP/s, "
           f"{rate * flops / world / product:.1%} a process of a {kind} product's {product / 1e12:.3g}")


# --- command line -----------------------------------------------------------------------------------------

# The flags that are no part of a recipe: type or choices, help.
FLAGS = {
    "data": (str, f"textures (embedded), a folder (ImageNet layout, or without labels), {', '.join(NAMED)}"),
    "classes": (str, "file with the class folders to keep, one a line (ImageNet-100)"),
    "objective": (list(objectives.OBJECTIVES), "default: mapet"),
    "cut": (int, "cutting point, class token included (MaPeT 50, ViT-B 60 of 197)"),
    "mask-ratio": (float, "the same as a share of the patches that are hidden (MaPeT, MAE, ClusterMIM 0.75, MaPeT's "
                          "ViT-B 0.7, CAE 0.5, BEiT 75 of 196)"),
    "tokenizer": (str, "tokenizer.pt of kmeans.py fit (default: fitted first, kept in --out)"),
    "tokens": (str, "tokens.npy of kmeans.py tokenize, (images, patches), in the data set's order"),
    "fit-images": (int, "images that K-means is fitted on, a random sample (default: enough for 256 patches a code, at "
                        "least 20,000; the papers: all)"),
    "cache": (str, "folder for decoded center squares, for all runs; '': decode in every epoch (default cache)"),
    "steps": (int, "stop after this many optimizer steps of the schedule"),
    "micro-batch": (int, "images at once on one process; its share is accumulated (default: up to 256)"),
    "out": (str, "folder of the run (default: runs/OBJECTIVE-DATA-what differs from the recipe)"),
    "seed": (int, "of weights, order of images, augmentation, masks (default 0)"),
    "device": (str, "cuda, cpu (default: cuda if there is one)"),
    "workers": (int, "loading processes of each process (default: its share of the cores; 0 for textures)"),
    "rate": (float, "of --plan: images/s of one process, as --benchmark measured"),
    "save-minutes": (float, "minutes between checkpoints at most (default 30)"),
    "log-every": (int, "steps between lines of metrics.jsonl (default 50)"),
}
MAY_BE_ZERO = set("seed workers jitter crop cut mask_ratio label_smoothing drop_path layer_scale min_lr warmup_lr "
                  "warmup_epochs weight_decay beta2 clip_norm".split())


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Pre-train a ViT by any objective of the two papers. What is not given comes from the recipe: "
                    "the embedded default for --data textures, the objective's paper's for a folder.")
    choices = dict(model=list(MODELS), pos=["learned", "sincos"], init=["timm", "mae"], cosine=["start", "warmup"])
    add = parser.add_argument_group("recipe, with the papers' values").add_argument
    for key, (mapet, clustermim, _, text) in SETTINGS.items():
        kind = type(clustermim if mapet is None else mapet)
        kind = dict(choices=choices[key]) if key in choices else dict(type=kind)
        others = [f"{name} {PAPERS[name][key]}" for name in objectives.TOKENIZERS if PAPERS[name][key] != mapet]
        papers = ", ".join([f"MaPeT {mapet}", f"ClusterMIM {clustermim}"] + others)
        add(f"--{key.replace('_', '-')}", help=f"{text} ({papers})", **kind)
    add = parser.add_argument_group("run").add_argument
    for flag, (kind, text) in FLAGS.items():
        add(f"--{flag}", help=text, **{"choices" if isinstance(kind, list) else "type": kind})
    add("--resume", dest="fresh", action="store_false", help="go on from OUT/last.pt (the default)")
    add("--fresh", action="store_true", help="start over: removes what an earlier run left in --out")
    add("--plan", action="store_true", help="print what the run would take, and stop")
    add("--benchmark", action="store_true", help="time some steps (30, --steps) by their phases, and stop")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--probe", action=argparse.BooleanOptionalAction, help="k-NN and linear probe at the end (default)")
    parser.set_defaults(data="textures", objective="mapet", seed=0, cache="cache", save_minutes=30., log_every=50,
                        fresh=False, probe=True)
    args = parser.parse_args(argv)
    check_numbers(parser, args, MAY_BE_ZERO)
    for a, b in (("cut", "mask_ratio"), ("lr", "base_lr"), ("tokens", "tokenizer")):
        if getattr(args, a) is not None and getattr(args, b) is not None:
            parser.error(f"--{a} and --{b.replace('_', '-')} say the same thing: give one of them")
    return args


def check_numbers(parser, args, may_be_zero):
    """argparse takes any number: refuse, naming the flag, those that mean nothing."""
    for key, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            zero = number == 0 and key in may_be_zero
            if type(number) in (int, float) and not zero and not 0 < number < 1 << 63:
                least = "from 0 up" if key in may_be_zero else "above 0"
                least += ", below 2^63," * (number >= 1 << 63)
                parser.error(f"--{key.replace('_', '-')} {number}: a number {least} is wanted")


def check_shares(args, shares, less_than_1):
    """The flags of these names are at most 1, or less."""
    for key in f"{shares} {less_than_1}".split():
        value, below = getattr(args, key, None) or 0, key in less_than_1.split()
        if value > 1 or value == 1 and below:
            raise ValueError(f"--{key.replace('_', '-')} {value:g} is a share: from 0 to 1" + ", below 1" * below)


def name_run(args, chosen):
    """runs/OBJECTIVE-DATA-..., with every setting that is not the recipe's: a folder is a run's own."""
    parts = [args.objective, os.path.basename(os.path.normpath(args.data))]
    short = dict(model="", features="", vocab_size="k", image_size="size", batch_size="batch", mask_ratio="mask")
    chosen = dict(chosen, seed=0, objective=args.objective, data=args.data)
    for key, value in vars(args).items():
        if key not in FREE and value not in (None, chosen.get(key)):
            word = f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(short.get(key, key.replace("_", "")) + re.sub(r"[^\w.-]+", "_", word).strip("_"))
    return os.path.join("runs", "-".join(parts))


def resolve_args(args, world, device):
    """Fill in what the recipe decides and check what can be checked before anything is read or written.

    Returns what the objective needs: "tokens", "features" or None.
    """
    chosen, kind = recipe(args.objective, args.data, args.model), objectives.OBJECTIVES[args.objective][0]
    learns = args.objective in objectives.TOKENIZERS
    for key in ("tokenizer", "tokens", "label_smoothing") + ("vocab_size",) * (not learns):
        if (learns or args.objective in objectives.TARGETS) and getattr(args, key) is not None:
            flag = key.replace("_", "-")
            raise ValueError(f"--{flag} is for tokens, which {args.objective} does not predict")
    if kind is objectives.MaPeT and args.decoder_depth is not None:
        raise ValueError(f"--decoder-depth: {args.objective} has no decoder")
    if args.tokenizer or args.tokens:                              # then the file says what the codebook is
        chosen = {key: value for key, value in chosen.items() if key not in ("features", "vocab_size")}
    args.out = args.out or name_run(args, chosen)
    if args.base_lr is not None:
        chosen["lr"] = None
    if args.epochs is not None:                                # a shorter run keeps the share of the warm-up
        chosen["warmup_epochs"] *= min(1, args.epochs / chosen["epochs"])
    for key, value in chosen.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.lr = args.base_lr * args.batch_size / 256 if args.lr is None else args.lr
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()     # not on macOS
        share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = 0 if args.data == "textures" else max(1, share)
    if args.objective == "maskfeat" and args.features in ("pixel", "pixel-norm"):
        raise ValueError(f"--features {args.features}: to predict pixels is --objective mae; maskfeat predicts "
                         "hog or the features of an encoder")
    if args.objective in ("dvae", "vq") and args.features != "pixel":
        raise ValueError(f"--features {args.features}: {args.objective} rebuilds pixels; "
                         "peco and vqkd want features")
    if args.tokens and args.crop:
        raise ValueError(f"--tokens {args.tokens}: a crop or a flip (--crop {args.crop:g}) moves the patches away "
                         "from their stored tokens; --crop 0, or --tokenizer for tokens of each crop")
    check_shares(args, "crop label_smoothing fraction", "drop_path beta2")
    if not args.crop and (args.vocab_size or 0) > kmeans.MOST_CODES:
        raise ValueError(f"--vocab-size {args.vocab_size}: stored tokens have 16 bits, {kmeans.MOST_CODES} codes at "
                         "most; with --crop nothing is stored")
    divide_batch(args, world)
    patches = args.batch_size * (args.image_size // args.patch_size) ** 2
    if args.objective in ("vq", "peco", "vqkd") and args.vocab_size > patches:
        raise ValueError(f"--vocab-size {args.vocab_size}: codes start at the {patches} patches of the first batch; "
                         "fewer of them, or a larger --batch-size")
    with torch.device("meta"):                                   # sizes, --cut and --mask-ratio out of range
        return build(args, args.vocab_size or 2).needs


def divide_batch(args, world):
    """(images of a global batch for one process, images at once): by default up to 256, then accumulated."""
    share = args.batch_size // world
    micro = args.micro_batch or max(size for size in range(1, 257) if share % size == 0)
    if share == 0 or args.batch_size % (micro * world):
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {world} processes" +
                         (f" x --micro-batch {micro}" if args.micro_batch else ""))
    return share, micro


def run(args):
    started = time.time()
    rank, world, device = setup(args.device)
    needs = resolve_args(args, world, device)
    ds, test = open_splits(args.data, args.image_size, args.classes)
    if args.batch_size > len(ds):
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(ds)} images of {ds.name}")
    args.images = kmeans.identify(ds)                              # a run goes on with the same ones only
    if args.plan:
        return print_plan(args, ds, world)
    tokenizer, targets = read_inputs(args, ds, needs, device)
    if args.benchmark:
        keep_squares(args, ds)
        return benchmark(args, ds, tokenizer, targets, device)
    last = f"{args.out}/last.pt"
    state = resume(last, args) if os.path.exists(last) and not args.fresh else None

    # --- everything that can be checked was checked: now files may change
    barrier()
    if rank == 0:
        if args.fresh:
            start_over(args)
        os.makedirs(args.out, exist_ok=True)
    barrier()
    if not kmeans.wait_for(args.out):
        raise OSError(f"--out {args.out}: not seen by rank {rank}; "
                      "machines must share this folder (not --cache)")
    classes = f"{len(ds.classes)} classes" if ds.classes else "no labels"
    print0(f"{ds.name}: {len(ds)} images, {classes}; run in {args.out}")
    keep_squares(args, ds)
    targets = targets or make_targets(args, ds, tokenizer, device)
    entropy = None
    if rank == 0 and targets.stored is not None:
        lines, entropy = tcas.describe_codebook(targets.stored, ds.labels, targets.size, args.seed)
        print0("\n".join(lines))
    elif needs == "tokens":
        print0("tokens are made of each crop as it comes; what they are worth: "
               f"python tcas.py score --tokenizer {args.out}/tokenizer.pt")
    import probe                                                    # here: probe.py imports this file
    done = train(args, ds, targets, state, device)
    if not done:
        return
    model, step, steps = done
    if rank == 0:
        if args.objective in objectives.TOKENIZERS:
            save_tokenizer(args, model, ds, device)
        draw_curves(args, targets.size if needs == "tokens" else None, entropy)
        probe.draw_predictions(args, model, ds, test, targets, device)
    if args.probe and test is None:
        print0("no labels, or no test split: no k-NN and no linear probe")
    elif args.probe:
        probe.print_table(args, model.encoder, step, steps, ds, test, device, started)
        if step < steps:
            print0(f"--steps stopped this run at {step} of {steps} steps, before the learning rate came down: this "
                   "is not what the recipe gives. Without --steps the same command goes on.")
    print0(f"\n{time.time() - started:.0f} s. In {args.out}: {', '.join(sorted(os.listdir(args.out)))}; encoder.pt is the "
           f"ViT, with timm's names\nnext: python probe.py linear {args.out}; also finetune, tokens, show\n"
           f"      python objectives.py {args.objective} --patches 6 --cut 3: who may attend to whom")


def main(argv=None):
    args = parse(argv)
    with exit_on_error("train.py"):
        run(args)


if __name__ == "__main__":
    main()
