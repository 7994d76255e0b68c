"""K-means and its tokenizer: images -> patch features -> nearest centroid (ClusterMIM, arXiv:2407.09087).

    t(x) = argmin_k ||f(x) - c_k||^2          f: raw pixels, HOG, a frozen encoder (DINO, MAE, CLIP, ours)
         = argmax_k c_k . f(x) - ||c_k||^2/2  ||f(x)||^2 is the same for every k

So a tokenizer is a function f and a linear layer; learned ones differ in the bias and in f. `lloyd` is all of
K-means, on any device, in one process or many; memory beyond the data is O(block K + K d).

python kmeans.py fit                             embedded images, raw pixels, K = 64: seconds on two CPU cores
python kmeans.py tokenize --tokenizer runs/tokenizer/tokenizer.pt                     writes tokens.npy
python kmeans.py show --tokenizer runs/tokenizer/tokenizer.pt                         codebook.png, tokens.png
torchrun --nproc_per_node 8 kmeans.py fit --data IMAGENET --features clip --k 8192    k-CLIP (MaPeT Sec. 4.2)
python kmeans.py bench                           time of a Lloyd iteration over that of the product X C^T
"""
import argparse
import dataclasses
import math
import os
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch.utils.data import DataLoader
from tqdm import tqdm

from vit import (CLIP, IMAGENET, PATCH_FEATURES, PUBLIC, SYMMETRIC, download, draw_rows, exit_on_error,
                 from_weights, gather_patches, normalize, patchify, read_checkpoint, save, unpatchify,
                 write_atomically)

try:
    import triton
    import triton.language as tl
except ImportError:                         # no Triton for macOS and Windows: plain torch takes over
    triton = None


# --- processes --------------------------------------------------------------------------------------------

def rank_and_world():
    """(rank, world size) of the running process group; (0, 1) without one."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce(*tensors):
    """Sum each tensor over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def is_main_process():
    return rank_and_world()[0] == 0


def print0(*words):
    if is_main_process():
        print(*words, flush=True)


# --- K-means ----------------------------------------------------------------------------------------------

def linear_layer(centroids, origin=0.):
    """weight (k, d), bias (k,): argmax_k weight_k . x + bias_k is the nearest centroid of x.

    ||x - c||^2 = ||x - o||^2 - 2 ((c - o) . x - (c - o) . o - ||c - o||^2 / 2) for any origin o, so weight =
    c - o, and the rest is the bias. With the data's mean, float32 tells near centroids apart."""
    weight = centroids.double() - origin
    bias = -(weight * origin).sum(1) - weight.square().sum(1) / 2
    return weight.float(), bias.float()


def find_nearest(x, weight, bias):
    """argmax_k weight_k . x + bias_k -> (m,) int64, of a block x (m, d) of any dtype. On the CPU as a 1x1
    convolution, by oneDNN, which some of AMD's processors do faster than MKL's product."""
    if x.is_cuda:
        if triton and torch.cuda.get_device_capability() >= (8, 0):          # Ampere
            return find_nearest_triton(x, weight, bias)
        return F.linear(x.float(), weight, bias).argmax(1)
    image = x.float()[None, :, None].permute(0, 3, 1, 2)       # (1, d, m, 1): channels last, as the rows lie
    scores = F.conv2d(image, weight[:, :, None, None], bias)   # (1, k, m, 1)
    return scores.argmax(1).flatten()


def blocks(x, device, metric="euclidean"):
    """Rows x as blocks (m, d) on `device`; x: tensor, array, memory map, or a function that yields chunks."""
    size = 1 << 11 if device.type == "cpu" else 1 << 17        # scores fit a cache; on a GPU: fewer launches
    for chunk in filter(len, x() if callable(x) else [x]):               # all but empty ones
        for block in torch.as_tensor(chunk).split(size):
            block = block.to(device)
            yield F.normalize(block.float()) if metric == "cosine" else block


def compute_moments(x, device):
    """How many rows there are, how many of them on processes before this one; their mean (d,), and the sum of
    ||x - mean||^2, float64."""
    rank, world = rank_and_world()
    sizes = torch.zeros(world, dtype=torch.int64, device=device)
    sums = squares = 0.
    for block in blocks(x, device):
        block = block.double()
        sizes[rank] += len(block)
        sums += block.sum(0)
        squares += block.square().sum()
    all_reduce(sizes, sums, squares)
    n = sizes.sum()
    mean = sums / n
    scatter = squares - n * mean.square().sum()
    if not scatter.isfinite():
        raise ValueError("K-means got NaN or infinite values: clean the data first")
    return n, sizes[:rank].sum(), mean, scatter.clamp(min=0)


