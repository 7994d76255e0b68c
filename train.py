"""Recipes, data sets, the one training loop, checkpoints.

torchrun --nproc_per_node 1 train.py --objective mapet            embedded data, two CPU cores, minutes
python train.py --data FOLDER --preset laptop                     the same on pictures of your own
torchrun --nproc_per_node 8 train.py --data IMAGENET              the paper's recipe: MaPeT, Table 7

One command goes the whole way: images -> K-means tokens -> pre-training -> k-NN and linear probe. What it
makes is in --out, and the same command again goes on where it stopped.

Step s is a function of (seed, s) and the weights: the order of the images, their augmentation and the
permutations z are drawn for the *global* batch, of which each process takes its rows; torch's own
generator, which decides stochastic depth, is seeded from (seed, s, rank). So a resumed run equals an unbroken
one bit for bit (on the CPU), and 1, 2 or 8 processes run the same experiment: to rounding where the network
draws nothing, statistically where it does (stochastic depth, dVAE).
"""
import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock                                  # torch brings it
from PIL import Image, ImageOps, PngImagePlugin
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import make_dataset
from torchvision.io import decode_jpeg, decode_png
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor

import objectives
from kmeans import (KMeans, KMeansTokenizer, all_reduce, average_patches, barrier, blank_tokenizer,
                    fit_tokenizer, is_main_process, load_batches, load_tokenizer, load_tokens, print0,
                    rank_and_world, sample_images, tokenize, write_npy)
from tcas import describe_codebook
from vit import (IMAGENET, MODELS, draw_rows, exit_on_error, normalize, read_checkpoint, save,
                 write_atomically)


# --- recipes: an explicit flag beats the preset -----------------------------------------------------------

# MaPeT: Table 7, for ImageNet and every other folder of images; the rows of MaPeT's own tables. ClusterMIM:
# Sec. 4.1, ViT-S, B and L alike; base learning rate and warm-up are not in its text: MAE's. Laptop: ours,
# for two CPU cores; learning rate, cut and K were chosen on the split "val" of textures.
SETTINGS = {            # MaPeT, ClusterMIM, laptop
    "model":            ("vit_base", "vit_base", "vit_micro", "size of the ViT"),
    "image_size":       (224, 224, 48, "pixels a side"),
    "patch_size":       (16, 16, 8, "pixels a side"),
    "pos":              ("learned", "sincos", "sincos", "positions: learned, or sincos: fixed"),
    "init":             ("timm", "mae", "timm", "weights: timm's std 0.02, or mae: Xavier"),
    "drop_path":        (.1, 0., 0., "stochastic depth of the last block"),
    "layer_scale":      (.1, 0., 0., "initial LayerScale, 0 = none"),
    "decoder_depth":    (4, 8, 1, "blocks: of mae, maskfeat, clustermim; of cae's regressor and decoder"),
    "features":         ("clip", "pixel", "pixel", "what K-means clusters: pixel, pixel-norm, hog, dino, "
                         "deit, mae, clip, a ViT's file; mae (pixel, pixel-norm) or maskfeat predict it"),
    "vocab_size":       (8192, 50, 64, "codebook size K"),
    "crop":             (0., .2, 0., "least area of a random crop, half of them mirrored; 0: center square"),
    "jitter":           (.4, 0., 0., "color jitter: brightness, contrast, saturation"),
    "epochs":           (300., 200., 6., "passes over the data (laptop: as many images as 6 of textures)"),
    "batch_size":       (2048, 4096, 32, "images a step, over all processes"),
    "lr":               (1.5e-3, 0., 1.5e-3, "peak learning rate, as used; comes before --base-lr"),
    "base_lr":          (0., 1.5e-4, 0., "the same per 256 images: lr = base lr * batch / 256"),
    "min_lr":           (1e-5, 0., 1e-5, "at the end of the cosine"),
    "warmup_lr":        (1e-6, 0., 1e-6, "at the first step"),
    "warmup_epochs":    (10., 40., .3, "linear warm-up; fewer --epochs shrink it"),
    "cosine":           ("start", "warmup", "warmup", "begins at step 0 (start), or after the warm-up"),
    "weight_decay":     (.05, .05, .05, "AdamW, on matrices only"),
    "beta2":            (.999, .95, .95, "AdamW"),
    "clip_norm":        (3., 0., 1., "largest gradient norm, 0 = any"),
}
MAPET, CLUSTERMIM, LAPTOP = ({key: row[i] for key, row in SETTINGS.items()} for i in range(3))
# Learned tokenizers have VQ-KD's recipe (BEiT v2's code), whose teacher is CLIP's ViT-B/16, here DINO's: the
# recipes of DALL-E, VQGAN and PeCo are for convolutions.
VQKD = dict(MAPET, features="dino_vitb16", decoder_depth=3, crop=.08, jitter=0., layer_scale=0., drop_path=0.,
            epochs=100., batch_size=512, lr=2e-4, weight_decay=1e-4, beta2=.99, clip_norm=0., cosine="warmup")
# MaskFeat is the row of ClusterMIM's tables; its own paper's recipe is for mask tokens in the encoder.
PAPERS = dict(
    mae=CLUSTERMIM, maskfeat=dict(CLUSTERMIM, features="hog"), clustermim=CLUSTERMIM,
    cae=dict(MAPET, pos="sincos", init="mae"), beit=MAPET, mim=MAPET, pim=MAPET, mapet=MAPET,
    dvae=VQKD, vq=VQKD, peco=VQKD, vqkd=VQKD)
HARD_CODES = "vq", "peco", "vqkd"           # learned tokenizers with a codebook


