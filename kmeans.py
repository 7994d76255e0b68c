"""K-means and its tokenizer: images -> patch features -> nearest centroid (ClusterMIM, arXiv:2407.09087).

    t(x) = argmin_k ||f(x) - c_k||^2          f: raw pixels, HOG, a frozen encoder (DINO, MAE, CLIP, ours)
         = argmax_k c_k . f(x) - ||c_k||^2/2  ||f(x)||^2 is the same for every k

So a tokenizer is a function f and a linear layer; cosine and learned ones differ in the bias and in f.
`lloyd` is all of K-means: for any number of rows, on any device, in one process or many. Rows are read block
by block and a block's scores are gone after its argmax: memory beyond the data is O(block K + K d).

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
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.data import DataLoader
from torchvision.models import resnet
from tqdm import tqdm

from vit import (CLIP, IMAGENET, PATCH_FEATURES, PUBLIC, SYMMETRIC, download, draw_rows, exit_on_error,
                 from_weights, gather_patches, normalize, patchify, read_checkpoint, read_vit, save,
                 unpatchify, write_atomically)

try:
    import triton
    import triton.language as tl
except ImportError:                         # no Triton for macOS and Windows: plain torch takes over
    triton = None


# --- processes --------------------------------------------------------------------------------------------

def rank_and_world():
    """(rank, world size) of the running process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce(*tensors):
    """Sum each tensor over all processes, in place."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def barrier():
    if rank_and_world()[1] > 1:
        dist.barrier()


def print0(*words):
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


# --- K-means ----------------------------------------------------------------------------------------------

def linear_layer(centroids, origin=0.):
    """weight (k, d), bias (k,): argmax_k weight_k . x + bias_k is the nearest centroid of x.

    ||x - c||^2 = ||x - o||^2 - 2 ((c - o) . x - (c - o) . o - ||c - o||^2 / 2) for any origin o: with the
    data's mean, float32 tells near centroids apart.
    """
    weight = centroids.double() - origin
    bias = -(weight * origin).sum(1) - weight.square().sum(1) / 2
    return weight.float(), bias.float()


def find_nearest(x, weight, bias):
    """argmax_k weight_k . x + bias_k -> (m,) int64, of a block x (m, d) of any dtype; ties: the smallest k.

    On the CPU as a 1x1 convolution, by oneDNN: on AMD's processors that is twice as fast as MKL's product.
    """
    if use_triton(x.device):
        return find_nearest_triton(x, weight, bias)
    x = x.float()
    if x.is_cuda:
        return F.linear(x, weight, bias).argmax(1)
    image = x[None, :, None].permute(0, 3, 1, 2)               # (1, d, m, 1): channels last, as the rows lie
    kernel = weight[:, :, None, None]
    scores = F.conv2d(image, kernel, bias)                     # (1, k, m, 1)
    return scores[0, :, :, 0].argmax(0)


def blocks(x, device, metric="euclidean"):
    """Rows x as blocks (m, d) on `device`; x: a tensor, array, memory map, or a function that yields chunks.

    A block's scores stay in a processor's cache; on a GPU large blocks hide the launches.
    """
    size = 1 << 11 if device.type == "cpu" else 1 << 16
    for chunk in x() if callable(x) else [x]:
        for start in range(0, len(chunk), size):
            block = chunk[start:start + size]
            if not torch.is_tensor(block):
                block = torch.from_numpy(np.array(block))      # a copy: memory maps are read-only
            block = block.to(device)
            yield F.normalize(block.float(), dim=1) if metric == "cosine" else block


def compute_moments(x, device, metric="euclidean"):
    """How many rows each process has (list), the mean (d,) of all, the sum of ||x - mean||^2; float64."""
    rank, world = rank_and_world()
    sizes = torch.zeros(world, dtype=torch.float64, device=device)
    sums = squares = 0.
    for block in blocks(x, device, metric):
        block = block.double()
        sizes[rank] += len(block)
        sums = sums + block.sum(0)
        squares = squares + block.square().sum()
    all_reduce(sizes, sums, squares)
    n = sizes.sum()
    mean = sums / n
    scatter = squares - n * mean.square().sum()
    if not scatter.isfinite():
        raise ValueError("K-means got NaN or infinite values: clean the data first")
    return sizes.long().tolist(), mean, scatter.clamp(min=0)


def add_up(x, centroids, origin=0., metric="euclidean"):
    """Sums (k, d) float64 and counts (k,) int64 of the rows nearest to each centroid, over all processes.

    Sorted by cluster, the rows of one are neighbors and are summed without atomics: all runs give the same.
    """
    weight, bias = linear_layer(centroids, origin)
    sums = torch.zeros_like(weight, dtype=torch.float64)
    counts = torch.zeros_like(bias, dtype=torch.int64)
    for block in blocks(x, weight.device, metric):
        labels = find_nearest(block, weight, bias)
        sizes = labels.bincount(minlength=len(weight))
        starts = sizes.cumsum(0) - sizes
        order = labels.argsort(stable=True)
        sums += F.embedding_bag(order, block.float(), starts, mode="sum")
        counts += sizes
    all_reduce(sums, counts)
    return sums, counts


def split_empty(centroids, counts, step):
    """Each empty cluster takes half of one of the largest (faiss), from a `step` beside its centroid on."""
    empty = (counts == 0).nonzero()[:, 0]
    empty = empty[:len(counts) - len(empty)]                   # no more than there are others
    largest = counts.topk(len(empty)).indices
    column = torch.arange(centroids.shape[1], device=centroids.device)
    centroids[empty] = centroids[largest] + step * (-1) ** column
    return centroids


def lloyd(x, centroids, n_iter, tol=0., metric="euclidean"):
    """Lloyd's algorithm: from the first centroids (k, d), assign and update, at most n_iter times (Sec. 3.2).

        t(x) = argmin_k ||x - c_k||^2             assign
        c_k  = mean of the rows with t(x) = k     update; cosine: of unit length

    -> centroids (k, d) float32, their counts (k,) int64, history: the inertia sum_x ||x - c_t(x)||^2 of each
    assignment. Ends when it does not fall, or when the centroids move (squares, summed) no more than tol
    times a column's variance. x as in `blocks`, worked on where the first centroids are; in a process group
    every process passes its own rows, and all end with the same centroids.
    """
    c, history = centroids.double(), []
    c = F.normalize(c, dim=1) if metric == "cosine" else c
    sizes, mean, scatter = compute_moments(x, c.device, metric)
    variance = scatter / (sum(sizes) * len(mean))
    for _ in range(n_iter + 1):
        sums, counts = add_up(x, c, mean, metric)
        # With the clusters' means m_k and counts n_k (Huygens):
        # sum ||x - c||^2 = sum ||x - mean||^2 - sum_k n_k ||m_k - mean||^2 + sum_k n_k ||m_k - c_k||^2
        means = sums / counts[:, None].clamp(min=1)
        between = (counts[:, None] * (means - mean).square()).sum()
        off = (counts[:, None] * (means - c).square()).sum()
        inertia = (scatter - between + off).clamp(min=0).item()
        if history and inertia >= history[-1]:
            break
        history.append(inertia)
        found = c.float(), counts
        new = torch.where(counts[:, None] > 0, means, c)
        new = split_empty(new, counts, variance.sqrt() / 100)
        new = F.normalize(new, dim=1) if metric == "cosine" else new
        if (new - c).square().sum() <= tol * variance:
            break
        c = new
    return *found, history


def sample_rows(x, size, generator, device, metric="euclidean"):
    """`size` random rows, all if there are fewer, of all processes: float32, the same on each of them."""
    sizes, mean, _ = compute_moments(x, device, metric)
    index = torch.randperm(sum(sizes), generator=generator)[:size]
    index = index.to(device)
    rows = torch.zeros(len(index), len(mean), device=device)
    start = sum(sizes[:rank_and_world()[0]])                   # rank 0's rows come first
    for block in blocks(x, device, metric):
        inside = (start <= index) & (index < start + len(block))
        rows[inside] = block[index[inside] - start].float()
        start += len(block)
    all_reduce(rows)
    return rows


def kmeans_plusplus(x, k, generator=None):
    """Greedy k-means++ (Arthur & Vassilvitskii 2007; trials as scikit-learn's): x (m, d) -> row numbers (k,).

    The first seed is any row. Then 2 + ln k rows are drawn with a probability proportional to their squared
    distance to the nearest seed so far; the one that leaves the least sum of distances is the next seed. A
    seed is drawn again only where all rows are seeds, or lie on one.
    """
    x = x - x.mean(0)                                          # small numbers round less
    norm = x.square().sum(1)

    def distances_to(t):                                       # squared, of rows t to all: (t, m)
        squared = norm + norm[t, None] - 2 * x[t] @ x.T
        return squared.clamp(min=0)

    draws = torch.rand(k, 2 + int(math.log(k)), generator=generator, dtype=torch.float64)
    draws = draws.to(x.device)
    seeds = (draws[:1, 0] * len(x)).long()
    closest = distances_to(seeds)[0]
    for u in tqdm(draws[1:], "k-means++", leave=False, disable=None, delay=2):
        closest[seeds[-1]] = 0                                 # exactly, whatever was rounded
        mass = closest.double().cumsum(0)
        trials = torch.searchsorted(mass, u * mass[-1], right=True)
        trials = trials.clamp(max=len(x) - 1)
        distances = torch.minimum(closest, distances_to(trials))
        best = distances.sum(1).argmin()
        closest = distances[best]
        seeds = torch.cat([seeds, trials[best, None]])
    return seeds


@dataclasses.dataclass(eq=False)
class KMeans:
    """Lloyd's algorithm with its seeding.

    k, metric   number of clusters; "euclidean", or "cosine": rows have unit length, and so have the centroids
    init        "k-means++" on a seeded sample of max(16384, 4 k) rows, "random" rows, or a tensor (k, d)
    tol         see `lloyd`; restarts: seedings, the one with the least inertia is kept
    device      where arrays and streams are worked on (the CPU); tensors where they are

    Afterwards: centroids (k, d) float32, counts (k,) int64 (0: a dead code), inertia (sum of squared
    distances), n_iter, history (the inertia of each pass).
    """

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
        device = torch.device(self.device or (x.device if torch.is_tensor(x) else "cpu"))
        generator = torch.Generator().manual_seed(self.seed)
        self.inertia = math.inf
        for _ in range(self.restarts):
            first = self.choose_seeds(x, generator, device)
            found = lloyd(x, first, self.max_iter, self.tol, self.metric)
            inertia = found[2][-1]
            if inertia < self.inertia:
                self.inertia = inertia
                self.centroids, self.counts, self.history = found
        self.n_iter = len(self.history) - 1
        return self

    def choose_seeds(self, x, generator, device):
        """The first centroids (k, d): all processes make the same choices among the rows of all."""
        if torch.is_tensor(self.init):
            return self.init.to(device)
        size = self.k if self.init == "random" else max(16384, 4 * self.k)
        rows = sample_rows(x, size, generator, device, self.metric)
        if len(rows) < self.k:
            raise ValueError(f"{self.k} clusters of {len(rows)} rows: at least as many rows are wanted")
        return rows if self.init == "random" else rows[kmeans_plusplus(rows, self.k, generator)]

    def predict(self, x):
        return assign(x, self.centroids, self.metric)[0]


def assign(x, centroids, metric="euclidean"):
    """Nearest centroids (k, d) of rows x, see `blocks`: labels (n,) int64, squared distances (n,) float32."""
    weight, bias = linear_layer(centroids, centroids.double().mean(0))
    labels, distances = [], []
    for block in blocks(x, centroids.device, metric):
        nearest = find_nearest(block, weight, bias)
        labels.append(nearest)
        off = block.float() - centroids[nearest]
        distances.append(off.square().sum(1))
    return torch.cat(labels), torch.cat(distances)


# --- the same on CUDA: no score reaches memory ------------------------------------------------------------

def use_triton(device):
    """On GPUs from Ampere on, and in Triton's interpreter."""
    if triton is None:
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return os.environ.get("TRITON_INTERPRET") == "1"


if triton is not None:
    @triton.jit
    def nearest_kernel(x, weight, bias, labels, m, k, d,
                       ROWS: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr):
        """One program: ROWS rows against all codes, CODES at a time; scores stay in registers, in float32."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        best = tl.full((ROWS,), float("-inf"), tl.float32)
        label = tl.zeros((ROWS,), tl.int32)
        for first in range(0, k, CODES):
            code = first + tl.arange(0, CODES)
            score = tl.zeros((ROWS, CODES), tl.float32)
            for at in range(0, d, WIDTH):
                column = at + tl.arange(0, WIDTH)
                x_at = x + row[:, None] * d + column
                w_at = weight + code[:, None] * d + column
                x_part = tl.load(x_at, (row[:, None] < m) & (column < d), 0)
                w_part = tl.load(w_at, (code[:, None] < k) & (column < d), 0)
                score = tl.dot(x_part.to(tl.float32), w_part.T, score, input_precision="tf32x3")
            score += tl.load(bias + code, code < k, float("-inf"))
            top, arg = tl.max(score, 1, return_indices=True)
            label = tl.where(top > best, first + arg, label)
            best = tl.maximum(top, best)
        tl.store(labels + row, label, row < m)


def find_nearest_triton(x, weight, bias):
    """`find_nearest` by the kernel above."""
    (m, width), (k, d) = x.shape, weight.shape
    assert width == d, f"rows of {width} values, centroids of {d}"
    labels = torch.empty(m, dtype=torch.int32, device=x.device)
    nearest_kernel[triton.cdiv(m, 128),](
        x.contiguous(), weight.contiguous(), bias, labels, m, k, d,
        ROWS=128, CODES=64 if k <= 64 else 128, WIDTH=32, num_warps=8, num_stages=3)
    return labels.long()


# --- patch features: f, which is never trained here -------------------------------------------------------

CLIP_SHA256 = "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"
CLIP_URL = f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/RN50x64.pt"
ENCODERS = {"dino": "dino_vits16", "deit": "deit_small", "mae": "mae_vitb16"}


class Bottleneck(resnet.Bottleneck):
    """CLIP's ResNet block: where a ResNet has a strided convolution, it averages."""

    def __init__(self, width_in, width, stride):
        wide = 4 * width
        widen = nn.Identity()
        if width_in != wide:
            widen = nn.Sequential(resnet.conv1x1(width_in, wide), nn.BatchNorm2d(wide))
        super().__init__(width_in, width, downsample=widen)
        self.shrink = nn.AvgPool2d(stride)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.shrink(y)))
        return self.relu(y + self.downsample(self.shrink(x)))