def add_up(x, centroids, origin=0.):
    """Sums (k, d) float64 and counts (k,) int64 of the rows nearest to each centroid, over all processes.
    `embedding_bag` sums order[starts_i] to order[starts_i+1 - 1], the rows of bag i, in this order: all runs
    give the same, as they do not where threads add to one place. A thread sums one column of a bag, so where
    clusters are large, on a GPU, each has several bags, of some 32 rows."""
    weight, bias = linear_layer(centroids, origin)
    k = len(weight)
    sums = counts = 0
    for block in blocks(x, weight.device):
        labels = find_nearest(block, weight, bias)
        bags = max(1, len(block) // (32 * k))                  # of a cluster
        bag = labels * bags + torch.arange(len(block), device=labels.device) % bags
        sizes = bag.bincount(minlength=k * bags)
        starts = sizes.cumsum(0) - sizes
        order = bag.argsort(stable=True)
        parts = F.embedding_bag(order, block.float(), starts, mode="sum")
        sums += parts.view(k, bags, -1).sum(1).double()
        counts += sizes.view(k, bags).sum(1)
    all_reduce(sums, counts)
    return sums, counts


def split_empty(centroids, counts, step):
    """An empty cluster moves to the centroid of one of the largest, and a `step` of alternating sign (faiss):
    the next assignment splits the largest between the two."""
    empty = counts == 0
    largest = counts.topk(empty.sum()).indices
    sign = torch.ones_like(centroids[0])
    sign[1::2] = -1
    centroids[empty] = centroids[largest] + step * sign
    return centroids


def lloyd(x, centroids, n_iter, tol=0., metric="euclidean"):
    """Lloyd's algorithm: from the first centroids (k, d), assign and update, at most n_iter times (Sec. 3.2).

        t(x) = argmin_k ||x - c_k||^2             assign
        c_k  = mean of the rows with t(x) = k     update; cosine: of unit length, as the rows must be

    -> centroids (k, d) float32, their counts (k,) int64, history: the inertia sum_x ||x - c_t(x)||^2 of each
    pass. Ends when it does not fall, or when sum_k ||new c_k - c_k||^2 <= tol * the mean variance of a column
    (scikit-learn). x as in `blocks`, worked on where the first centroids are; in a process group every
    process passes rows of its own, and all end with the same centroids."""
    rows, _, mean, scatter = compute_moments(x, centroids.device)
    variance = scatter / (rows * len(mean))
    history = []
    new = centroids.double()                                   # c: of this pass, new: of the next one
    for _ in range(n_iter + 1):                                # the last pass only assigns
        if metric == "cosine":
            new = F.normalize(new)
        if history and (new - c).square().sum() <= tol * variance:
            break
        c = new
        sums, counts = add_up(x, c, mean)                      # assign
        n = counts[:, None]
        means = torch.where(n > 0, sums / n, c)                # update
        # With the clusters' means m_k and counts n_k (Huygens):
        # sum ||x - c||^2 = sum ||x - mean||^2 - sum_k n_k (||m_k - mean||^2 - ||m_k - c_k||^2)
        fall = n * ((means - mean).square() - (means - c).square())
        inertia = (scatter - fall.sum()).clamp(min=0).item()
        if history and inertia >= history[-1]:
            break
        history.append(inertia)
        found = c.float(), counts
        new = split_empty(means, counts, variance.sqrt() / 100)
    return *found, history


def sample_rows(x, size, generator, device):
    """`size` random rows, all if there are fewer, of all processes: float32, the same on each of them."""
    n, start, mean, _ = compute_moments(x, device)
    index = torch.randperm(n, generator=generator)[:size].to(device)
    rows = torch.zeros(len(index), len(mean), device=device)
    for block in blocks(x, device):
        inside = (start <= index) & (index < start + len(block))
        rows[inside] = block[index[inside] - start].float()
        start += len(block)
    all_reduce(rows)
    return rows


def kmeans_plusplus(x, k, generator=None):
    """Greedy k-means++ (Arthur & Vassilvitskii 2007; trials as scikit-learn's): x (m, d) -> row numbers (k,).

    The first seed is any row. Then 2 + ln k rows are drawn with a probability proportional to their squared
    distance to the nearest seed so far; the one that leaves the least sum of distances is the next seed. A
    seed is drawn again only where all rows are seeds, or lie on one."""
    x = x - x.mean(0)                                          # small numbers round less
    norm = x.square().sum(1)
    draws = torch.rand(k, 2 + int(math.log(k)), generator=generator, dtype=torch.float64).to(x.device)
    trials = (draws[:1, 0] * len(x)).long()
    closest = torch.full_like(norm, math.inf)
    seeds = []
    for u in draws.roll(-1, 0):                                # draws of the next seed; of the last one: idle
        distances = norm + norm[trials, None] - 2 * x[trials] @ x.T
        distances = torch.minimum(closest, distances.clamp(min=0))           # squared: (trials, m)
        best = distances.sum(1).argmin()
        seeds.append(trials[best])
        closest = distances[best]
        closest[seeds[-1]] = 0                                 # exactly, whatever was rounded
        mass = closest.double().cumsum(0)
        trials = torch.searchsorted(mass, u * mass[-1], right=True).clamp(max=len(x) - 1)
    return torch.stack(seeds)


@dataclasses.dataclass
class KMeans:
    """Lloyd's algorithm with its seeding.

    k, metric   number of clusters; "euclidean", or "cosine": rows have unit length, and so have the centroids
    init        "k-means++" on a seeded sample of max(16384, 4 k) rows, "random": k of it, or a tensor (k, d)
    tol         see `lloyd`; restarts: seedings, the one with the least inertia is kept
    device      where arrays and streams are worked on (the CPU); tensors where they are
    Afterwards: centroids (k, d) float32, counts (k,) int64, inertia, n_iter, history; see `lloyd`."""
    k: int
    metric: str = "euclidean"
    init: object = "k-means++"
    max_iter: int = 100
    tol: float = 1e-4
    seed: int = 0
    restarts: int = 1
    device: object = None

    def fit(self, x):
        if self.metric not in ("euclidean", "cosine"):
            raise ValueError(f"metric must be euclidean or cosine, not {self.metric!r}")
        device = torch.device(self.device or getattr(x, "device", "cpu"))
        x = partial(blocks, x, device, self.metric)            # a stream; cosine: of unit length
        generator = torch.Generator().manual_seed(self.seed)
        self.inertia = math.inf
        for _ in range(self.restarts):
            first = self.init
            if not torch.is_tensor(first):                     # the same rows on all processes
                rows = sample_rows(x, max(16384, 4 * self.k), generator, device)
                if self.metric == "cosine":                    # a row of zeros has no direction
                    rows = rows[rows.any(1)]
                if len(rows) < self.k:
                    raise ValueError(f"{self.k} clusters of {len(rows)} rows: as many rows are wanted")
                first = rows[:self.k]
                if self.init != "random":
                    first = rows[kmeans_plusplus(rows, self.k, generator)]
            found = lloyd(x, first.to(device), self.max_iter, self.tol, self.metric)
            if found[2][-1] < self.inertia:
                self.centroids, self.counts, self.history = found
                self.inertia = self.history[-1]
        self.n_iter = len(self.history) - 1
        return self

    def predict(self, x):
        return assign(x, self.centroids, self.metric)[0]


def assign(x, centroids, metric="euclidean"):
    """Nearest centroids (k, d) of rows x, see `blocks`: labels (n,) int64, squared distances (n,) float32."""
    weight, bias = linear_layer(centroids, centroids.double().mean(0))
    labels = []
    distances = []
    for block in blocks(x, centroids.device, metric):
        labels.append(find_nearest(block, weight, bias))
        distances.append((block.float() - centroids[labels[-1]]).square().sum(1))
    return torch.cat(labels), torch.cat(distances)


# --- the same on CUDA: no score reaches memory ------------------------------------------------------------

if triton:
    @triton.jit
    def nearest_kernel(x, weight, bias, labels, m, k, d,
                       TILE: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr):
        """One program: TILE rows against all codes, CODES at a time; scores stay in registers, in float32.
        Beyond the last row and the last code these come again, which changes nothing."""
        row = tl.minimum(tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE), m - 1)
        best = tl.full([TILE], float("-inf"), tl.float32)
        label = tl.zeros([TILE], tl.int32)
        for first in range(0, k, CODES):
            code = tl.minimum(first + tl.arange(0, CODES), k - 1)
            score = tl.zeros([TILE, CODES], tl.float32)
            for at in range(0, d, WIDTH):
                column = at + tl.arange(0, WIDTH)
                x_part = tl.load(x + row[:, None] * d + column, column < d, 0)
                w_part = tl.load(weight + code[:, None] * d + column, column < d, 0)
                score = tl.dot(x_part.to(tl.float32), w_part.T, score, input_precision="tf32x3")
            score += tl.load(bias + code)
            top, arg = tl.max(score, 1, return_indices=True)   # the first of equals
            label = tl.where(top > best, first + arg, label)
            best = tl.maximum(top, best)
        tl.store(labels + row, tl.minimum(label, k - 1))