def recipe(objective, preset, model=None):
    """The settings of an objective, a dict of flags; preset: paper or laptop; model: of --model, or None."""
    kind, _, mask_ratio = objectives.OBJECTIVES[objective]
    chosen = dict(PAPERS[objective], mask_ratio=mask_ratio)
    if objective in ("pim", "mapet") and (model or chosen["model"]) == "vit_base":
        chosen["mask_ratio"] = .7                              # MaPeT Table 6: its best row for ViT-B
    if preset == "laptop":
        chosen.update(LAPTOP)
        if objective in ("maskfeat", "peco", "vqkd"):
            chosen["features"] = "hog"                         # no download
        if objective in objectives.TOKENIZERS:                 # half the time will do; std 0.02 starts slowly
            chosen.update(epochs=3., init="mae")
        else:
            chosen["mask_ratio"] = .75 if kind is objectives.MaskedAutoencoder else .5
    return chosen


# --- what a step is: which images, which learning rate, which parameters ----------------------------------

def derive_seed(*numbers):
    """One seed from several, as different from its neighbors' as a random number; (s, 0) is (s,)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def schedule(n, batch, seed, start, stop, rows):
    """Yields, for each micro-batch of this process, its items (epoch, i); steps start..stop-1.

    An epoch is a permutation of the n images, a function of (seed, epoch), cut into global batches; the rest
    is dropped. `rows`: a range, where in a global batch this process's micro-batches begin.
    """
    for step in range(start, stop):
        epoch, k = divmod(step, n // batch)
        if step == start or k == 0:
            generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
            order = torch.randperm(n, generator=generator).tolist()
        for row in rows:
            first = k * batch + row
            yield [(epoch, i) for i in order[first:first + rows.step]]


def learning_rate(step, steps, warmup, peak, start, end, cosine="warmup"):
    """Linear warm-up from `start` to `peak`, then half a cosine down to `end`, step by step.

    cosine   "warmup": it begins after the warm-up (MAE, ClusterMIM, BEiT); "start": at step 0 (MaPeT, timm)
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    first = warmup if cosine == "warmup" else 0
    done = (step - first) / max(1, steps - first)
    return end + (peak - end) * .5 * (1 + math.cos(math.pi * done))


def is_decayed(name, p):
    """Weight decay is for matrices: not for biases, norms, LayerScale, positions, class token."""
    return p.ndim >= 2 and not name.endswith(("pos_embed", "cls_token"))


def make_optimizer(model, args):
    """AdamW. The mask token, (1, 1, d), is decayed, as in the released code.

    ClusterMIM's code decays the class token, too.
    """
    decayed = dict(params=[], weight_decay=args.weight_decay)
    free = dict(params=[], weight_decay=0.)
    for name, p in model.named_parameters():
        group = decayed if is_decayed(name, p) else free
        group["params"].append(p)
    return torch.optim.AdamW([decayed, free], lr=args.lr, betas=(.9, args.beta2), fused=True)


def divide_batch(args):
    """Where this process's micro-batches begin in a global batch, a range; by default of up to 256."""
    rank, world = rank_and_world()
    local = args.batch_size // world
    micro = args.micro_batch or max(size for size in range(1, 257) if local % size == 0)
    if local == 0 or args.batch_size % (micro * world):
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {world} processes x "
                         f"--micro-batch {micro}")
    return range(rank * local, (rank + 1) * local, micro)


# --- the loop ---------------------------------------------------------------------------------------------

def train(model, optimizer, ds, args, compute_loss, device, checkpoint, metrics=None, before_step=None):
    """Steps of `optimizer` on batches of `ds`, from `checkpoint` if it is there, to the end or to args.steps.

    compute_loss(net, images, labels, read, step, micro) -> loss, dict of 0-d logs
                 images uint8 (b, 3, S, S), those at `read` (b,) of ds, micro: their slice of the global batch
    args         epochs batch_size micro_batch lr min_lr warmup_lr warmup_epochs cosine clip_norm steps seed
                 workers log_every save_every compile
    -> (step, steps): where it ended, of how many; by a signal if before args.steps
    """
    rank, world = rank_and_world()
    rows = divide_batch(args)
    per_epoch = len(ds) // args.batch_size
    steps = max(1, round(args.epochs * per_epoch))
    warmup = round(args.warmup_epochs * per_epoch)
    stop = min(steps, args.steps or steps)
    step = load_checkpoint(checkpoint, model, optimizer, metrics)
    if args.compile:
        model.compile()                                        # in place, so that parameter names stay
    net = model
    if world > 1:
        warnings.filterwarnings("ignore", ".*broadcast_buffers.*")          # torch 2.14 renames it
        net = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    batches = load_steps(ds, args, step, stop, device)
    sums, waited, logged, since = 0., 0., step, time.time()
    asked = False
    with contextlib.closing(batches), catch_signals() as received:
        while step < stop and not asked:
            lr = learning_rate(step, steps, warmup, args.lr, args.warmup_lr, args.min_lr, args.cosine)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1.)
            torch.manual_seed(derive_seed(args.seed, step, 1 + rank))        # without: the seed of z
            for row in rows:
                before = time.time()
                images, labels, read = next(batches)
                waited += time.time() - before
                micro = slice(row, row + rows.step)
                # All micro-batches make one gradient: the processes exchange it once, with the last.
                net.require_backward_grad_sync = row == rows[-1]
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss, logs = compute_loss(net, images, labels, read, step, micro)
                (loss / len(rows)).backward()
                logs = {"loss": loss.detach(), **logs}
                sums = sums + torch.stack([*logs.values()]).float() / len(rows)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm or math.inf)
            step += 1
            save_due = step == stop or step % args.save_every == 0
            # To look at the norm and at the signals, a GPU must have done all that is queued: not every step.
            if device.type == "cpu" or save_due or step % 8 == 0:
                if not norm.isfinite():                        # the same on every process
                    raise ValueError(f"step {step}: the loss or its gradient is not finite, what was saved "
                                     f"is kept; try a lower --lr (now {args.lr:g})")
                signals = torch.tensor(float(len(received)), device=device)
                all_reduce(signals)                            # to any process
                asked = signals.item() > 0
            if before_step:
                before_step(step / steps)
            optimizer.step()
            optimizer.zero_grad()
            if step in (1, stop) or step % args.log_every == 0:
                all_reduce(sums)
                done, seconds = step - logged, time.time() - since
                means = dict(zip(logs, (sums / (world * done)).tolist()))
                means["images_per_second"] = done * args.batch_size / seconds
                append_metrics(metrics, step=step, epoch=step / per_epoch, lr=lr, **means)
                words = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
                if device.type == "cuda":
                    words += f", {torch.cuda.max_memory_allocated() / 1e9:.3g} GB"
                print0(f"step {step}/{steps}  lr {lr:.2e}  {words}, {waited / seconds:.0%} waiting for data")
                sums, waited, logged, since = 0., 0., step, time.time()
            if rank == 0 and (asked or save_due):
                state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
                save(state, checkpoint)
    if step < steps:                                           # by a signal, or --steps
        print0(f"{checkpoint}: step {step} of {steps}; to go on: the same command, without a --steps")
    return step, steps


