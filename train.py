"""Data, processes, the one training loop, checkpoints.

torchrun --nproc_per_node 1 train.py --objective mapet                        embedded data, two CPU cores, minutes
torchrun --nproc_per_node 8 train.py --objective mapet --data /path/imagenet  the paper's recipe (MaPeT Table 7)

One command goes the whole way: images -> K-means tokens -> pre-training -> k-NN and linear probe. Everything it makes is
in --out: tokenizer.pt, tokens.npy, last.pt, encoder.pt, metrics.jsonl. The same command again goes on where it stopped.

Nothing depends on when or where it runs: the order of the images, their augmentation, the permutations z and the
stochastic depth of step s are functions of (seed, s) for the *global* batch, of which each process takes its rows. So a
resumed run equals an unbroken one bit for bit (on the CPU), and 1, 2 or 8 processes run the same experiment.
"""
import argparse
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torchvision.datasets as tv
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import kmeans
import objectives
import tcas
from kmeans import barrier, derive_seed, load_batches, make_loader, print0
from vit import MODELS, draw_grid, exit_on_error, normalize, patchify, read_checkpoint, save

# --- recipes: an explicit flag beats the recipe ---------------------------------------------------------------------

# MaPeT Table 7 (METHODS 1.8), for ImageNet and every other folder of images; the rows of MaPeT's own tables. Not stated:
# the cutting point's digits for ViT-T, S and B (B gets Table 6's best, 60 of 197 or 70 %, T and S the released code's 50,
# 75 %), PIM's cutting point (MaPeT's), MIM's share of hidden patches (BEiT's), positions and initialisation of its CAE.
MAPET = dict(model="vit_base", image_size=224, patch_size=16, pos="learned", init="timm", features="clip", vocab_size=8192,
             epochs=300., batch_size=2048, lr=1.5e-3, base_lr=None, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=10.,
             weight_decay=.05, beta2=.999, clip_norm=3., drop_path=.1, layer_scale=.1, crop=0., jitter=.4,
             label_smoothing=0., decoder_depth=4, save_every=1000)
# ClusterMIM Sec. 4.1 (METHODS 4.5), the rows of its tables: ViT-S, B and L alike. Not stated: base learning rate and
# warm-up (MAE's: lr = 1.5e-4 * batch / 256), and whether its MAE row standardised the pixels (the code's default: no).
CLUSTERMIM = dict(MAPET, pos="sincos", init="mae", features="pixel", vocab_size=50, epochs=200., batch_size=4096, lr=None,
                  base_lr=1.5e-4, min_lr=0., warmup_lr=0., warmup_epochs=40., beta2=.95, clip_norm=0., drop_path=0.,
                  layer_scale=0., crop=.2, jitter=0., decoder_depth=8)
# What each objective is in these terms. MaskFeat as in ClusterMIM's tables; its own paper's recipe is for mask tokens in
# the encoder (lr 2e-4 * batch / 256, warm-up 30, clip 0.02, crop 0.5, 40 % in blocks; METHODS 7).
OBJECTIVES = {
    "mae": dict(CLUSTERMIM, vocab_size=None, mask_ratio=.75),
    "maskfeat": dict(CLUSTERMIM, vocab_size=None, mask_ratio=.75, features="hog"),
    "clustermim": dict(CLUSTERMIM, mask_ratio=.75),
    "cae": dict(MAPET, pos="sincos", mask_ratio=.5),
    "beit": dict(MAPET, mask_ratio=75 / 196),
    "mim": dict(MAPET, mask_ratio=75 / 196),
    "pim": dict(MAPET, mask_ratio=.75),
    "mapet": dict(MAPET, mask_ratio=.75),
}
# Ours: the small pictures of torchvision; no paper has a recipe for them.
SMALL = dict(model="vit_tiny", batch_size=512)
SMALL_SIZES = {"cifar10": (32, 4), "cifar100": (32, 4), "stl10": (96, 12)}
# Ours: the embedded data set on two CPU cores; learning rate, cut and K were compared on its third stream.
TEXTURES = dict(model="vit_micro", image_size=48, patch_size=8, pos="sincos", init="timm", epochs=6., batch_size=32,
                lr=1.5e-3, base_lr=None, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=.3, beta2=.95, clip_norm=1.,
                drop_path=0., layer_scale=0., crop=0., jitter=0., decoder_depth=1, save_every=200)


def recipe(objective, data, model=None):
    """The settings of one objective on one data set, as a dict of flags; `model` as given on the command line or None."""
    chosen = dict(OBJECTIVES[objective])
    if data in SMALL_SIZES:
        chosen.update(SMALL, image_size=SMALL_SIZES[data][0], patch_size=SMALL_SIZES[data][1])
    if objective in ("pim", "mapet") and (model or chosen["model"]) == "vit_base":
        chosen["mask_ratio"] = .7
    if data == "textures":
        autoencoder = objectives.OBJECTIVES[objective][0] is objectives.MaskedAutoencoder
        chosen.update(TEXTURES, mask_ratio=.75 if autoencoder else .5)
    if chosen["vocab_size"] and (data in SMALL_SIZES or data == "textures"):
        chosen.update(features="pixel", vocab_size=64)
    return chosen


# --- data -----------------------------------------------------------------------------------------------------------