def find_nearest_triton(x, weight, bias):
    """`find_nearest` by the kernel above."""
    m = len(x)
    k, d = weight.shape
    labels = x.new_empty(m, dtype=torch.int64)
    nearest_kernel[triton.cdiv(m, 128),](x.contiguous(), weight, bias, labels, m, k, d,
                                         TILE=128, CODES=64, WIDTH=32, num_warps=4, num_stages=3)
    return labels


# --- the tokenizer: f, which is never trained here, and a linear layer -------------------------------------

CLIP_SHA256 = "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"
CLIP_URL = f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/RN50x64.pt"
ENCODERS = {"dino": "dino_vits16", "deit": "deit_small", "mae": "mae_vitb16"}


def open_clip(pixels):
    """CLIP's RN50x64 without its pooling: (b, 3, any, any), enlarged to S = pixels -> (b, (S/32)^2, 4096).
    OpenAI's file is a TorchScript archive, network and float16 weights: its parts are run here, in float32.
    NOT tried with that file, which could not be fetched here: the test traces a small one with its names."""
    path = download(CLIP_URL, sha256=CLIP_SHA256)
    net = torch.jit.load(path, map_location="cpu").visual.float()
    trunk = nn.Sequential(
        nn.Upsample(pixels, mode="bicubic"),
        net.conv1, net.bn1, nn.ReLU(),
        net.conv2, net.bn2, nn.ReLU(),
        net.conv3, net.bn3, nn.ReLU(), nn.AvgPool2d(2),
        net.layer1, net.layer2, net.layer3, net.layer4,
        Rearrange("b d y x -> b (y x) d"))
    trunk.patch_size = 16                                      # pixels of an image of half the size
    return trunk.to(memory_format=torch.channels_last)