def load_checkpoint(path, model, optimizer, metrics=None):
    """The step to go on from, 0 without a checkpoint. Lines of `metrics` written after it are dropped."""
    step = 0
    if os.path.exists(path):
        state = read_checkpoint(path)
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise ValueError(f"{path}: not a checkpoint of this run; --fresh starts over") from None
        print0(f"going on from {path} at step {step}")
    barrier()                                                  # nobody writes before everybody has read
    if metrics and os.path.exists(metrics) and is_main_process():
        kept = [json.dumps(line) + "\n" for line in read_metrics(metrics) if line["step"] <= step]
        with write_atomically(metrics) as temporary:
            Path(temporary).write_text("".join(kept))
    return step


def load_steps(ds, args, start, stop, device):
    """(images on device, labels on device, index really read) of each micro-batch of steps start..stop-1."""
    keys = schedule(len(ds), args.batch_size, args.seed, start, stop, divide_batch(args))
    # A loader draws a seed: not from torch's generator, which would shift the step's random numbers.
    loader = DataLoader(ds, batch_sampler=keys, num_workers=args.workers, worker_init_fn=ignore_signals,
                        pin_memory=device.type == "cuda", generator=torch.Generator())
    for images, labels, wanted, read in loader:
        ds.note_damaged(wanted, read)
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True), read


def ignore_signals(_):
    """For loading processes, which get Ctrl-C and SIGTERM, too: the main process decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def catch_signals():
    """Yields the list of SIGTERM and SIGINT that this process has got."""
    received = []

    def note(number, frame):
        received.append(number)

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):              # only the main thread can have handlers
                stack.callback(signal.signal, number, signal.signal(number, note))
        yield received


def setup(device=None):
    """The torch.device of this process; joins torchrun's processes, by NCCL on CUDA, by gloo on the CPU."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
            torch.backends.cuda.enable_cudnn_sdp(False)        # its backward with a mask can be wrong
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:            # an unknown name, or not on this machine
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")      # names of files need not be UTF-8
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group(dist.get_default_backend_for_device(device))
    return device


# --- data sets --------------------------------------------------------------------------------------------

@dataclasses.dataclass(eq=False)
class Images(Dataset):
    """Item (epoch, i): picture i transformed, uint8 (3, S, S); its label or -1; i; the index really read.

    What is random in `transform` is a function of (seed, epoch, i). A neighbor stands in for a damaged
    picture, as a run of days must not die of one file.

    load        function i -> the whole picture, uint8 (3, H, W); ValueError if its bytes are none
    labels      (n,) int64, -1: none; classes: their names, None: no labels
    transform   makes what has any size image_size wide and high; None: it has this size
    paths       of the files, if it is made of some; mean, std: of the channels, on the scale 0..1
    """

    name: str
    load: object
    labels: np.ndarray
    classes: object
    image_size: int
    transform: object = None
    paths: tuple = ()
    mean: tuple = IMAGENET[0]
    std: tuple = IMAGENET[1]
    seed: int = 0

    def __post_init__(self):
        self.labels = np.asarray(self.labels, np.int64)
        self.damaged = set()

    def __len__(self):
        return len(self.labels)

    def view(self, transform, **changes):
        """The same pictures under another transform."""
        return dataclasses.replace(self, transform=transform, **changes)

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        picture, read = self.read(i)
        if self.transform:
            with torch.random.fork_rng(devices=[]):
                # Of the CPU alone: torch.manual_seed, which asks for GPUs, takes a tenth of a picture's time.
                torch.default_generator.manual_seed(derive_seed(self.seed, epoch, i))
                picture = self.transform(picture)
        return picture, int(self.labels[read]), i, read

    def read(self, i):
        """Picture i, or the first after it that is not damaged; its index."""
        for _ in range(100):
            try:
                return self.load(i), i
            except ValueError as error:
                print(f"cannot read {self.paths[i]} ({error}): its neighbor stands in", file=sys.stderr)
            i = (i + 1) % len(self)
        raise OSError(f"{self.name}: 100 pictures in a row cannot be read, the last is {self.paths[i - 1]}")

    def note_damaged(self, wanted, read):
        """More pictures for which a neighbor stood in, indices (b,); beyond 1 % of all it is an error."""
        self.damaged |= set(wanted[wanted != read].tolist())
        if len(self.damaged) > .01 * len(self):
            raise OSError(f"{self.name}: {len(self.damaged)} of {len(self)} pictures cannot be read, more "
                          f"than 1 %: replace or remove them; the first is {self.paths[min(self.damaged)]}")