def render_textures(seed, indices, size=48):
    """Images `indices` of stream `seed` of the embedded data set: float32 (m, 3, size, size), unit variance; labels (m,).

    label = 5 * period + orientation of the stripes that fill the object. Everything else is nuisance: the object's
    shape and pose, stripe phase, contrast and bending, colours, a fainter striped background of random orientation and
    period (so that the class is what the *object* is made of) and pixel noise (so that raw pixels and random features
    are weak). The phase of bent stripes cannot be told from their neighbours, orientation and period can: a mean-squared
    prediction of a hidden patch is nearly flat, a distribution over tokens still says which texture it is.
    """
    rngs = [np.random.default_rng([seed, int(index)]) for index in indices]      # an image depends on nothing else
    draws = iter(np.array([rng.random(40) for rng in rngs], np.float32).T[:, :, None, None])
    noise = np.array([rng.standard_normal((3, size, size), np.float32) for rng in rngs])
    u = lambda lo, hi: lo + (hi - lo) * next(draws)                              # (m, 1, 1): one number an image
    pick = lambda n: np.floor(n * next(draws))
    label = pick(10)
    period, texture = np.divmod(label, 5)
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32)

    def stripes(angle, period):                                  # 6 or 9 cycles per image, random phase, bent
        bend = .8 * (np.sin(u(5, 9) * x + u(0, 6.3)) + np.sin(u(5, 9) * y + u(0, 6.3)))
        return np.sin((6 + 3 * period) * math.pi * (x * np.cos(angle) + y * np.sin(angle)) + bend + u(0, 6.3))

    def painted(pattern):                                        # (m, 3, size, size), in a random colour
        gray = u(-.25, .25)
        return np.stack([gray + u(-.15, .15) + pattern for _ in range(3)], 1)

    square = pick(2)
    scale, turn, cx, cy = u(.75, .9), u(-.15, .15), u(-.2, .2), u(-.2, .2)
    a, b = (x - cx) / scale, (y - cy) / scale                    # object coordinates
    a, b = a * np.cos(turn) + b * np.sin(turn), b * np.cos(turn) - a * np.sin(turn)
    radius = np.hypot(a, b)
    inside = np.where(square, np.maximum(abs(a), abs(b)) < .85, (radius < 1.05) & (radius > .5))
    obj = painted(.45 * u(.6, 1.4) * stripes(texture * math.pi / 5 + u(-.12, .12), period))
    back = painted(.25 * stripes(u(0, math.pi), pick(2)))
    return (np.where(inside[:, None], obj, back) + .3 * noise) / .45, label.ravel().astype(np.int64)


class Textures(Dataset):
    """The embedded data set, rendered into memory: .images (n, 3, 48, 48) uint8, whose 256 levels span +-3.5 deviations."""
    mean, std, image_size = (.5, .5, .5), (1 / 7, 1 / 7, 1 / 7), 48
    classes = [f"{cycles} cycles at {angle} degrees" for cycles in (6, 9) for angle in range(0, 180, 36)]
    streams = {"train": (1, 12000), "test": (2, 2000), "val": (3, 2000)}         # "val" is for choosing anything

    def __init__(self, split):
        seed, n = self.streams[split]
        parts = [render_textures(seed, range(i, min(i + 250, n))) for i in range(0, n, 250)]
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


class Pictures(Dataset):
    """Pictures of any size and mode -> uint8 (3, S, S): the largest centre square, resized (bicubic).

    names    of the files; or, with `source`, what to call source[i], whose first part is a PIL image
    labels   (n,) int64 or None; classes: their names or None
    """
    mean, std = (.485, .456, .406), (.229, .224, .225)           # of ImageNet, on the scale 0..1

    def __init__(self, name, names, labels, classes, image_size, source=None):
        self.name, self.names, self.classes, self.image_size, self.source = name, names, classes, image_size, source
        self.unreadable = set()
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        # Short side resized, then cropped: the region that MaPeT's images and their stored tokens share (METHODS 1.6).
        self.transform = v2.Compose([v2.Resize(image_size, InterpolationMode.BICUBIC), v2.CenterCrop(image_size),
                                     v2.PILToTensor()])

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        """-> image, label (-1 = none), j: the index really read, which is a neighbour's where picture i is damaged."""
        tries = min(100, len(self))
        for j in [(i + k) % len(self) for k in range(tries)]:
            try:
                image = self.transform(read_rgb(self.names[j]) if self.source is None else self.source[j][0].convert("RGB"))
            except Exception:                       # whatever it is: PIL's decoders raise half a dozen kinds of error
                continue
            return image, -1 if self.labels is None else int(self.labels[j]), j
        raise ValueError(f"{self.names[i]} and the {tries - 1} pictures after it cannot be read")

    def note_unreadable(self, wanted, read):
        """Name the pictures whose neighbour stood in (wanted, read: (b,) indices); more than 1 % of them is an error."""
        for i in wanted[wanted != read].tolist():
            if i not in self.unreadable:
                self.unreadable.add(i)
                tqdm.write(f"cannot read {self.names[i]}: its neighbour stands in ({len(self.unreadable)} of {len(self)} "
                           "so far)", file=sys.stderr)
            if len(self.unreadable) > .01 * len(self):
                raise ValueError(f"{len(self.unreadable)} of {len(self)} pictures cannot be read, more than 1 %: the first "
                                 f"is {self.names[min(self.unreadable)]}; replace or remove them")