class KMeansTokenizer(nn.Module):
    """images (b, 3, S, S) -> tokens (b, n) int64: t(x) = argmax_k weight_k . f(x) + bias_k.

    uint8 images are normalized here, float images already are. S is image_size; for clip better twice that,
    `input_size`: nothing is enlarged. Not for inside a model: MAE's initialization would wipe it.

    features        f: pixel, pixel-norm (standardized patches), hog, clip, dino, deit, mae, or what
                    from_weights takes; of a learned tokenizer (dvae, vq, peco, vqkd) only a name
    encoder         weights of a learned tokenizer's f: {encoder.KEY of a ViT, project.KEY}
    weight, bias    (K, d), (K,). K-means: centroids, -||c||^2 / 2; dvae: its own classifier's"""

    def __init__(self, features, weight, bias, patch_size, image_size, mean, std, encoder=None):
        super().__init__()
        self.features = features
        self.patch_size = patch_size
        self.image_size = self.input_size = image_size
        self.mean = mean
        self.std = std
        self.n_patches = (image_size // patch_size) ** 2
        self.encoder = None
        self.project = nn.Sequential()
        if features == "clip":                                 # k-CLIP (MaPeT Sec. 4.2)
            self.input_size *= 2
            self.encoder = open_clip(self.input_size)
        elif features not in PATCH_FEATURES:
            self.encoder = from_weights(encoder or ENCODERS.get(features, features), image_size)
        if encoder:
            size, width = encoder["project.2.weight"].shape
            self.project = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, size))
            self.load_state_dict(encoder, strict=False)        # official VQ-KD has more
        if image_size % patch_size or self.encoder and self.encoder.patch_size != patch_size:
            raise ValueError(f"patch size {patch_size} does not fit image size {image_size}, or {features}")
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.eval().requires_grad_(False)

    @property
    def vocab_size(self):
        return len(self.weight)

    def compute_features(self, images):
        """f(x): (b, n, d) float32, a row a patch."""
        if images.dtype == torch.uint8:
            images = normalize(images, self.mean, self.std)
        if self.encoder is None:
            return PATCH_FEATURES[self.features](images, self.patch_size)
        with torch.autocast("cuda", torch.float16, enabled=images.is_cuda):
            x = self.encoder(images)[:, -self.n_patches:]      # without the class token
        return self.project(x.float())

    def forward(self, images):
        x = self.compute_features(images)
        tokens = [find_nearest(block, self.weight, self.bias) for block in blocks(x.flatten(0, 1), x.device)]
        return torch.cat(tokens).view(x.shape[:2])

    def save(self, path):
        arguments = "features", "weight", "bias", "patch_size", "image_size", "mean", "std"
        state = {name: getattr(self, name) for name in arguments}
        if self.project:                                       # learned here: no other file has it
            state["encoder"] = self.state_dict()
        save(state, path)