def render_texture(seed, i, size=48):
    """Image i of stream `seed`: uint8 (3, size, size), whose 256 levels span +-3.5 deviations; its label.

    label = 5 * period + orientation of the stripes that fill the object. All else is nuisance: its shape and
    pose, stripe phase, contrast and bending, colors, a fainter striped background (the class is what the
    *object* is made of) and pixel noise (raw pixels are weak). The phase of bent stripes cannot be told from
    their neighbors, orientation and period can: a mean-squared prediction of a hidden patch is nearly flat,
    a distribution over tokens still says which texture it is.
    """
    rng = np.random.default_rng([seed, i])
    draws = iter(rng.random((40, 1, 1)).astype(np.float32))
    noise = rng.standard_normal((3, size, size), np.float32)
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32)

    def uniform(low, high):                                    # the next random number, (1, 1)
        return low + (high - low) * next(draws)

    def paint(contrast, angle, period):      # stripes, 6 or 9 cycles per image, random phase and color, bent
        bend = sum(np.sin(uniform(5, 9) * axis + uniform(0, 6.3)) for axis in (x, y))
        along = x * np.cos(angle) + y * np.sin(angle)
        wave = np.sin((6 + 3 * period) * math.pi * along + .8 * bend + uniform(0, 6.3))
        gray = uniform(-.25, .25)
        return np.stack([gray + uniform(-.15, .15) + contrast * wave for _ in range(3)])

    label = np.floor(uniform(0, 10))
    period, orientation = np.divmod(label, 5)

    square = np.floor(uniform(0, 2))                           # or a ring
    scale, turn = uniform(.75, .9), uniform(-.15, .15)
    a, b = (x - uniform(-.2, .2)) / scale, (y - uniform(-.2, .2)) / scale
    a, b = a * np.cos(turn) + b * np.sin(turn), b * np.cos(turn) - a * np.sin(turn)      # object coordinates
    radius = np.hypot(a, b)
    ring = (radius < 1.05) & (radius > .5)
    inside = np.where(square, np.maximum(abs(a), abs(b)) < .85, ring)

    foreground = paint(.45 * uniform(.6, 1.4), orientation * math.pi / 5 + uniform(-.12, .12), period)
    background = paint(.25, uniform(0, math.pi), np.floor(uniform(0, 2)))
    values = (np.where(inside, foreground, background) + .3 * noise) / .45               # of unit variance
    levels = np.rint((values / 7 + .5) * 255).clip(0, 255)
    return levels.astype(np.uint8), int(label.item())


# Streams of the embedded data: seed and number of images; "val" is for choosing anything.
TEXTURES = {"train": (1, 12000), "test": (2, 2000), "val": (3, 2000)}


def open_textures(split, size=48):
    """The embedded data, in memory."""
    seed, n = TEXTURES[split]
    images, labels = zip(*(render_texture(seed, i, size) for i in range(n)))
    load = torch.from_numpy(np.stack(images)).__getitem__
    return Images(f"textures/{split}", load, labels, range(10), size, mean=3 * (.5,), std=3 * (1 / 7,))


# What the wheels of torchvision and Pillow read without further packages.
PICTURES = set(""".jpg .jpeg .jpe .jfif .png .apng .gif .webp .avif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm
                  .jp2 .j2k .jpx .tga .pcx .ico .icns .dds .sgi .rgb .bw .xbm .xpm .msp .qoi .psd
                  .im""".split())
Image.MAX_IMAGE_PIXELS = None                                  # large pictures are no attack here,
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30      # nor are their comments


def decode_by_pil(data):
    """RGB of any mode as a viewer shows it: EXIF rotation, 16-bit grays scaled, on white."""
    with Image.open(io.BytesIO(data)) as image:
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]                # a TIFF may have 12
        gray_16 = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
        image.load()
        with contextlib.suppress(Exception):                   # broken metadata costs no picture
            image = ImageOps.exif_transpose(image)
        if gray_16:
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> bits - 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"its pixels have 32 bits (mode {image.mode}) and no scale: 8 or 16 are read")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return pil_to_tensor(image.convert("RGB"))


def decode_picture(data):
    """The bytes of a picture file -> uint8 (3, H, W): JPEGs by torchvision's decoder, all else by PIL.

    ValueError for bytes that are no picture, with the reason.
    """
    raw = torch.frombuffer(bytearray(data or b"-"), dtype=torch.uint8)
    if data[:2] == b"\xff\xd8":
        with contextlib.suppress(RuntimeError):                # damaged: PIL says how
            return decode_jpeg(raw, "RGB", apply_exif_orientation=True)
    try:
        return decode_by_pil(data)
    except MemoryError:
        raise
    except Exception as error:                                 # decoders raise half a dozen kinds
        with contextlib.suppress(RuntimeError):                # PIL refuses what only its metadata ails
            return v2.functional.to_dtype(decode_png(raw, "RGB"), torch.uint8, scale=True)
        reason = str(error).split("<_io")[0].split("\n")[0]
        raise ValueError(f"{reason}; it begins with {data[:16]!r}") from None


def read_picture(paths, i):
    return decode_picture(Path(paths[i]).read_bytes())


def count_cores():
    """Of this process; a scheduler may give it some of the machine's only."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def crop_square(picture):
    """The largest center square: before resizing, as a picture may be 20000 x 2."""
    return v2.functional.center_crop(picture, min(picture.shape[-2:]))


def center_square(size):
    """What MaPeT's images and their stored tokens share; bicubic."""
    return v2.Compose([v2.Lambda(crop_square), v2.Resize((size, size), InterpolationMode.BICUBIC)])


def random_crop(size, area):
    """A random crop, at least `area` of the picture, bicubic, half of them mirrored (MAE, ClusterMIM)."""
    return v2.Compose([v2.RandomResizedCrop(size, (area, 1), interpolation=InterpolationMode.BICUBIC),
                       v2.RandomHorizontalFlip()])