class CLIPTrunk(nn.Sequential):
    """CLIP's ResNet to the last ReLU of layer 4, without pooling: (b, 3, S, S) -> (b, (S/32)^2, 32 width).

    The default is RN50x64: 4096 features at 14x14 places of 448 pixels (MaPeT Sec. 4.2: k-CLIP).
    """
    prefix, patch_size = 0, 16                                 # no class token; pixels of the smaller image

    def __init__(self, width=128, layers=(3, 15, 36, 10)):
        super().__init__()
        width_in = 3
        for i, size in enumerate((width // 2, width // 2, width), 1):         # names as in its weights
            self.add_module(f"conv{i}", resnet.conv3x3(width_in, size, stride=2 if i == 1 else 1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(size))
            self.add_module(f"relu{i}", nn.ReLU())
            width_in = size
        self.pool = nn.AvgPool2d(2)
        for i, depth in enumerate(layers, 1):
            stack = nn.Sequential()
            for j in range(depth):
                stride = 2 if i > 1 and j == 0 else 1
                stack.append(Bottleneck(width_in, width, stride))
                width_in = 4 * width
            self.add_module(f"layer{i}", stack)
            width = 2 * width

    def forward(self, images):
        return rearrange(super().forward(images), "b d y x -> b (y x) d")


def load_clip():
    """RN50x64's trunk with OpenAI's weights, those of their TorchScript archive, in float32."""
    archive = torch.jit.load(download(CLIP_URL, sha256=CLIP_SHA256), map_location="cpu")
    trunk = CLIPTrunk()
    trunk.load_state_dict(archive.visual.float().state_dict(), strict=False)   # it pools, too
    return trunk.to(memory_format=torch.channels_last)


class PatchFeatures(nn.Module):
    """Normalized images (b, 3, S, S) -> (b, n, d) float32, a row a patch, by what is never trained (here).

    name      pixel, pixel-norm (standardized patches), hog, clip, dino, deit, mae, or what from_weights takes
    weights   of a learned tokenizer, whose name is then only a name: {encoder.KEY of a ViT, project.KEY}
    """

    def __init__(self, name, patch_size, image_size, weights=None):
        super().__init__()
        self.name, self.patch_size, self.image_size = name, patch_size, image_size
        self.encoder, self.project = None, nn.Identity()
        if weights is not None:
            size, width = weights["project.2.weight"].shape
            first, last = nn.Linear(width, width), nn.Linear(width, size)
            self.project = nn.Sequential(first, nn.Tanh(), last)
            self.encoder = from_weights(weights, image_size)
            self.load_state_dict(weights)
        elif name == "clip":
            self.encoder = load_clip()
        elif name not in PATCH_FEATURES:
            self.encoder = from_weights(ENCODERS.get(name, name), image_size)
        wanted = self.encoder.patch_size if self.encoder else patch_size
        if patch_size != wanted or image_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not fit image size {image_size}, or {name}")
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)                            # CLIP's batch norm would move with the images

    def forward(self, images):
        if self.encoder is None:
            return PATCH_FEATURES[self.name](images, self.patch_size)
        if self.name == "clip" and images.shape[-1] == self.image_size:
            images = F.interpolate(images, scale_factor=2, mode="bicubic")       # its stride is 32, not 16
        with torch.autocast("cuda", torch.float16, enabled=images.is_cuda):
            x = self.encoder(images)[:, self.encoder.prefix:]
        return self.project(x.float())

    def layers(self, images):
        """What a perceptual loss compares: [(b, rows, d)], each row standardized; gradients reach the images.

        Of a ViT, after 3, 6, 9 and 11 of 12 blocks (PeCo), or as many of its own; of all else, its features.
        """
        if self.encoder is None or self.name == "clip":
            x = self(images)
            return [F.layer_norm(x, x.shape[-1:])]
        depth, rows = self.encoder.depth, []
        chosen = {max(1, depth * i // 12) for i in (3, 6, 9, 11)}
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
            x = self.encoder.embed(images)
            for i, block in enumerate(self.encoder.blocks, 1):
                x = block(x)
                if i in chosen:
                    rows.append(F.layer_norm(x.float(), x.shape[-1:]))
        return rows


# --- the tokenizer ----------------------------------------------------------------------------------------

class KMeansTokenizer(nn.Module):
    """images (b, 3, S, S) -> tokens (b, n) int64: t(x) = argmax_k weight_k . f(x) + bias_k.

    uint8 images are normalized here, float images already are. S is image_size; for clip also twice that,
    which spares it the blur of enlarging (`input_size`: the best). It belongs beside a model, never inside:
    MAE's weight initialization would wipe it.

    features, encoder    f, see PatchFeatures; encoder: a learned tokenizer's f (dvae, vq, peco, vqkd)
    weight, bias         (K, d), (K,). K-means: centroids, -||c||^2 / 2; cosine: 0; dvae: its own classifier's
    """

    def __init__(self, features, weight, bias, patch_size, image_size, mean, std, encoder=None):
        super().__init__()
        self.features, self.patch_size, self.image_size = features, patch_size, image_size
        self.mean, self.std = mean, std
        self.extract = PatchFeatures(features, patch_size, image_size, encoder)
        self.learned = encoder is not None
        self.n_patches = (image_size // patch_size) ** 2
        self.input_size = image_size * 2 if features == "clip" else image_size
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    @property
    def vocab_size(self):
        return len(self.weight)

    def layers(self, images):
        return self.extract.layers(images)

    @torch.no_grad()
    def compute_features(self, images):
        """f(x): (b, n, d) float32."""
        if images.shape[-1] not in (self.image_size, self.input_size):
            raise ValueError(f"images have {images.shape[-1]} pixels, this tokenizer takes {self.input_size}")
        if images.dtype == torch.uint8:
            images = normalize(images, self.mean, self.std)
        return self.extract(images)

    @torch.no_grad()
    def forward(self, images):
        x = self.compute_features(images)
        rows = blocks(x.flatten(0, 1), x.device)
        tokens = [find_nearest(block, self.weight, self.bias) for block in rows]
        return torch.cat(tokens).view(x.shape[:2])

    def save(self, path):
        names = "features weight bias patch_size image_size mean std".split()
        encoder = self.extract.state_dict() if self.learned else None
        save(dict(encoder=encoder, **{name: getattr(self, name) for name in names}), path)


def select_vqkd(state):
    """KMeansTokenizer's arguments for the official weights of BEiT v2's VQ-KD; its codes have unit length."""
    vit, _ = read_vit(state)
    weights = {f"encoder.{key}": value for key, value in vit.items()}
    for key in [key for key in state if key.startswith("encode_task_layer.")]:
        weights[key.replace("encode_task_layer.", "project.")] = state[key]
    p = vit["patch_embed.proj.weight"].shape[-1]
    grid = math.isqrt(vit["pos_embed"].shape[1] - 1)
    codes = F.normalize(state["quantize.embedding.weight"].float(), dim=1)
    mean, std = SYMMETRIC
    return dict(features="vqkd", weight=codes, bias=torch.zeros(len(codes)), patch_size=p,
                image_size=p * grid, mean=mean, std=std, encoder=weights)


def load_tokenizer(path):
    """What `save` wrote, or VQ-KD (a file, or "vqkd": fetched); ValueError, one line, for anything else."""
    path = download(**PUBLIC[path]) if path == "vqkd" else path
    state = read_checkpoint(path)
    try:
        if "quantize.embedding.weight" in state.get("model", ()):
            state = select_vqkd(state["model"])
        return KMeansTokenizer(**state)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a tokenizer of kmeans.py fit ({reason})") from None


# --- from a data set to tokenizer.pt and tokens.npy -------------------------------------------------------

def load_batches(ds, indices, batch_size, workers=0, device="cpu", desc=None):
    """(images uint8 (b, 3, S, S) on device, labels (b,), index really read (b,)), in the order of `indices`.

    A neighbor may stand in for a damaged picture. desc: the name of this pass, for a bar.
    """
    parts = [part.tolist() for part in torch.as_tensor(indices).split(batch_size)]
    pin = torch.device(device).type == "cuda"
    loader = DataLoader(ds, batch_sampler=parts, num_workers=workers, pin_memory=pin)
    if desc and rank_and_world()[0] == 0:
        loader = tqdm(loader, desc, leave=False, disable=None)               # None: not into a file
    for images, labels, wanted, read in loader:
        ds.note_damaged(wanted, read)
        yield images.to(device, non_blocking=True), labels, read


def blank_tokenizer(ds, features, patch_size, image_size=None):
    """A tokenizer before its fit: it knows the features of the images of `ds`, but no codes."""
    known = dict.fromkeys(ENCODERS, IMAGENET)
    known |= {"clip": CLIP, "vqkd": SYMMETRIC}
    mean, std = known.get(features, (ds.mean, ds.std))
    nothing = torch.zeros(1, 1), torch.zeros(1)
    return KMeansTokenizer(features, *nothing, patch_size, image_size or ds.image_size, mean, std)


def sample_features(tokenizer, ds, k, seed, batch_size, workers, device):
    """What K-means is fitted on, (rows, d), this process's part: uint8 pixels, or features in float16.

    All patches of a seeded sample of 20,000 images, or of as many as give 512 rows a code; of each image 5 %
    for clip, as in its released code, and for textures. (Sorted by class, as folders are, the images would
    seed k-means++ with one class, as ClusterMIM's code does.)
    """
    rank, world = rank_and_world()
    n = keep = tokenizer.n_patches
    if tokenizer.features == "clip" or ds.name.startswith("textures"):
        keep = max(1, round(.05 * n))
    images = min(len(ds), max(20000, math.ceil(512 * k / keep)))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ds), generator=generator)[:images]
    places = torch.rand(images, n, generator=generator).topk(keep).indices   # of each image
    order, places = order.tensor_split(world)[rank], places.tensor_split(world)[rank]
    batches = load_batches(ds, order, batch_size, workers, device, "patches")
    rows = []
    for (pixels, _, _), kept in zip(batches, places.split(batch_size)):
        if tokenizer.features == "pixel":
            x = patchify(pixels, tokenizer.patch_size)
        else:
            x = tokenizer.compute_features(pixels).half()
        x = gather_patches(x, kept.to(device))
        rows.append(x.flatten(0, 1))
    return torch.cat(rows)


def fit_tokenizer(ds, features="pixel", k=64, patch_size=16, image_size=None, seed=0, batch_size=64,
                  workers=0, device="cpu", **options):
    """K-means on the patches of `ds`: a KMeansTokenizer, equal on every process; its .kmeans is the KMeans.

    options: metric, init, max_iter, restarts of KMeans; for clip, unless they are given, k-CLIP's (MaPeT
    Sec. 4.2 and its code): random seeds, 20 iterations, the best of 5. Random seeds, too, beyond 1000 codes.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if features == "clip":
        options = dict(init="random", max_iter=20, restarts=5) | options
    elif k > 1000 and "init" not in options:
        options["init"] = "random"
        print0("K-means starts from random patches: --init k-means++ takes long for so many codes")
    tokenizer = blank_tokenizer(ds, features, patch_size, image_size).to(device)
    rows = sample_features(tokenizer, ds, k, seed, batch_size, workers, device)
    mean, std = torch.tensor([tokenizer.mean, tokenizer.std], device=device).repeat(1, patch_size ** 2)

    def normalized():                                          # uint8 pixels become floats chunk by chunk
        for part in rows.split(1 << 16):
            part = part / 255
            yield (part - mean) / std

    kmeans = KMeans(k, seed=seed, device=device, **options)
    kmeans.fit(normalized if features == "pixel" else rows)
    tokenizer.kmeans = kmeans
    tokenizer.weight, tokenizer.bias = linear_layer(kmeans.centroids)
    if kmeans.metric == "cosine":
        tokenizer.bias.zero_()
    return tokenizer


def write_npy(path, shape, arrays):
    """Arrays that follow each other as one .npy file, atomically. np.save does not notice a full disk."""
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        for i, array in enumerate(arrays):
            if i == 0:
                header = np.lib.format.header_data_from_array_1_0(np.broadcast_to(array.flat[0], shape))
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(array))


def load_tokens(path, *shape):
    """tokens.npy as a read-only memory map (images, n) uint16; ValueError, one line, for any other file."""
    try:
        tokens = np.lib.format.open_memmap(path, "r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a token file ({error})") from None
    if tokens.dtype != np.uint16 or tokens.ndim != 2:
        raise ValueError(f"{path}: {tokens.dtype} {tokens.shape}, but tokens are uint16 (images, n)")
    if shape and tokens.shape != shape:
        raise ValueError(f"{path}: tokens {tokens.shape} (images, patches), wanted {shape}")
    return tokens


def tokenize(tokenizer, ds, path, batch_size=64, workers=0, device="cpu"):
    """Tokens of all images in the data set's own order: writes `path`, a memory map (images, n) uint16.

    Each process makes its part, rank 0 writes the file; if it is there already, it is read.
    """
    rank, world = rank_and_world()
    shape = len(ds), tokenizer.n_patches
    there = os.path.exists(path)
    barrier()                                                  # nobody writes before everybody has looked
    if not there:
        mine = torch.arange(len(ds)).tensor_split(world)[rank]
        batches = load_batches(ds, mine, batch_size, workers, device, "tokens")
        tokenizer = tokenizer.to(device)
        tokens = torch.zeros(shape, dtype=torch.int32, device=device)
        made = [tokenizer(images).int() for images, _, _ in batches]
        tokens[mine] = torch.cat(made)
        all_reduce(tokens)
        if rank == 0:
            tokens = tokens.cpu().numpy().astype(np.uint16)
            write_npy(path, shape, [tokens])
        barrier()
    tokens = load_tokens(path)
    if tokens.shape != shape:
        raise ValueError(f"{path}: tokens {tokens.shape} (images, patches), but {ds.name} has {shape}: "
                         "remove it, or choose another folder")
    return tokens


# --- pictures ---------------------------------------------------------------------------------------------

def rebuild_images(tokenizer, tokens):
    """Images (b, 3, S, S) in 0..1 from tokens (b, n) of raw pixels: each patch its centroid."""
    mean, std = torch.tensor([tokenizer.mean, tokenizer.std])[..., None, None]
    images = unpatchify(tokenizer.weight[tokens], tokenizer.patch_size)
    return (images * std + mean).clamp(0, 1)


def draw_codebook(tokenizer, ds, path, codes=None, images=400):
    """PNG: a row for each of `codes` (the most used ones): its centroid (of pixels), its nearest patches."""
    side = tokenizer.input_size // math.isqrt(tokenizer.n_patches)           # in pixels of the data set
    parts = []
    some = range(0, len(ds), math.ceil(len(ds) / images))
    for pixels, _, _ in load_batches(ds, some, 64):
        x, tokens = tokenizer.compute_features(pixels), tokenizer(pixels)
        if not tokenizer.bias.any():                           # cosine: lengths do not count
            x = F.normalize(x, dim=-1)
        distances = (x - tokenizer.weight[tokens]).square().sum(-1)
        parts.append((patchify(pixels, side), tokens, distances))
    parts = [torch.cat(part).flatten(0, 1) for part in zip(*parts)]
    patches, tokens, distances = parts
    if codes is None:
        codes = tokens.bincount().argsort(descending=True)[:16].tolist()
    if max(codes) >= tokenizer.vocab_size:
        raise ValueError(f"--codes {max(codes)}: the last code here is {tokenizer.vocab_size - 1}")
    drawn = {}
    order = distances.argsort()
    for code in codes:
        nearest = order[tokens[order] == code][:12]
        line = unpatchify(patches[nearest, None] / 255, side)
        if tokenizer.features == "pixel":
            centroid = rebuild_images(tokenizer, torch.tensor([[code]]))
            line = torch.cat([centroid, line])
        drawn[f"code {code}"] = line
    draw_rows(drawn, path)


def draw_tokens(tokenizer, ds, path, images=6):
    """PNG: images; under each its token map, one color a token; of raw pixels also what its tokens make."""
    some = range(0, len(ds), math.ceil(len(ds) / images))
    pixels, _, _ = next(load_batches(ds, some, images))
    tokens = tokenizer(pixels)
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(tokenizer.vocab_size, 3, generator=generator)
    maps = unpatchify(colors[tokens], 1)
    rows = {"image": pixels / 255, "tokens": F.interpolate(maps, pixels.shape[-1])}
    if tokenizer.features == "pixel":
        rows["rebuilt"] = rebuild_images(tokenizer, tokens)
    draw_rows(rows, path)


# --- commands ---------------------------------------------------------------------------------------------

def measure_seconds(call):
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def bench(device):
    """Prints the least time of a Lloyd iteration beside that of the bare product X C^T."""
    cases = [(100_000, 768, k, torch.float32) for k in (50, 100, 1000)]
    if device.type == "cuda":
        cases = [(24_800_000, 768, 100, torch.uint8), (4_200_000, 1024, 8192, torch.bfloat16)]
    for n, d, k, kind in cases:
        x = torch.empty(n, d, dtype=kind, device=device)
        x.random_(256) if kind == torch.uint8 else x.normal_()
        c = x[:k].float()
        _, mean, _ = compute_moments(x, device)

        def multiply():
            for part in x.split(1 << 17):
                part.float() @ c.T

        def iterate():
            add_up(x, c, mean)

        rounds = [(measure_seconds(multiply), measure_seconds(iterate)) for _ in range(8)]
        product, iteration = np.min(rounds, 0)
        print(f"n = {n}, d = {d}, K = {k}, {kind}: product {product:.4f} s, iteration {iteration:.4f} s, "
              f"ratio {iteration / product:.2f}", flush=True)


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="kmeans.py")
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("fit", help="patches -> OUT/tokenizer.pt")
    tokens = commands.add_parser("tokenize", help="images -> OUT/tokens.npy")
    show = commands.add_parser("show", help="OUT/codebook.png, OUT/tokens.png")
    bench = commands.add_parser("bench", help="time of a Lloyd iteration over the product's")
    for command in (fit, tokens, show, bench):
        command.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    for command in (fit, tokens, show):
        command.add_argument("--data", default="textures", help="textures, a torchvision name or a folder")
        command.add_argument("--classes", help="file of class folders to keep, e.g. ImageNet-100's")
        command.add_argument("--out", help="folder for what is written (runs/tokenizer; the tokenizer's)")
    for command in (tokens, show):
        command.add_argument("--tokenizer", required=True, help="tokenizer.pt of kmeans.py fit or train.py")
        command.add_argument("--split", default="train", choices=["train", "test"])
    for command in (fit, tokens):
        command.add_argument("--batch-size", type=positive, default=64, help="images at a time (64)")
        command.add_argument("--workers", type=int, default=0, help="loading processes (0)")
    add = fit.add_argument
    add("--features", default="pixel", help="pixel, pixel-norm, hog, dino, deit, mae, clip, a ViT's file")
    add("--image-size", type=positive, help="pixels a side (textures 48, otherwise 224)")
    add("--patch-size", type=positive, help="pixels a side (textures 8, otherwise 16)")
    add("--k", type=positive, help="codebook size (textures 64; others pixel 50, features 100)")
    add("--metric", choices=["euclidean", "cosine"], help="(euclidean)")
    add("--init", choices=["k-means++", "random"], help="(k-means++; clip, K > 1000: random)")
    add("--max-iter", type=positive, help="passes over the patches (100; clip 20)")
    add("--restarts", type=positive, help="seedings, of which the best is kept (1; clip 5)")
    add("--seed", type=int, default=0, help="of the images, patches and first centroids (0)")
    show.add_argument("--codes", type=int, nargs="+", help="codes to draw (the 16 most used ones)")
    return parser.parse_args(argv)


def run_fit(args, ds, device):
    started = time.perf_counter()
    tokenizer = fit_tokenizer(ds, args.features, args.k, args.patch_size, args.image_size, args.seed,
                              args.batch_size, args.workers, device, metric=args.metric, init=args.init,
                              max_iter=args.max_iter, restarts=args.restarts)
    found = tokenizer.kmeans
    n = found.counts.sum()
    share = found.counts / n
    used = (share > 0).sum()
    perplexity = torch.special.entr(share).sum().exp()
    print0(f"{n} patches, {found.n_iter} iterations, {time.perf_counter() - started:.1f} s; "
           f"squared distance a patch {found.history[0] / n:.4g} -> {found.inertia / n:.4g}; "
           f"{used} of {args.k} codes used, perplexity {perplexity:.1f}")
    if rank_and_world()[0] == 0:
        tokenizer.save(f"{args.out}/tokenizer.pt")
        print(f"wrote {args.out}/tokenizer.pt")


def main(argv=None):
    from train import open_dataset, setup
    args = parse(argv)
    with exit_on_error("kmeans.py"):
        device = setup(args.device)
        if args.command == "bench":
            return bench(device)
        if args.command == "fit":
            textures = args.data == "textures"
            args.image_size = args.image_size or (48 if textures else 224)
            args.patch_size = args.patch_size or (8 if textures else 16)
            usual = 50 if args.features == "pixel" else 100
            args.k = args.k or (64 if textures else usual)
            args.out = args.out or "runs/tokenizer"
            args.split = "train"
            size = args.image_size
            if args.features == "clip":
                size *= 2                                      # CLIP sees twice the pixels
        else:
            tokenizer = load_tokenizer(args.tokenizer)
            args.out = args.out or os.path.dirname(args.tokenizer) or "."
            size = tokenizer.input_size
        ds = open_dataset(args.data, args.split, size, args.classes)
        if ds is None:
            raise ValueError(f"--data {args.data}: no folder for --split {args.split} (val or test) in it")
        os.makedirs(args.out, exist_ok=True)
        if args.command == "fit":
            run_fit(args, ds, device)
        elif args.command == "tokenize":
            path = f"{args.out}/tokens.npy" if args.split == "train" else f"{args.out}/tokens-test.npy"
            images, n = tokenize(tokenizer, ds, path, args.batch_size, args.workers, device).shape
            print0(f"{path}: {images} images x {n} tokens of {tokenizer.vocab_size}")
        elif rank_and_world()[0] == 0:
            draw_codebook(tokenizer, ds, f"{args.out}/codebook.png", args.codes)
            draw_tokens(tokenizer, ds, f"{args.out}/tokens.png")


if __name__ == "__main__":
    main()