def load_tokenizer(path):
    """What `save` wrote, or BEiT v2's VQ-KD (its file, or "vqkd": fetched): a ViT-B/16, codes of unit length.
    ValueError, one line, for anything else."""
    if path == "vqkd":
        path = download(**PUBLIC[path])
    state = read_checkpoint(path)
    try:
        if "quantize.embedding.weight" not in state.get("model", ()):
            return KMeansTokenizer(**state)
        state = {key.replace("encode_task_layer.", "project."): x for key, x in state["model"].items()}
        codes = F.normalize(state["quantize.embedding.weight"].float())
        return KMeansTokenizer("vqkd", codes, torch.zeros(len(codes)), 16, 224, *SYMMETRIC, state)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: not a tokenizer of kmeans.py fit ({str(error).splitlines()[0]})") from None


# --- from a data set to tokenizer.pt and tokens.npy -------------------------------------------------------

def load_batches(ds, indices, batch_size, workers=0, device="cpu", desc=None):
    """(images uint8 (b, 3, S, S) on device, labels (b,), index really read (b,)), in the order of `indices`.
    A neighbor may stand in for a damaged picture. desc: the name of this pass, for a bar."""
    loader = DataLoader(ds, batch_size, sampler=list(map(int, indices)), num_workers=workers)
    if desc and is_main_process():
        loader = tqdm(loader, desc, leave=False, disable=None)               # None: not into a file
    for images, labels, wanted, read in loader:
        ds.note_damaged(wanted, read)
        yield images.to(device), labels, read


@torch.no_grad()
def run_network(network, ds, device, workers):
    """network(images) of all images (n, ...), of every process a part, on every process."""
    rank, world = rank_and_world()
    mine = torch.arange(rank, len(ds), world)
    batches = load_batches(ds, mine, 64, workers, device, "images")
    found = None
    for rows, (images, _, _) in zip(mine.split(64), batches):
        x = network(images)
        if found is None:
            found = x.new_zeros(len(ds), *x.shape[1:])
        found[rows] = x
    all_reduce(found)
    return found


def sample_images(ds, n, device="cpu"):
    """n images, evenly spaced, as `load_batches` gives them: for pictures."""
    spaced = torch.linspace(0, len(ds) - 1, n).long()
    return next(load_batches(ds, spaced, n, device=device))


def blank_tokenizer(ds, features, patch_size, image_size=None):
    """A tokenizer before its fit: it knows the features of the images of `ds`, but no codes."""
    mean, std = ds.mean, ds.std
    if features in ENCODERS:
        mean, std = IMAGENET
    if features == "clip":
        mean, std = CLIP
    none = torch.zeros(0)
    return KMeansTokenizer(features, none, none, patch_size, image_size or ds.image_size, mean, std)