def keep_squares(ds):
    """Pictures as center squares, decoded by all cores into data/squares once, for all runs: a memory map."""
    if not ds.transform:
        return ds
    about = ds.name, ds.image_size, ds.paths, [os.stat(path).st_mtime_ns for path in ds.paths]
    path = f"data/squares/{zlib.crc32(repr(about).encode()):08x}.npy"
    with FileLock(f"{path}.lock"):                             # other processes, and other runs, wait
        if not os.path.exists(path):
            print(f"decoding the {len(ds)} pictures of {ds.name} once, into {path}", flush=True)
            batches = load_batches(ds, range(len(ds)), 64, count_cores(), desc="squares")
            squares = (images.numpy() for images, _, _ in batches)
            write_npy(path, (len(ds), 3, ds.image_size, ds.image_size), squares)
    load = torch.from_numpy(np.load(path, mmap_mode="c")).__getitem__
    return ds.view(None, load=load)


NAMED = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def open_dataset(spec, split="train", image_size=None, classes=None):
    """The data set `spec`, split "train" or "test", as `Images`; ValueError where a folder lacks the split.

    spec     "textures" (embedded), a name in NAMED (downloaded into data/), a folder in ImageNet's layout
             (train/CLASS/*.jpg, val/CLASS/*.jpg) or any folder of pictures without labels
    classes  a file with the class folders to keep, one a line (ImageNet-100)
    """
    if spec not in ("textures", *NAMED):
        return open_folder(spec, split, image_size or 224, classes)
    if classes:
        raise ValueError("--classes picks class folders: it goes with --data FOLDER only")
    if spec == "textures":
        return open_textures(split, image_size or 48)
    return open_named(spec, split, image_size or 224)


def open_named(name, split, image_size):
    try:
        with FileLock(f"data/{name}.lock"):                    # one process fetches it, if it is not there
            source = NAMED[name]("data", split == "train", download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"--data {name}: not in data/ and cannot be fetched ({error})") from None
    load = torch.from_numpy(source.data).permute(0, 3, 1, 2).__getitem__
    return Images(f"{name}/{split}", load, source.targets, source.classes, image_size,
                  center_square(image_size))


def read_classes(path, found):
    """Names of class folders, one a line, or all on one line (solo-learn's ImageNet-100)."""
    text = Path(path).read_text("utf-8-sig", "replace").strip()
    names = {name.strip() for name in text.split("\n" if "\n" in text else None)} - {""}
    unknown = names - set(found)
    if unknown or not names:
        raise ValueError(f"--classes {path}: there is no class folder {min(unknown, default='')!r}")
    return sorted(names)


def open_folder(folder, split, image_size, classes_file=None):
    """What is taken and what is left out, such as all that is hidden (.cache/, ._1.jpg), is printed."""
    folder = os.path.abspath(folder)
    inside = {entry.name.lower(): entry.path for entry in os.scandir(folder) if entry.is_dir()}
    train_root = inside.get("train") or inside.get("training")
    tests = [inside[name] for name in ("val", "valid", "validation", "test", "testing") if name in inside]
    if tests and not train_root:
        raise ValueError(f"--data {folder}: there is {tests[0]}, but no train/ beside it")
    if split != "train" and not tests:
        raise ValueError(f"--data {folder}: no val/ or test/ folder")
    root = tests[0] if split != "train" else train_root or folder
    classes = []
    if train_root:
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
    if classes_file:
        classes = read_classes(classes_file, classes)
    left_out = Counter()

    def is_picture(path):
        ending = os.path.splitext(path)[1].lower()
        taken = ending in PICTURES and f"{os.sep}." not in path[len(root):]
        left_out[ending] += not taken
        return taken

    numbers = {name: i for i, name in enumerate(classes)} or {"": -1}
    samples = make_dataset(root, numbers, is_valid_file=is_picture, allow_empty=True)
    if {label for _, label in samples} != set(numbers.values()):
        raise ValueError(f"--data {root}: no pictures in it, or in one of its class folders "
                         f"({' '.join(sorted(PICTURES))})")
    paths, labels = zip(*samples)
    print0(f"{root}: {len(paths)} pictures, {len(classes) or 'no'} classes; left out, by their endings: "
           f"{dict(+left_out)}")
    load = functools.partial(read_picture, paths)
    return Images(root, load, labels, classes or None, image_size, center_square(image_size), paths)


def open_splits(spec, image_size=None, classes=None):
    """(training set, test set or None, why there is none); a test set has labels of the same classes."""
    ds = open_dataset(spec, "train", image_size, classes)
    test, why = None, "no labels"
    if ds.classes:
        try:
            test = open_dataset(spec, "test", image_size, classes)
            if test.classes != ds.classes:
                raise ValueError("the class folders of its test split are not those of train/")
        except ValueError as error:                            # none, or unsorted pictures
            test, why = None, str(error)
    return ds, test, why


# --- the files of a run -----------------------------------------------------------------------------------

# Flags that may change between a run and its continuation: they do not change what is computed. So may paths.
FREE = set("out device workers steps fresh compile probe save_every log_every micro_batch".split())
PATHS = {"data", "classes", "tokenizer", "tokens"}


def read_metrics(path):
    """The whole lines of a metrics.jsonl, as dicts; a killed run may have left half a line."""
    if not os.path.exists(path):
        return []
    return [json.loads(line) for line in open(path) if line.endswith("}\n")]


def read_summary(folder):
    """(the last line of a run that came to its end, None), or (None, why there is none)."""
    found = [line for line in read_metrics(f"{folder}/metrics.jsonl") if line.get("summary")]
    if not found:
        return None, "no accuracies in its metrics.jsonl"
    end = found[-1]
    if end["step"] < end["steps"]:
        return None, f"it stopped at step {end['step']} of {end['steps']}"
    return end, None


def append_metrics(path, **line):
    """One JSON object a line, by the main process."""
    if path and is_main_process():
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def fixed_settings(args):
    """The flags of a run that its continuation must have, too."""
    return {key: value for key, value in vars(args).items() if key not in FREE}