def read_rgb(path):
    """Any picture file -> PIL RGB, as a viewer shows it: EXIF rotation applied, 16-bit greys scaled, on white."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                           # 16 bits a pixel, which PIL would clip at 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


# Data sets of torchvision: name -> (class, arguments of the training split, of the test split).
NAMED = {
    "cifar10": (tv.CIFAR10, dict(train=True), dict(train=False)),
    "cifar100": (tv.CIFAR100, dict(train=True), dict(train=False)),
    "stl10": (tv.STL10, dict(split="train"), dict(split="test")),
    "food101": (tv.Food101, dict(split="train"), dict(split="test")),
    "flowers102": (tv.Flowers102, dict(split="train"), dict(split="test")),
    "oxford_pets": (tv.OxfordIIITPet, dict(split="trainval"), dict(split="test")),
    "stanford_cars": (tv.StanfordCars, dict(split="train"), dict(split="test")),
    "fgvc_aircraft": (tv.FGVCAircraft, dict(split="trainval"), dict(split="test")),
}


def open_dataset(spec, split="train", image_size=None, classes=None):
    """The data set `spec`, split "train" or "test": items (uint8 (3, S, S), label or -1, index really read).

    spec     "textures" (embedded), a name in NAMED (downloaded into data/), a folder in ImageNet's layout
             (train/CLASS/*.jpg, val/CLASS/*.jpg) or any folder of pictures without labels
    classes  a file with one class folder a line: keep these only (ImageNet-100)
    Returns None for the test split of a folder that has none. ValueError, one line, for anything else that is missing.
    """
    if classes and (spec == "textures" or spec in NAMED):
        raise ValueError("--classes picks class folders: it goes with --data FOLDER only")
    if spec == "textures":
        if image_size not in (None, 48):
            raise ValueError(f"textures is rendered at 48 pixels, not {image_size}")
        return Textures(split)
    size = image_size or SMALL_SIZES.get(spec, (224,))[0]
    if spec in NAMED:
        return open_named(spec, split, size)
    if not os.path.isdir(spec):
        raise ValueError(f"--data {spec}: no such folder, nor a data set of that name (textures, {', '.join(NAMED)})")
    return open_folder(spec, split, size, classes)


def open_splits(spec, image_size=None, classes=None):
    """(training split, test split); the second is None unless both have labels, of the same classes."""
    ds, test = (open_dataset(spec, split, image_size, classes) for split in ("train", "test"))
    if test is None or ds.labels is None or test.labels is None:
        return ds, None
    if ds.classes != test.classes:
        differ = sorted(set(ds.classes) ^ set(test.classes))
        raise ValueError(f"--data {spec}: training and test split must have the same class folders; {differ[0]} is in one")
    return ds, test


def open_named(name, split, image_size):
    kind, train, test = NAMED[name]
    try:
        with first_on_each_machine():
            pictures = kind("data", download=True, **(train if split == "train" else test))
    except (OSError, RuntimeError) as error:                     # torchvision says why: no network, a broken archive
        raise ValueError(f"--data {name}: not in data/ and cannot be fetched ({str(error).splitlines()[0]})") from None
    labels = next((getattr(pictures, key) for key in ("targets", "labels", "_labels") if hasattr(pictures, key)), None)
    labels = [label for _, label in pictures._samples] if labels is None else labels
    names = [f"{name} picture {i}" for i in range(len(pictures))]
    return Pictures(f"{name}/{split}", names, labels, getattr(pictures, "classes", None), image_size, source=pictures)


def open_folder(folder, split, image_size, classes_file=None):
    root = os.path.join(folder, "train") if os.path.isdir(os.path.join(folder, "train")) else None
    if split != "train":
        root = next((r for r in (os.path.join(folder, "val"), os.path.join(folder, "test")) if os.path.isdir(r)), None)
        if root is None:
            return None
    labelled = root is not None and any(entry.is_dir() for entry in os.scandir(root))
    if labelled:
        names = find_classes(root)[0]
        if classes_file:
            wanted = open(classes_file).read().split()
            if missing := [name for name in wanted if name not in names]:
                raise ValueError(f"--classes {classes_file}: no folder {missing[0]} in {root}")
            names = sorted(wanted)
        try:
            samples = make_dataset(root, {name: i for i, name in enumerate(names)}, IMG_EXTENSIONS)
        except FileNotFoundError as error:                       # torchvision names the empty class
            raise ValueError(f"--data {root}: {str(error).splitlines()[0]}") from None
        paths, labels = [path for path, _ in samples], [label for _, label in samples]
    else:
        if classes_file:
            raise ValueError(f"--classes {classes_file}: {root or folder} has no class folders")
        found = (os.path.join(at, name) for at, _, files in os.walk(root or folder, followlinks=True) for name in files)
        paths, labels, names = sorted(path for path in found if path.lower().endswith(IMG_EXTENSIONS)), None, None
    if not paths:
        raise ValueError(f"--data {root or folder}: no pictures in it ({', '.join(IMG_EXTENSIONS)})")
    return Pictures(f"{folder}/{split}", paths, labels, names, image_size)


def augment(image, augment, *seed):
    """augment(image), with the random numbers that `seed` determines and nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(*seed))
        return augment(image)


def with_transform(ds, transform):
    """`ds` with another transform in place of its center square: of the whole picture to what an item holds."""
    ds = copy.copy(ds)
    ds.transform = transform
    return ds


class Augmented(Dataset):
    """Item (epoch, i): an image under a random transform of the picture, its label, i, and the index really read.

    What is random in it is a function of (seed, epoch, i); without a seed nothing is.
    """

    def __init__(self, ds, transform, *seed):
        self.ds, self.seed = with_transform(ds, transform), seed
        self.mean, self.std, self.note_unreadable = ds.mean, ds.std, ds.note_unreadable

    def __getitem__(self, key):
        epoch, i = key
        image, label, read = augment(i, self.ds.__getitem__, *self.seed, epoch, i) if self.seed else self.ds[i]
        return image, label, i, read


def augmentation(ds, crop, jitter):
    """The transform of pre-training: (random crop, flip or else the center square), color jitter."""
    steps = [ds.transform]
    if crop:
        steps = [v2.RandomResizedCrop(ds.image_size, (crop, 1), interpolation=InterpolationMode.BICUBIC),
                 v2.RandomHorizontalFlip(), v2.PILToTensor()]
    return v2.Compose(steps + [v2.ColorJitter(jitter, jitter, jitter)] * (jitter > 0))


def schedule(n, batch, seed, start, stop, rows, accumulate):
    """Yields, for each micro-batch of this process, its items (epoch, i); steps start..stop-1.

    Each epoch is one permutation of the n images by (seed, epoch), cut into global batches; the rest is dropped. `rows`
    is this process's slice of the global batch, handed out in `accumulate` equal micro-batches.
    """
    per_epoch, order = n // batch, None
    for step in range(start, stop):
        epoch, k = divmod(step, per_epoch)
        if order is None or k == 0:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(seed, epoch))).tolist()
        mine = order[k * batch:(k + 1) * batch][rows]
        micro = len(mine) // accumulate
        yield from ([(epoch, i) for i in mine[m * micro:(m + 1) * micro]] for m in range(accumulate))


# --- processes ------------------------------------------------------------------------------------------------------

def setup(device=None):
    """(rank, world, torch.device): joins torchrun's processes (NCCL on CUDA, gloo on the CPU); alone under plain python."""
    rank, world, local = (int(os.environ.get(key, value))
                          for key, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:              # an unknown name, or not on this machine
        raise ValueError(f"--device {device}: {str(error)[:70].splitlines()[0]}") from None
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


@contextlib.contextmanager
def first_on_each_machine():
    """One process of each machine goes first, the others follow: for downloads, which they then find done."""
    follows = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if follows:
        barrier()
    try:
        yield
    finally:
        if not follows:
            barrier()


# --- the run's files ------------------------------------------------------------------------------------------------

class Metrics:
    """metrics.jsonl: one JSON object a line. Opening it drops the lines after `step`, which a killed run had written."""

    def __init__(self, path, step):
        self.path = path
        lines = [json.loads(line) for line in open(path) if line.endswith("}\n")] if os.path.exists(path) else []
        with open(path + ".tmp", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines if line.get("step", math.inf) <= step)
        os.replace(path + ".tmp", path)

    def write(self, **line):
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


# Flags that may change between a run and its continuation, because they do not change what is computed.
FREE = {"out", "device", "workers", "steps", "fresh", "compile", "probe", "save_every", "log_every", "micro_batch"}


def with_recipe(settings):
    """A run's settings as its checkpoint has them; what an earlier version did not know yet is the recipe's."""
    if settings.get("objective") not in OBJECTIVES:
        return settings
    return {**recipe(settings["objective"], settings["data"], settings["model"]), **settings}


def resume(path, args):
    """The checkpoint to go on from; ValueError if it is damaged, foreign, or of a run with other settings."""
    state = read_checkpoint(path)
    if not isinstance(state, dict) or not {"model", "optimizer", "step", "args"} <= state.keys():
        raise ValueError(f"{path}: not a checkpoint of train.py; --fresh starts over")
    there = with_recipe(state["args"])
    differ = [f"--{key.replace('_', '-')} {there.get(key)} there, {value} here" for key, value in vars(args).items()
              if key not in FREE and there.get(key) != value]
    if differ:
        raise ValueError(f"{path} is of a run with other settings ({'; '.join(differ)}): "
                         "take these, another --out, or --fresh to start over")
    return state


# --- tokens ---------------------------------------------------------------------------------------------------------

def check_tokenizer(tokenizer, path, args):
    """Refuse a tokenizer that was not made for this run's patches."""
    for key in ("patch_size", "image_size", "vocab_size", "features"):
        here, there = getattr(args, key), getattr(tokenizer, key)
        if here and here != there:
            raise ValueError(f"{path}: its {key.replace('_', ' ')} is {there}, this run's is {here}" +
                             ("" if args.tokenizer else "; --fresh makes a new one"))
    return tokenizer


def check_tokens(tokens, path, ds, args, vocab_size):
    """Refuse tokens of another data set or codebook; returns the number of codes."""
    n = (args.image_size // args.patch_size) ** 2
    if tokens.shape != (len(ds), n):
        raise ValueError(f"{path}: tokens of {tokens.shape[0]} images x {tokens.shape[1]} patches, "
                         f"but {ds.name} has {len(ds)} images and the model {n} patches")
    largest = max(int(tokens[i:i + 4096].max()) for i in range(0, len(tokens), 4096))
    if vocab_size and largest >= vocab_size:
        raise ValueError(f"{path}: holds token {largest}, beyond the codebook of {vocab_size}")
    return vocab_size or largest + 1


def at_size(ds, args, size):
    """The training images at another size: CLIP wants 448 pixels where the ViT has 224."""
    return ds if size == ds.image_size else open_dataset(args.data, "train", size, args.classes)


def get_tokenizer(args, ds, tokenizer, rank, device):
    """The K-means tokenizer in OUT/tokenizer.pt: `tokenizer` (--tokenizer), or fitted on the training images at first."""
    path = os.path.join(args.out, "tokenizer.pt")
    if tokenizer is None and os.path.exists(path):
        return check_tokenizer(kmeans.load_tokenizer(path), path, args).to(device)
    if tokenizer is None:
        print0(f"fitting a K-means tokenizer: {args.features} features, K = {args.vocab_size}, 5 % of the patches")
        clip = args.features == "clip"
        images = at_size(ds, args, args.image_size * (1 + clip))
        # k-CLIP: 20 iterations, random seeds, the best of 5 (METHODS 1.7).
        how = dict(init="random", restarts=5, max_iter=20) if clip else {}
        tokenizer = kmeans.fit_tokenizer(images, args.features, args.vocab_size, patch_size=args.patch_size,
                                         image_size=args.image_size, fraction=.05, seed=args.seed, device=device,
                                         workers=args.workers, progress=rank == 0 and sys.stderr.isatty(), **how)
    if rank == 0:
        tokenizer.save(path)
    barrier()
    return tokenizer.to(device)


def make_tokens(args, ds, tokenizer, rank, device):
    """OUT/tokens.npy: (images, n) uint16, memory-mapped, in the data set's order."""
    path = os.path.join(args.out, "tokens.npy")
    tokens = kmeans.tokenize(tokenizer, at_size(ds, args, tokenizer.input_size), path, device=device, workers=args.workers,
                             progress=rank == 0 and sys.stderr.isatty())
    check_tokens(tokens, path, ds, args, tokenizer.vocab_size)
    return tokens


class Targets:
    """What a run's objective is given besides images.

    stored     tokens (images, n) of the centre squares, extracted once; or None
    make       function of the uint8 images of a step, as augmented: tokens (b, n), or features (b, n, size); or None.
               The tokenizer or teacher behind it stays outside the model: no gradient, no weight decay, not in the
               checkpoint, and no weight initialisation that would wipe it (METHODS 4.3)
    size       codebook size, or values a patch
    tokenizer  where stored tokens come from, if it is known
    """

    def __init__(self, stored=None, make=None, size=None, tokenizer=None):
        self.stored, self.make, self.size, self.tokenizer = stored, make, size, tokenizer

    def of(self, images, indices=None):
        """Of whole images (b, 3, S, S) uint8; None if not known. indices: their places in the training set, if they have."""
        if self.stored is not None and indices is not None:
            return torch.from_numpy(self.stored[indices].astype(np.int64)).to(images.device)
        if self.make or self.tokenizer:
            return (self.make or self.tokenizer)(images)


def given_targets(args, ds, wants, device):
    """(Targets, tokenizer) as far as nothing must be written for them: files that were handed in, a teacher; else None."""
    if wants == "features":
        teacher = kmeans.blank_tokenizer(ds, args.features, args.patch_size, args.image_size).to(device)
        one = torch.zeros(1, 3, args.image_size, args.image_size, dtype=torch.uint8, device=device)
        return Targets(make=teacher.rows, size=teacher.rows(one).shape[-1]), None
    if wants is None:
        return Targets(), None
    if args.tokens:
        tokens = kmeans.load_tokens(args.tokens)
        return Targets(stored=tokens, size=check_tokens(tokens, args.tokens, ds, args, args.vocab_size)), None
    if args.tokenizer:
        return None, check_tokenizer(kmeans.load_tokenizer(args.tokenizer), args.tokenizer, args).to(device)
    if args.fresh:                                                  # can it be had? Before the old run is removed
        kmeans.blank_tokenizer(ds, args.features, args.patch_size, args.image_size)
    return None, None


def token_targets(args, ds, tokenizer, rank, device):
    """Tokens of a tokenizer, fitted here if there is none: stored in OUT, or made of each crop in each step."""
    tokenizer = get_tokenizer(args, ds, tokenizer, rank, device)
    if args.crop:
        return Targets(make=tokenizer, size=tokenizer.vocab_size)
    return Targets(stored=make_tokens(args, ds, tokenizer, rank, device), size=tokenizer.vocab_size, tokenizer=tokenizer)


def iterate_tokens(args, ds, targets, most, device):
    """Yields up to `most` training images, spread evenly: labels, uint8 images and tokens, the last two on the device."""
    few = range(0, len(ds), math.ceil(len(ds) / most))
    for images, labels, read in load_batches(ds, few, 64, args.workers, device):
        yield labels, images, targets.of(images, read)


def describe_codebook(args, ds, targets, device):
    """What the codebook is worth before any training: used codes, perplexity, and TCAS beside that of random tokens."""
    tokens, labels, k = targets.stored, ds.labels, targets.size
    if tokens is None:
        pairs = [(labels, tokens.cpu()) for labels, _, tokens in iterate_tokens(args, ds, targets, 2000, device)]
        labels, tokens = (torch.cat(parts).numpy() for parts in zip(*pairs))
        print0(f"tokens are made of each crop as it comes; the codebook on {len(tokens)} whole images:")
    labels = np.zeros(len(tokens), np.int64) if ds.labels is None else labels
    count = lambda labels: tcas.cooccurrence(tokens, labels, k, 1 + int(labels.max()))
    counts = count(labels)
    share = counts.sum(1) / counts.sum()
    entropy = torch.special.entr(share).sum().item()
    print0(f"codebook: {int((share > 0).sum())} of {k} codes used, perplexity {math.exp(entropy):.1f}; "
        f"a uniform guess has loss ln {k} = {math.log(k):.3f}, one by code frequency {entropy:.3f}")
    if len(np.unique(labels)) > 1:
        random = count(np.random.default_rng(args.seed).permutation(labels))       # the same codes, unrelated to the class
        print0(f"TCAS {tcas.tcas(counts):.3f}, of random tokens {tcas.tcas(random):.3f} (0: every token belongs to one class)")


# --- training -------------------------------------------------------------------------------------------------------

def learning_rate(step, steps, warmup, peak, start, end):
    """Linear warm-up from `start` to `peak`, then half a cosine down to `end`, step by step."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return end + (peak - end) * .5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model, args):
    """AdamW; weight decay on matrices only: not on biases, norms, LayerScale, positions, class token (METHODS 1.4).

    The mask token, of shape (1, 1, d), is decayed, as in the released code (ClusterMIM's also decays the class token).
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    free = {name for name, p in trained.items() if p.ndim < 2 or name.endswith(("pos_embed", "cls_token"))}
    groups = [dict(params=[p for name, p in trained.items() if name not in free], weight_decay=args.weight_decay),
              dict(params=[p for name, p in trained.items() if name in free], weight_decay=0.)]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(.9, args.beta2), fused=True)


def build(args, size):
    """The objective around a new ViT, initialised by the seed; size: of its codebook, or of its features."""
    torch.manual_seed(args.seed)
    vit = MODELS[args.model](image_size=args.image_size, patch_size=args.patch_size, drop_path=args.drop_path,
                             layer_scale=args.layer_scale or None, pos=args.pos, init=args.init)
    target = dict(mae=args.features, maskfeat="hog" if args.features == "hog" else "features").get(args.objective)
    return objectives.make(args.objective, vit, size, args.cut, args.mask_ratio if args.cut is None else None, target,
                           args.label_smoothing, args.decoder_depth)


class StopSignal:
    """Turns SIGTERM and SIGINT into a question that every process answers alike, in the same step."""

    def __init__(self):
        # A side group on the CPU: to ask through NCCL would wait for the GPU in every step.
        self.group, self.came = dist.new_group(backend="gloo") if dist.is_initialized() else None, False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, *_):
        self.came = True

    def received_anywhere(self):
        if self.group is None:
            return self.came
        flag = torch.tensor([float(self.came)])
        dist.all_reduce(flag, group=self.group)
        return flag.item() > 0


def train(args, ds, targets, state, rank, world, device):
    """Pre-train from the checkpoint `state` (or None); returns (objective, step), or None when a signal came.

    Writes last.pt and metrics.jsonl as it goes, encoder.pt at the end.
    """
    per_epoch = len(ds) // args.batch_size
    steps, warmup = max(1, round(args.epochs * per_epoch)), round(args.warmup_epochs * per_epoch)
    stop_at = min(steps, args.steps or steps)
    path = lambda name: os.path.join(args.out, name)

    # --- model, optimiser, where we are
    model = build(args, targets.size).to(device)
    optimizer = make_optimizer(model, args)
    names = "loss", *model.logs
    step, seconds, sums = 0, 0., torch.zeros(len(names) + 1)        # sums since the last log, and over how many
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        step, seconds, sums = state["step"], state["seconds"], state["sums"]
        print0(f"going on from {path('last.pt')} at step {step}")
    sums, saved = sums.to(device), step
    metrics = Metrics(path("metrics.jsonl"), step) if rank == 0 else None

    # --- this process's rows of every global batch, in micro-batches
    share = args.batch_size // world
    micro = args.micro_batch or share
    accumulate, first = share // micro, rank * share
    keys = schedule(len(ds), args.batch_size, args.seed, step, stop_at, slice(first, first + share), accumulate)
    seed = [args.seed] if args.crop or args.jitter else []
    images_of = Augmented(ds, augmentation(ds, args.crop, args.jitter), *seed)
    loader = iter(make_loader(images_of, keys, args.workers, device))
    n, vit = model.encoder.n_patches, model.encoder
    if args.compile:
        model.compile()                                             # in place, so that parameter names stay
    net = model if world == 1 else DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(f"{args.objective}: {args.model}, {trained / 1e6:.2f}M trained parameters, cut {model.cut}: {model.targets} of {n} "
        f"patches are hidden; to predict: {args.features if model.needs != 'tokens' else 'tokens'}. "
        f"{steps} steps of {args.batch_size} images ({world} processes x {accumulate} x {micro}), lr {args.lr:g}, "
        f"{'bfloat16' if device.type == 'cuda' else 'float32'} on {device}")

    def checkpoint():
        if rank == 0:
            save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, epoch=step // per_epoch,
                      rng=torch.get_rng_state(), sums=sums, seconds=seconds + time.time() - started, args=vars(args)),
                 path("last.pt"))

    started, logged, generator = time.time(), (step, time.time()), torch.Generator(device)
    bar = tqdm(total=stop_at, initial=step, unit="step", disable=rank != 0 or not sys.stderr.isatty())
    with StopSignal() as stop, bar:
        while step < stop_at:
            # --- one step: a function of (seed, step) and the parameters
            lr = learning_rate(step, steps, warmup, args.lr, args.warmup_lr, args.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            order = model.draw_order(args.batch_size, derive_seed(args.seed, step), device)
            noise = torch.rand(2 * vit.depth, args.batch_size, device=device,
                               generator=generator.manual_seed(derive_seed(args.seed, step, 1)))
            for m in range(accumulate):
                images, _, wanted, read = next(loader)
                ds.note_unreadable(wanted, read)
                rows = slice(first + m * micro, first + (m + 1) * micro)
                images = images.to(device, non_blocking=True)
                given = targets.of(images, read)
                model.completes_step = m == accumulate - 1
                sync = contextlib.nullcontext() if world == 1 or m == accumulate - 1 else net.no_sync()
                with sync:
                    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        loss, logs = net(normalize(images, ds), given, order=order[rows], noise=noise[:, rows])
                    (loss / accumulate).backward()
                sums += torch.stack([loss.detach(), *(logs[name] for name in model.logs), torch.ones_like(loss)])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm or math.inf)
            stopping = stop.received_anywhere()
            log = (step + 1) % args.log_every == 0 or step + 1 in (1, stop_at)
            keep = (step + 1) % args.save_every == 0 or step + 1 == stop_at or stopping
            # The norm is the same on every process, and not finite as soon as any loss anywhere is not. To look at it
            # makes the CPU wait for the GPU, so there only before it matters: no broken weights are ever saved.
            if (device.type == "cpu" or log or keep) and not torch.isfinite(norm + sums[0]):
                raise ValueError(f"step {step + 1}: the loss or its gradient is not finite. " + (
                    f"{path('last.pt')} keeps step {saved}" if saved else "No checkpoint was written yet") +
                    f"; try a lower --lr (now {args.lr:g})")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()

            # --- log, save, stop
            if log:
                if world > 1:
                    dist.all_reduce(sums)
                logs = dict(zip(names, (sums[:-1] / sums[-1]).tolist()))
                sums.zero_()
                speed = (step - logged[0]) * args.batch_size / (time.time() - logged[1])
                logged = step, time.time()
                if rank == 0:
                    metrics.write(step=step, epoch=step / per_epoch, lr=lr, **logs, images_per_second=round(speed, 1))
                    words = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in logs.items())
                    words += f" (ln K {math.log(targets.size):.3f})" if model.needs == "tokens" else ""
                    bar.set_postfix_str(words)
                    if bar.disable:
                        print0(f"step {step}/{steps}  {words}  lr {lr:.2e}  {speed:.3g} images/s")
            if keep:
                checkpoint()
                saved = step
            if stopping:
                return print0(f"stopped at step {step} by a signal; the same command goes on from there")
    if rank == 0:
        save({key: value.cpu() for key, value in vit.state_dict().items()}, path("encoder.pt"))
    barrier()
    return model, step


# --- evaluation and the command line ---------------------------------------------------------------------------------

def draw_predictions(args, model, ds, test, targets, device):
    """OUT/predictions.png: held-out images (training images if there are no others), what was hidden, what was predicted."""
    held = ds if test is None else test
    few = range(0, len(held), math.ceil(len(held) / 8))
    images, _, read = next(load_batches(held, few, 8, 0, device))
    patch_of, path = None, os.path.join(args.out, "predictions.png")
    if model.needs == "tokens":        # a code's picture is the mean of its patches: of raw pixels that is the centroid
        sums = torch.zeros(targets.size, 3 * args.patch_size ** 2, device=device)
        counts = torch.zeros(targets.size, 1, device=device)
        for _, some, tokens in iterate_tokens(args, ds, targets, 500, device):
            sums.index_add_(0, tokens.flatten(), patchify(some, args.patch_size).flatten(0, 1) / 255)
            counts += tokens.flatten().bincount(minlength=targets.size)[:, None]
        patch_of = torch.where(counts > 0, sums / counts.clamp(min=1), .5)
    given = targets.of(images, read if held is ds else None)
    draw_grid(objectives.predictions(model, images / 255, ds.mean, ds.std, given, patch_of, args.seed), path)
    print0(f"drawn in {path}, a column for each {'training' if held is ds else 'held-out'} image: the image, what was visible, "
        "what was predicted" + ", the target" * (args.objective == "maskfeat" or given is not None))


def evaluate(args, vit, step, ds, test, rank, device, started):
    """k-NN and linear probe of the trained and of the random encoder: the closing table, and metrics.jsonl's last line."""
    import probe                                                    # here: probe.py imports this file
    path = os.path.join(args.out, "metrics.jsonl")
    known = [line for line in map(json.loads, open(path)) if line.get("summary") and line["step"] == step]
    if known:
        summary = known[-1]
    else:
        print0("k-NN and linear probe of the trained and of the random encoder")
        trained = probe.evaluate(vit, ds, test, device, args.workers, args.seed)
        random = probe.evaluate(build(args, 2).encoder.to(device), ds, test, device, args.workers, args.seed)
        summary = dict(summary=True, step=step, linear=trained["linear"], linear_random=random["linear"],
                       knn=trained["knn"], knn_random=random["knn"], seconds=round(time.time() - started, 1))
        if rank == 0:
            Metrics(path, step).write(**summary)
    print0(f"\n{'':<18}{'k-NN':>8}{'linear probe':>15}   top-1 % on {test.name}, {len(test)} images")
    for name, suffix in (("random encoder", "_random"), ("trained encoder", "")):
        print0(f"{name:<18}{100 * summary['knn' + suffix]:>8.1f}{100 * summary['linear' + suffix]:>15.1f}")


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Pre-train a ViT by any objective of the two papers. What is not given comes from the recipe: the "
                    "embedded default for --data textures, the objective's paper's for a folder.")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="textures", help="textures (embedded), a folder (ImageNet layout, or pictures without labels), or "
        f"one of {', '.join(NAMED)}")
    add("--classes", metavar="FILE", help="class folders to keep, one a line (ImageNet-100)")
    add("--image-size", type=int, help="pixels a side (paper 224)")
    add("--workers", type=int, help="loading processes per GPU (default: up to 8; 0 for textures)")
    add("--jitter", type=float, help="colour jitter: brightness, contrast, saturation (MaPeT 0.4, ClusterMIM 0)")
    add("--crop", type=float, metavar="AREA", help="least area of a random crop, as a share of the picture; half of the "
        "crops are mirrored, and tokens are made of each crop as it comes. 0: the centre square (ClusterMIM 0.2, MaPeT 0)")
    add = parser.add_argument_group("tokens").add_argument
    add("--tokenizer", metavar="FILE", help="tokenizer.pt of kmeans.py fit (default: fitted first, kept in --out)")
    add("--tokens", metavar="FILE", help="tokens.npy of kmeans.py tokenize, (images, patches), in the data set's order")
    add("--features", help="what the tokenizer clusters: pixel, pixel-norm, hog, dino, deit, mae, clip or a ViT's file "
        "(MaPeT: clip; ClusterMIM: pixel, dino); what mae (pixel, pixel-norm) and maskfeat (hog, dino, ...) predict")
    add("--vocab-size", type=int, metavar="K", help="codebook size (MaPeT 8192, ClusterMIM 50 to 100)")
    add = parser.add_argument_group("model and objective").add_argument
    add("--objective", default="mapet", choices=list(objectives.OBJECTIVES))
    add("--model", choices=list(MODELS), help="(paper: vit_tiny, vit_small, vit_base)")
    add("--patch-size", type=int, help="pixels a side (paper 16)")
    add("--cut", type=int, help="cutting point, class token included (MaPeT 50, ViT-B 60 of 197)")
    add("--mask-ratio", type=float, help="the same as a share of the patches that are hidden (MaPeT, MAE, ClusterMIM 0.75, "
        "MaPeT's ViT-B 0.7, CAE 0.5, BEiT 75 of 196)")
    add("--label-smoothing", type=float, help="of the cross-entropy with tokens (paper 0)")
    add("--decoder-depth", type=int, metavar="BLOCKS", help="of mae, maskfeat, clustermim (paper 8); of cae's regressor and "
        "of its decoder (paper 4 each)")
    add("--pos", choices=["learned", "sincos"], help="positions (MaPeT learned; ClusterMIM, MAE, CAE sincos: fixed)")
    add("--init", choices=["timm", "mae"], help="weights: std 0.02 (MaPeT) or Xavier (ClusterMIM, MAE)")
    add("--drop-path", type=float, help="stochastic depth of the last block (MaPeT 0.1, ClusterMIM 0)")
    add("--layer-scale", type=float, help="initial LayerScale, 0 = none (MaPeT 0.1, ClusterMIM 0)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=float, help="passes over the data; sets the length of the schedule (MaPeT 300, ClusterMIM 200)")
    add("--steps", type=int, metavar="N", help="stop after N optimiser steps of that schedule")
    add("--batch-size", type=int, help="images a step, over all processes and accumulation (MaPeT 2048, ClusterMIM 4096)")
    add("--micro-batch", type=int, metavar="N", help="images at once on one process; the rest of its share is accumulated")
    add("--lr", type=float, help="peak learning rate, as used (MaPeT 1.5e-3 at batch 2048)")
    add("--base-lr", type=float, help="the same per 256 images: lr = base lr * batch / 256 (ClusterMIM 1.5e-4)")
    add("--min-lr", type=float, help="at the end of the cosine (MaPeT 1e-5, ClusterMIM 0)")
    add("--warmup-lr", type=float, help="at the first step (MaPeT 1e-6, ClusterMIM 0)")
    add("--warmup-epochs", type=float, help="linear warm-up (MaPeT 10 of 300, ClusterMIM 40 of 200; other --epochs keep the "
        "share)")
    add("--weight-decay", type=float, help="AdamW, on matrices only (0.05)")
    add("--beta2", type=float, help="AdamW (MaPeT 0.999, ClusterMIM 0.95)")
    add("--clip-norm", type=float, help="largest gradient norm, 0 = any (MaPeT 3, ClusterMIM 0)")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="FOLDER", help="of the run (default: runs/OBJECTIVE-DATA)")
    add("--seed", type=int, default=0)
    add("--device", help="cuda, cpu (default: cuda if there is one)")
    add("--resume", dest="fresh", action="store_false", default=False, help="go on from OUT/last.pt (the default)")
    add("--fresh", action="store_true", help="start over: removes what an earlier run left in --out")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--probe", action=argparse.BooleanOptionalAction, default=True, help="k-NN and linear probe at the end")
    add("--save-every", type=int, metavar="STEPS", help="between checkpoints (default 1000; textures 200)")
    add("--log-every", type=int, default=50, metavar="STEPS", help="between lines of metrics.jsonl")
    args = parser.parse_args(argv)
    for key, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 <= value < math.inf:
            parser.error(f"--{key.replace('_', '-')} {value}: a number from 0 up is wanted")
    for a, b in (("cut", "mask_ratio"), ("lr", "base_lr"), ("tokens", "tokenizer")):
        if getattr(args, a) is not None and getattr(args, b) is not None:
            parser.error(f"--{a} and --{b.replace('_', '-')} say the same thing: give one of them")
    return args


def resolve_args(args, world, device):
    """Fill in what the recipe decides and check what can be checked before anything is read or written.

    Returns what the objective needs: "tokens", "features" or None.
    """
    chosen = recipe(args.objective, args.data, args.model)
    for key in ("tokenizer", "tokens", "vocab_size", "label_smoothing"):
        if args.objective in objectives.TARGETS and getattr(args, key) is not None:
            raise ValueError(f"--{key.replace('_', '-')} is for tokens, which {args.objective} does not predict")
    if objectives.OBJECTIVES[args.objective][0] is objectives.MaPeT and args.decoder_depth is not None:
        raise ValueError(f"--decoder-depth: {args.objective} has no decoder")
    if args.tokenizer or args.tokens:                              # then the file says what the codebook is
        chosen = {key: value for key, value in chosen.items() if key not in ("features", "vocab_size")}
    if args.base_lr is not None:
        chosen["lr"] = None
    if args.epochs is not None:                                    # another length keeps the share of the warm-up
        chosen["warmup_epochs"] *= args.epochs / chosen["epochs"]
    for key, value in chosen.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.objective == "maskfeat" and args.features in ("pixel", "pixel-norm"):
        raise ValueError(f"--features {args.features}: to predict pixels is --objective mae; maskfeat predicts hog or the "
                         "features of an encoder")
    if args.tokens and args.crop:
        raise ValueError(f"--tokens {args.tokens}: stored tokens are of whole images, and a crop or a flip (--crop "
                         f"{args.crop:g}) moves the patches away from them; --crop 0, or --tokenizer for tokens of each crop")
    args.lr = args.base_lr * args.batch_size / 256 if args.lr is None else args.lr
    args.out = args.out or os.path.join("runs", f"{args.objective}-{os.path.basename(os.path.normpath(args.data))}")
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    if args.workers is None:
        args.workers = 0 if args.data == "textures" else min(8, (os.cpu_count() or 1) // max(1, torch.cuda.device_count()))
    for key in ("crop", "label_smoothing", "drop_path"):
        if getattr(args, key) > 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key):g} is a share: from 0 to 1")
    if not args.crop and (args.vocab_size or 0) > kmeans.UNSET:
        raise ValueError(f"--vocab-size {args.vocab_size}: stored tokens have 16 bits, {kmeans.UNSET} codes at most; "
                         "with --crop nothing is stored")
    for key in ("batch_size", "epochs", "lr", "log_every", "save_every", "steps", "micro_batch", "decoder_depth",
                "vocab_size"):
        if getattr(args, key) == 0:
            raise ValueError(f"--{key.replace('_', '-')} must be more than 0")
    micro = args.micro_batch or args.batch_size // world or 1
    if args.batch_size % (micro * world):
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {world} processes" +
                         (f" x --micro-batch {micro}" if args.micro_batch else ""))
    with torch.device("meta"):                                     # sizes, --cut and --mask-ratio out of range
        return build(args, args.vocab_size or 2).needs


def run(args):
    started = time.time()
    rank, world, device = setup(args.device)
    wants = resolve_args(args, world, device)
    ds, test = open_splits(args.data, args.image_size, args.classes)
    if args.batch_size > len(ds):
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(ds)} images of {ds.name}")
    targets, tokenizer = given_targets(args, ds, wants, device)
    last = os.path.join(args.out, "last.pt")
    state = resume(last, args) if os.path.exists(last) and not args.fresh else None

    # --- everything that can be checked was checked: now files may change
    if args.fresh and rank == 0:
        start_over(args)
    barrier()
    os.makedirs(args.out, exist_ok=True)
    print0(f"{ds.name}: {len(ds)} images" + (f", {len(ds.classes)} classes" if ds.classes else "") + f"; run in {args.out}")
    targets = targets or token_targets(args, ds, tokenizer, rank, device)
    if rank == 0 and wants == "tokens":
        describe_codebook(args, ds, targets, device)
    done = train(args, ds, targets, state, rank, world, device)
    if not done:
        return
    model, step = done
    if rank == 0:
        draw_predictions(args, model, ds, test, targets, device)
    if args.probe and test is None:
        print0("no labels, or no test split: no k-NN and no linear probe")
    elif args.probe:
        evaluate(args, model.encoder, step, ds, test, rank, device, started)
    print0(f"\n{time.time() - started:.0f} s. In {args.out}: {', '.join(sorted(os.listdir(args.out)))}; encoder.pt is the ViT, "
        "with timm's names")
    print0("next: " + "\n      ".join(next_commands(args)))


def start_over(args):
    """Remove what an earlier run left in --out, but not a file that the command line hands in."""
    handed_in = [os.path.abspath(path) for path in (args.tokenizer, args.tokens) if path]
    for name in ("last.pt", "encoder.pt", "metrics.jsonl", "predictions.png", "tokens.npy", "tokenizer.pt"):
        path = os.path.abspath(os.path.join(args.out, name))
        if os.path.exists(path) and path not in handed_in:
            os.remove(path)


def next_commands(args):
    data = "" if args.data == "textures" else f" --data {args.data}"
    objective, other = args.objective, "mim" if args.objective == "mapet" else "mapet"
    lines = [f"python objectives.py {objective} --patches 6 --cut 3       who may attend to whom",
             f"python probe.py linear {args.out}{data}       the best of many linear heads; also finetune, tokens, show",
             f"python train.py --objective {other}{data}       what another objective learns from the same images"]
    if os.path.exists(os.path.join(args.out, "tokenizer.pt")):
        lines.insert(1, f"python kmeans.py show --tokenizer {args.out}/tokenizer.pt{data} --out {args.out}       "
                     "the codebook as a picture")
    if objective != "maskfeat" and args.features != "pixel-norm":
        lines.append(f"python train.py --objective {objective}{data} --features pixel-norm --out {args.out}-norm       "
                     "the same objective, patches standardised")
    return lines


def main(argv=None):
    args = parse(argv)
    with exit_on_error("train.py"):
        run(args)


if __name__ == "__main__":
    main()