def fit_tokenizer(ds, features, k, patch_size, image_size=None, seed=0, workers=0, device="cpu",
                  max_iter=None):
    """K-means on the patches of `ds`: a KMeansTokenizer, equal on every process.

    On all patches of 20,000 seeded random images, or of as many as give 512 rows a code; for textures, and
    for clip, on 5 % of each image's (MaPeT Sec. 4.2; its code: 1.7 %). Seeds are random beyond 1000 codes. Up
    to 100 iterations; for clip the best of 5 times 20 is kept: k-CLIP (its code)."""
    tokenizer = blank_tokenizer(ds, features, patch_size, image_size).to(device)
    n = keep = tokenizer.n_patches
    if features == "clip" or ds.name.startswith("textures/"):
        keep = max(1, round(.05 * n))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ds), generator=generator)[:max(20000, 512 * k // keep)]
    places = torch.rand(len(order), n, generator=generator).topk(keep).indices   # of each image
    rank, world = rank_and_world()
    places = places.tensor_split(world)[rank].split(64)
    batches = load_batches(ds, order.tensor_split(world)[rank], 64, workers, device, "patches")
    rows = []
    for (pixels, _, _), kept in zip(batches, places):
        x = gather_patches(tokenizer.compute_features(pixels), kept.to(device)).flatten(0, 1)
        rows.append(x.half() if tokenizer.encoder else x)      # of a network: in float16
    kmeans = KMeans(k, seed=seed)
    if k > 1000:
        print0("K-means starts from random patches: k-means++ takes long for so many codes")
        kmeans.init = "random"
    if features == "clip":
        kmeans.max_iter, kmeans.restarts = 20, 5
    if max_iter:
        kmeans.max_iter = max_iter
    rows = torch.cat(rows)                                     # in place of the list: room for one
    kmeans.fit(rows)
    print0(f"{kmeans.counts.sum()} patches, {kmeans.n_iter} iterations, sum of squared distances "
           f"{kmeans.history[0]:.4g} -> {kmeans.inertia:.4g}; {(kmeans.counts > 0).sum()} of {k} codes used")
    tokenizer.weight, tokenizer.bias = linear_layer(kmeans.centroids)
    return tokenizer


def write_npy(path, shape, arrays):
    """Arrays that follow each other as one .npy file, atomically. np.save does not notice a full disk."""
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        for array in arrays:
            if file.tell() == 0:
                np.lib.format.write_array_header_1_0(
                    file, dict(shape=shape, fortran_order=False, descr=array.dtype.str))
            file.write(array.tobytes())


def load_tokens(path, images=None, n=None):
    """tokens.npy as a read-only memory map (images, n) uint16; ValueError, one line, for any other file."""
    try:
        tokens = np.lib.format.open_memmap(path, "r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a token file ({error})") from None
    if tokens.dtype != np.uint16 or tokens.ndim != 2:
        raise ValueError(f"{path}: {tokens.dtype} {tokens.shape}, but tokens are uint16 (images, n)")
    if images and tokens.shape != (images, n):
        raise ValueError(f"{path}: {tokens.shape} of other data, wanted are {images, n} tokens: remove it?")
    return tokens


def tokenize(tokenizer, ds, path, workers=0, device="cpu"):
    """Tokens of all images in the data set's own order: writes `path`, a memory map (images, n) uint16.
    If the file is there already, it is read."""
    shape = len(ds), tokenizer.n_patches
    if not os.path.exists(path):
        tokens = run_network(tokenizer, ds, device, workers)
        if is_main_process():                                  # by now all have looked for the file
            write_npy(path, shape, [tokens.numpy(force=True).astype("uint16")])
        barrier()
    return load_tokens(path, *shape)


# --- pictures ---------------------------------------------------------------------------------------------

def average_patches(images, tokens, p, k):
    """What each of k tokens looks like: the mean (k, 3 p^2) in 0..1 of its patches, p pixels a side; or 0.
    images uint8 (b, 3, S, S), their tokens (b, n) int64."""
    patches = patchify(images, p).flatten(0, 1) / 255
    tokens = tokens.flatten()
    sums = patches.new_zeros(k, 3 * p * p).index_add_(0, tokens, patches)
    return sums / tokens.bincount(minlength=k)[:, None].clamp(min=1)


def draw(tokenizer, ds, out):
    """OUT/tokens.png: images, their tokens in a color each, rebuilt of mean patches; OUT/codebook.png: a row
    for each of the 16 codes most used in 200 images, its mean patch and 12 of its patches."""
    images, _, _ = sample_images(ds, 200)
    tokens = tokenizer(images)
    side = images.shape[-1] // math.isqrt(tokenizer.n_patches)               # of a patch, in pixels of `ds`
    looks = average_patches(images, tokens, side, tokenizer.vocab_size)
    torch.manual_seed(0)
    colors = torch.rand(tokenizer.vocab_size, 3).repeat(1, side ** 2)
    rows = {"image": images[:6] / 255,
            "tokens": unpatchify(colors[tokens[:6]], side),
            "rebuilt": unpatchify(looks[tokens[:6]], side)}
    draw_rows(rows, f"{out}/tokens.png")
    patches = patchify(images, side) / 255
    rows = {}
    for code in tokens.flatten().bincount().argsort(descending=True)[:16]:
        row = torch.cat([looks[code, None], patches[tokens == code][:12]])
        rows[f"code {code}"] = unpatchify(row[:, None], side)
    draw_rows(rows, f"{out}/codebook.png")


# --- commands ---------------------------------------------------------------------------------------------

def bench(device):
    """Prints the time of a Lloyd iteration beside that of the bare product X C^T, the mean of 8."""
    from torch.utils.benchmark import Timer                    # only here: it warns where there is no CUDA
    cases = [(100_000, 768, k, torch.float32) for k in (50, 100, 1000)]
    if device.type == "cuda":
        cases = [(24_800_000, 768, 100, torch.uint8), (4_200_000, 1024, 8192, torch.bfloat16)]
    for n, d, k, kind in cases:
        x = torch.randint(256, (n, d), dtype=kind, device=device)
        how = dict(globals=dict(x=x, c=x[:k].float(), add_up=add_up), num_threads=torch.get_num_threads())
        product = Timer("for part in x.split(1 << 17): part.float() @ c.T", **how).timeit(8).mean
        iteration = Timer("add_up(x, c)", **how).timeit(8).mean
        print(f"n = {n}, d = {d}, K = {k}, {kind}: product {product:.4f} s, iteration {iteration:.4f} s, "
              f"ratio {iteration / product:.2f}")


def parse(argv):
    from train import check_numbers
    parser = argparse.ArgumentParser(description="K-means and its tokenizer; see the top of kmeans.py")
    add = parser.add_argument
    add("command", choices=["fit", "tokenize", "show", "bench"])
    add("--data", default="textures", help="textures, a torchvision name or a folder")
    add("--classes", help="file of class folders to keep, e.g. ImageNet-100's")
    add("--tokenizer", default="runs/tokenizer/tokenizer.pt", help="of kmeans.py fit, train.py (%(default)s)")
    add("--features", default="pixel", help="pixel, pixel-norm, hog, dino, deit, mae, clip, a ViT's file")
    add("--image-size", type=int, help="pixels a side (textures 48, otherwise 224)")
    add("--patch-size", type=int, help="pixels a side (textures 8, otherwise 16)")
    add("--k", type=int, default=64, help="codebook size (%(default)s)")
    add("--max-iter", type=int, help="passes over the patches (100; clip 20)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--out", help="folder for what is written (that of --tokenizer)")
    args = parser.parse_args(argv)
    check_numbers(parser, args, ())
    args.out = args.out or os.path.dirname(args.tokenizer) or "."
    return args


def main(argv=None):
    from train import default_workers, open_dataset, setup
    args = parse(argv)
    with exit_on_error("kmeans.py"):
        device = setup(args.device)
        if args.command == "bench":
            return bench(device)
        if args.command == "fit":
            textures = args.data == "textures"
            size = args.image_size or (48 if textures else 224)
            p = args.patch_size or (8 if textures else 16)
            pixels = 2 * size if args.features == "clip" else size           # CLIP sees twice the pixels
        else:
            tokenizer = load_tokenizer(args.tokenizer)
            pixels = tokenizer.input_size
        path = f"{args.out}/tokens.npy"
        if args.command != "show" and os.path.exists(path):    # of which tokenizer?
            raise ValueError(f"{path} is there already: remove it, or choose another --out")
        ds = open_dataset(args.data, "train", pixels, args.classes)
        workers = default_workers(ds)
        os.makedirs(args.out, exist_ok=True)
        if args.command == "fit":
            tokenizer = fit_tokenizer(ds, args.features, args.k, p, size, 0, workers, device, args.max_iter)
            if is_main_process():
                tokenizer.save(f"{args.out}/tokenizer.pt")
            print0(f"wrote {args.out}/tokenizer.pt")
        elif args.command == "show":
            draw(tokenizer, ds, args.out)
        else:
            tokens = tokenize(tokenizer.to(device), ds, path, workers, device)
            print0(f"{path}: tokens {tokens.shape} (images, patches) of {tokenizer.vocab_size}")


if __name__ == "__main__":
    main()