def check_settings(path, settings, fresh=False):
    """Refuse to go on with the files of a run that had other settings; note these in `path`, a JSON file."""
    there = settings
    if os.path.exists(path) and not fresh:
        try:
            there = json.loads(Path(path).read_text())
        except ValueError:
            raise ValueError(f"{path}: no settings of a run; --fresh starts over") from None
    differ = {key for key in settings if there.get(key) != settings[key]}
    words = [f"--{key.replace('_', '-')} {there.get(key)} there, {settings[key]} here" for key in differ]
    if differ - PATHS:
        raise ValueError(f"{path} is of a run with other settings ({', '.join(words)}): take these, another "
                         "--out, or --fresh")
    if differ:
        print0(f"note: this run began with another path: {', '.join(words)}")
    barrier()                                                  # everybody has looked before anybody writes
    if is_main_process():
        with write_atomically(path) as temporary:
            Path(temporary).write_text(json.dumps(settings, indent=1))


# --- what is predicted: tokens, or the features of a teacher ----------------------------------------------

def name_needs(args):
    """What a forward is given beside images: "tokens", the "features" of a teacher, or None.

    PeCo's teacher is not given to it, but part of its loss.
    """
    if args.objective in ("peco", "vqkd") or args.objective == "maskfeat" and args.features != "hog":
        return "features"
    if args.objective not in (*objectives.TARGETS, *objectives.TOKENIZERS):
        return "tokens"


def open_source(args, ds):
    """What tokens or features come from, read before anything is written or removed.

    Stored tokens (images, n); or a tokenizer: --tokenizer, or that of this run, which was started before.
    One that is to be fitted, or a teacher, has features, but no codes.
    """
    if args.tokens:
        tokens = load_tokens(args.tokens, len(ds), (args.image_size // args.patch_size) ** 2)
        if args.vocab_size and args.vocab_size <= tokens.max():
            raise ValueError(f"{args.tokens}: token {tokens.max()} is beyond --vocab-size {args.vocab_size}")
        return tokens
    needs, path = name_needs(args), args.tokenizer
    if needs == "tokens" and not args.fresh and os.path.exists(f"{args.out}/tokenizer.pt"):
        path = path or f"{args.out}/tokenizer.pt"
    if path:
        tokenizer = load_tokenizer(path)
        if (tokenizer.image_size, tokenizer.patch_size) != (args.image_size, args.patch_size):
            raise ValueError(f"{path}: it is of --image-size {tokenizer.image_size} --patch-size "
                             f"{tokenizer.patch_size}, unlike this run: take these, or another --out")
        if args.tokenizer:                                     # a setting: its path may change, but not these
            args.codes = zlib.crc32(tokenizer.weight.numpy())
        return tokenizer
    if needs:
        return blank_tokenizer(ds, args.features, args.patch_size)


def make_targets(args, ds, source, device):
    """(function of uint8 images and their indices in `ds` or None: what forward is given; size; perceptual).

    Tokens of center squares are stored once; those of crops (--crop) are made as they come. size: of the
    codebook, or of the features; perceptual: PeCo's frozen network. Tokenizer and teacher stay outside the
    model: no gradient, no weight decay, no room in checkpoints.
    """
    tokens = make = size = perceptual = None
    needs = name_needs(args)
    if args.tokens:
        tokens, size = source, args.vocab_size or 1 + int(source.max())
    elif needs == "tokens":
        pictures = ds
        if ds.transform:                                       # k-CLIP's tokens want twice the pixels
            pictures = ds.view(center_square(source.input_size), image_size=source.input_size)
        if source.vocab_size == 0:                             # no codes yet
            print0(f"K-means of {args.features} features, K = {args.vocab_size}")
            source = fit_tokenizer(pictures, args.features, args.vocab_size, args.patch_size, args.image_size,
                                   args.seed, args.workers, device)
            if is_main_process():
                source.save(f"{args.out}/tokenizer.pt")
        make = source.to(device)
        size = make.vocab_size
        if not args.crop:
            tokens = tokenize(make, pictures, f"{args.out}/tokens.npy", args.workers, device)
    elif needs:
        make = source.to(device).compute_features
        size = make(ds[0][0][None].to(device)).shape[-1]
        if args.objective == "peco":                           # it compares images and what it makes of them
            perceptual = source.encoder.forward if source.encoder else make
            make = None
    if tokens is not None and is_main_process():
        print(describe_codebook(tokens, ds.labels, size))

    def give(images, read=None):
        if tokens is not None and read is not None:
            stored = torch.from_numpy(tokens[read.numpy()].astype(np.int64))
            return stored.to(device, non_blocking=True)
        return make(images) if make else None                  # of these very images: of a crop, its tokens
    return give, size, perceptual


def build(args, size, perceptual=None):
    """The objective around a new ViT, initialized by the seed; size, perceptual: see `make_targets`."""
    torch.manual_seed(args.seed)
    vit = MODELS[args.model](image_size=args.image_size, patch_size=args.patch_size, drop_path=args.drop_path,
                             layer_scale=args.layer_scale or None, pos=args.pos, init=args.init)
    target = name_needs(args) or args.features                 # of maskfeat, or mae
    vocab_size = args.vocab_size if args.objective in objectives.TOKENIZERS else size
    return objectives.make(args.objective, vit, vocab_size, args.cut, args.mask_ratio, target,
                           decoder_depth=args.decoder_depth, values=size, perceptual=perceptual)


@torch.no_grad()
def start_codebook(args, model, ds, device):
    """Hard codes start as K-means of the new encoder's z of the first batch (VQ-KD's code; 10 iterations)."""
    z = [model.encode_patches(normalize(images, ds.mean, ds.std)).flatten(0, 1)
         for images, _, _ in load_steps(ds, args, 0, 1, device)]
    metric = "cosine" if model.unit else "euclidean"
    kmeans = KMeans(args.vocab_size, metric, max_iter=10, seed=args.seed)
    model.codebook.copy_(kmeans.fit(torch.cat(z)).centroids)


# --- a run ------------------------------------------------------------------------------------------------

def training_view(ds, args):
    """What is trained on: center squares, or random crops, and color jitter."""
    transform = random_crop(args.image_size, args.crop) if args.crop else ds.transform
    if args.jitter:
        jitter = v2.ColorJitter(args.jitter, args.jitter, args.jitter)
        transform = v2.Compose([transform, jitter]) if transform else jitter
    return ds.view(transform, seed=args.seed)


def pretrain(args, model, ds, targets, device):
    """(step, steps) of the loop: images -> loss of `model`."""
    @functools.lru_cache(1)
    def draw_order(step):
        """z (batch, n) of the global batch, the same on every process."""
        generator = torch.Generator("cpu" if model.blockwise else device)    # a GPU is slow at blocks
        generator.manual_seed(derive_seed(args.seed, step))
        return model.draw_order(args.batch_size, generator, device)

    def compute_loss(net, images, labels, read, step, micro):
        with torch.autocast(device.type, enabled=False):
            given = targets(images, read)
        return net(normalize(images, ds.mean, ds.std), given, draw_order(step)[micro])

    checkpoint = f"{args.out}/last.pt"
    if args.objective in HARD_CODES and not os.path.exists(checkpoint):
        start_codebook(args, model, ds, device)
    return train(model, make_optimizer(model, args), ds, args, compute_loss, device, checkpoint,
                 f"{args.out}/metrics.jsonl", model.before_step)


def save_results(args, model, ds):
    """OUT/encoder.pt; of an objective that learns tokens, OUT/tokenizer.pt."""
    encoder = {key: value.cpu() for key, value in model.encoder.state_dict().items()}
    save(encoder, f"{args.out}/encoder.pt")
    if args.objective in objectives.TOKENIZERS:
        f, *codes = model.export()
        sizes = args.patch_size, args.image_size
        tokenizer = KMeansTokenizer(args.objective, *codes, *sizes, ds.mean, ds.std, f)
        tokenizer.save(f"{args.out}/tokenizer.pt")


def draw_results(args, model, ds, held_out, targets, size, device):
    """OUT/predictions.png: held-out (or training) images, what was hidden, what was predicted."""
    looks = None
    if model.needs == "tokens":                                # a code looks like the mean of its patches
        images, _, read = sample_images(ds, 256, device)
        looks = average_patches(images, targets(images, read), args.patch_size, size)
    images, _, _ = sample_images(held_out, 8, device)
    rows = objectives.picture_predictions(model, images / 255, ds.mean, ds.std, targets(images), looks)
    draw_rows(rows, f"{args.out}/predictions.png")


def print_table(args, vit, step, steps, ds, test, device, started):
    """k-NN and linear probe of the random and of the trained encoder; the summary line of metrics.jsonl."""
    from probe import evaluate
    if read_summary(args.out)[0]:
        return print0(f"this run was finished before: its accuracies are in {args.out}/metrics.jsonl")
    line = dict(summary=True, seconds=time.time() - started, objective=args.objective,
                seed=args.seed, data=args.data, step=step, steps=steps, settings=fixed_settings(args))
    print0(f"\n{'':<18}{'k-NN':>8}{'linear probe':>15}   top-1 on {test.name}, {len(test)} images")
    random = build(args, 2).encoder.to(device)
    for name, suffix, network in (("random encoder", "_random", random), ("trained encoder", "", vit)):
        found = evaluate(network, ds, test, device, args.workers, args.seed)
        line |= {key + suffix: value for key, value in found.items()}
        print0(f"{name:<18}{found['knn']:>8.1%}{found['linear']:>15.1%}")
    append_metrics(f"{args.out}/metrics.jsonl", **line)


def run(args):
    started, device = time.time(), setup(args.device)
    args.preset = args.preset or ("laptop" if args.data == "textures" else "paper")
    chosen = recipe(args.objective, args.preset, args.model)
    ds, test, why = open_splits(args.data, args.image_size or chosen["image_size"], args.classes)
    complete(args, chosen, ds, device)
    if test is None:
        print0(f"no k-NN and no linear probe at the end: {why}")
        args.probe = False
    if args.preset == "laptop" and not args.crop:
        ds, test = keep_squares(ds), test and keep_squares(test)
    if args.workers is None:
        args.workers = default_workers(ds)
    # No second run in this folder while the first lives; the loaders of one that was killed live on for 5 s.
    lock = FileLock(f"{args.out}/.run-at-work.lock", timeout=8)
    with lock if is_main_process() else contextlib.nullcontext():
        barrier()                                              # then the folder is ours
        source = open_source(args, ds)
        if args.fresh and is_main_process():
            start_over(args)
        barrier()
        check_settings(f"{args.out}/settings.json", {**fixed_settings(args), "images": len(ds)})
        targets, size, perceptual = make_targets(args, ds, source, device)
        del source                                             # it may have a network, K-means another one
        model = build(args, size, perceptual).to(device)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print0(f"{args.objective}: {args.model}, {millions:.2f}M parameters; cut {model.cut}: "
               f"{model.num_targets} of {model.encoder.n_patches} patches hidden; lr {args.lr:g}; {device}")
        step, steps = pretrain(args, model, training_view(ds, args), targets, device)
        if step not in (steps, args.steps):                    # by a signal
            return
        if is_main_process():
            save_results(args, model, ds)
            draw_results(args, model, ds, test or ds, targets, size, device)
        barrier()
        if args.probe:
            print_table(args, model.encoder, step, steps, ds, test, device, started)
        print0(f"\n{time.time() - started:.0f} s; next: python probe.py linear {args.out}, or finetune, show")


def start_over(args):
    """Remove what an earlier run left in --out, but no file that was given."""
    given = [Path(path).resolve() for path in (args.tokenizer, args.tokens) if path]
    for name in "settings.json last.pt encoder.pt metrics.jsonl probe.jsonl tokens.npy tokenizer.pt".split():
        path = Path(args.out, name)
        if path.resolve() not in given:
            path.unlink(missing_ok=True)


# --- command line -----------------------------------------------------------------------------------------

# The flags that are no part of a recipe: type -> flag -> help.
FLAGS = {
    str: {
        "data": f"textures (embedded), a folder (ImageNet's layout, or no labels), {', '.join(NAMED)}",
        "classes": "file with the class folders to keep, one a line (ImageNet-100)",
        "objective": "default: mapet",
        "preset": "laptop: vit_micro, 48 pixels, minutes on two cores, any data (default for textures), "
                  "paper: the recipe of the objective's paper (default for all else)",
        "tokenizer": "tokenizer.pt of kmeans.py fit (default: fitted first, kept in --out)",
        "tokens": "tokens.npy of kmeans.py tokenize, (images, patches), in the data set's order; comes "
                  "before --tokenizer",
        "out": "folder of the run (default: runs/OBJECTIVE-DATA)",
        "device": "cuda, cpu (default: cuda if there is one)"},
    int: {
        "cut": "cutting point, class token included (MaPeT 50, ViT-B 60 of 197); comes before --mask-ratio",
        "steps": "stop after this many optimizer steps of the schedule",
        "micro_batch": "images at once on one process; its share is accumulated (default: up to 256)",
        "seed": "of weights, order of images, augmentation, masks (default 0)",
        "workers": "loading processes of each process (default: its share of the cores; 0 for textures)",
        "log_every": "steps between lines of metrics.jsonl (default 50)",
        "save_every": "steps between checkpoints (default 500)"},
    float: {
        "mask_ratio": "the same as --cut, as a share of the patches that are hidden (MaPeT, MAE, ClusterMIM "
                      "0.75, MaPeT's ViT-B 0.7, CAE 0.5, BEiT 75 of 196)"}}
CHOICES = dict(objective=list(objectives.OBJECTIVES), preset=["laptop", "paper"], model=list(MODELS),
               pos=["learned", "sincos"], init=["timm", "mae"], cosine=["start", "warmup"])
SWITCHES = {"fresh": "start over: removes what an earlier run left in --out",
            "compile": "torch.compile (default: on CUDA, with --preset paper)",
            "probe": "k-NN and linear probe at the end (default)"}
MAY_BE_ZERO = set("""seed workers jitter crop cut mask_ratio drop_path layer_scale min_lr warmup_lr
                     warmup_epochs weight_decay beta2 clip_norm""".split())
AT_MOST = dict(crop=1, mask_ratio=1, drop_path=.99, beta2=.9999,
               vocab_size=1 << 16)                             # tokens are stored in 16 bits


def parse(argv):
    parser = argparse.ArgumentParser(description="Pre-train a ViT by any objective of the two papers. What "
                                                 "is not given comes from the preset.")

    def add(key, kind, text):
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, choices=CHOICES.get(key), help=text)

    for kind, flags in FLAGS.items():
        for key, text in flags.items():
            add(key, kind, text)
    for key, (mapet, clustermim, _, text) in SETTINGS.items():
        add(key, type(mapet), f"{text} (MaPeT {mapet}, ClusterMIM {clustermim})")
    for key, text in SWITCHES.items():
        parser.add_argument(f"--{key}", help=text, action=argparse.BooleanOptionalAction)
    parser.set_defaults(data="textures", objective="mapet", seed=0, log_every=50, save_every=500, fresh=False,
                        probe=True)
    args = parser.parse_args(argv)
    check_numbers(parser, args, MAY_BE_ZERO)
    if (args.tokens or args.tokenizer) and name_needs(args) != "tokens":
        parser.error(f"--tokens, --tokenizer: {args.objective} does not predict tokens")
    return args


def check_numbers(parser, args, may_be_zero):
    """argparse takes any number: refuse, naming the flag, those that mean nothing."""
    for key, value in vars(args).items():
        if type(value) not in (int, float) or value == 0 and key in may_be_zero:
            continue
        if not 0 < value <= AT_MOST.get(key, 1 << 62):
            parser.error(f"--{key.replace('_', '-')} {value} is out of range")


def fill_in(args, recipe):
    """The recipe's values where the command line has none; a shorter run keeps the share of the warm-up."""
    shorter = 1 if args.epochs is None else min(1, args.epochs / recipe["epochs"])
    recipe = dict(recipe, warmup_epochs=recipe["warmup_epochs"] * shorter)
    for key, value in recipe.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)


def complete(args, chosen, ds, device):
    """Fill in what the preset decides for the data; refuse what cannot be, before anything is written."""
    if args.tokenizer or args.tokens:                          # then the file says what the codebook is
        chosen["features"] = chosen["vocab_size"] = None
    if args.base_lr:
        chosen["lr"] = 0.
    if args.preset == "laptop":                                # the same work on any data set
        for key in ("epochs", "warmup_epochs"):
            chosen[key] *= TEXTURES["train"][1] / len(ds)
    chosen["out"] = f"runs/{args.objective}-{os.path.basename(os.path.normpath(args.data))}"
    chosen["compile"] = device.type == "cuda" and args.preset == "paper"     # a minute at first
    fill_in(args, chosen)
    args.lr = args.lr or args.base_lr * args.batch_size / 256
    if args.compile and not has_compiler():
        raise ValueError("--compile: torch.compile needs a C compiler (gcc, clang), else --no-compile")
    if args.tokens and args.crop:
        raise ValueError(f"--tokens {args.tokens}: a crop or a flip (--crop {args.crop:g}) moves patches "
                         "away from their stored tokens; --crop 0, or --tokenizer for tokens of each crop")
    divide_batch(args)
    if args.batch_size > len(ds):
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(ds)} images")
    with torch.device("meta"):                                 # sizes, --cut and --mask-ratio out of range
        build(args, args.vocab_size or 2)


def default_workers(ds):
    """Loading processes of each process: its share of the cores; none for what is in memory."""
    return max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if ds.transform else 0


def has_compiler():
    """torch.compile needs one for C."""
    return any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


def main(argv=None):
    args = parse(argv)
    with exit_on_error("train.py"):
        run(args)


if __name__ == "__main__":
    main()
