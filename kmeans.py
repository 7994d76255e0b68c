"""K-means and its tokenizer: images -> patch features -> nearest centroid (ClusterMIM, arXiv:2407.09087).

    t(x) = argmin_k ||f(x) - c_k||^2        f: raw pixels, HOG, a frozen encoder (DINO, DeiT, MAE, CLIP, ours)
         = argmax_k f(x).c_k - ||c_k||^2/2  ||f(x)||^2 is the same for every k: one product and an argmax

`lloyd` is all of K-means, in seven lines, to be read. What runs is `KMeans.fit`: the same for any number of
rows, on any device, in one process or many; and empty clusters get new centroids. Rows are read block by block
and a block's scores are gone after its argmax: memory beyond the data is O(block K + K d). Several codebooks
(restarts, axis r) are fitted at once to the same rows.

Read down to the ruled line: K-means, its seeding, the tokenizer. Below it, to be skipped at first: the rest
of the fit, processes, reading rows, CUDA kernels, tokenizer.pt and tokens.npy, pictures, commands.

python kmeans.py fit                             embedded images, raw pixels, K = 64: 20 s on two CPU cores
python kmeans.py tokenize --tokenizer runs/tokenizer-textures-pixel-k64/tokenizer.pt   goes on after a kill
python kmeans.py show --tokenizer runs/tokenizer-textures-pixel-k64/tokenizer.pt      codebook.png, tokens.png
torchrun --nproc_per_node 8 kmeans.py fit --data IMAGENET --features clip --k 8192     k-CLIP (MaPeT Sec. 4.2)
python kmeans.py bench                           time of a Lloyd iteration over that of the product X C^T
"""
import argparse
import contextlib
import datetime
import hashlib
import itertools
import math
import os
import re
import shutil
import signal
import sys
import time
import timeit
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.data import DataLoader
from tqdm import tqdm

from vit import (CLIP, ENCODERS, IMAGENET, PUBLIC, SYMMETRIC, PatchFeatures, download, draw_grid, exit_on_error,
                 gather_patches, normalize, patchify, read_checkpoint, save, select_vit, to_device, unpatchify,
                 write_atomically)

try:
    import triton
    import triton.language as tl
except ImportError:                         # no Triton for macOS and Windows: plain torch takes over
    triton = None

MOST_CODES = 1 << 16                        # tokens.npy is uint16
SHARD = 4096                                # images; what a killed process loses of its tokens


# --- K-means ----------------------------------------------------------------------------------------------

def lloyd(x, centroids, n_iter):
    """K-means of rows x (n, d) from the first centroids (k, d): n_iter times assign and update (Sec. 3.2).

    -> labels (n,) int64, of the nearest centroid; centroids (k, d). An empty cluster keeps its own.
    """
    for _ in range(n_iter):
        labels = torch.cdist(x, centroids).argmin(1)                        # assign: the nearest centroid
        sums = torch.zeros_like(centroids).index_add_(0, labels, x)         # update: the mean of its rows
        counts = torch.bincount(labels, minlength=len(centroids))[:, None]
        centroids = torch.where(counts > 0, sums / counts, centroids)     # or where it is, if it has none
    return torch.cdist(x, centroids).argmin(1), centroids


def find_nearest(x, w, bias):
    """argmax_k x.w_k + bias_k -> labels (r, m) int64, scores (r, m) float32; of equals the smallest k.

    A block x (m, d) of any dtype; w (r, k, d) and bias (r, k) float32 of r codebooks, from `score_weights`.
    """
    if use_triton(x.device):
        return find_nearest_fused(x, w, bias)
    best, labels = multiply(x, w, bias).unflatten(1, bias.shape).max(-1)
    return labels.T, best.T


def score_weights(c, origin, data):
    """w, bias with x.w_k + bias_k = (x' - o).(c_k - o) - ||c_k - o||^2 / 2, for stored rows x: x' = scale x + shift.

    Any origin o gives the same labels; with the data's mean, float32 tells near centroids apart.
    """
    c = data.round(c.double() - origin)
    bias = (c * (data.shift - origin)).sum(-1) - c.square().sum(-1) / 2
    return (c * data.scale).float(), bias.float()


class Clusters:
    """Which of k clusters each row is in, from pass to pass, and their float64 sums and counts; of r codebooks at once.

    Only rows that change their cluster change a sum. `Candidates` are the rows that can: all, or what bounds leave.
    """

    def __init__(self, data, r, k, n, origin):
        self.data, self.origin = data, origin
        self.labels = torch.full((r, n), k, device=data.device)         # n rows of this process; k: of none yet
        self.sums = torch.zeros(r, k + 1, data.d, dtype=torch.float64, device=data.device)
        self.counts = torch.zeros(r, k + 1, dtype=torch.float64, device=data.device)
        self.part, self.added, self.first = torch.zeros_like(self.sums, dtype=torch.float32), 0, True
        self.candidates = Candidates(data, self.labels, origin)

    def run_pass(self, c):
        """Rows to the nearest of the centroids c (r, k, d): sums (r, k, d), counts (r, k) of all processes."""
        w, bias = score_weights(c, self.origin, self.data)
        self.candidates.begin_pass(c)
        start, changed = 0, 0
        for block in self.data:
            here = slice(start, start + len(block))
            start = here.stop
            for r, labels in enumerate(self.labels[:, here]):
                at, x, new = self.candidates.find_nearest(r, here, block, w[r], bias[r])
                old = labels[at]
                moved = (new != old).nonzero()[:, 0]
                labels[at[moved]] = new[moved]
                self.move_rows(r, x, moved, old, new)
                changed += len(moved)
        self.add_part()
        self.candidates.end_pass(changed)
        self.first = False
        sums, counts = self.sums[:, :-1].clone(), self.counts[:, :-1].clone()
        all_reduce(sums, counts)
        return sums, counts

    def move_rows(self, r, x, moved, old, new):
        """Rows x[moved] of codebook r leave their old cluster's sum and count and join their new one's."""
        for rows in moved.split(1 << 16):
            if self.added + len(rows) > 1 << 16:  # float32 adds 65536 uint8 values exactly (below 2^24)
                self.add_part()
            self.added += len(rows)
            here = x if len(rows) == len(x) else x[rows]
            for labels, sign in ((new, 1), (old, -1)):
                if sign > 0 or not self.first:                          # in the first pass they leave none
                    add_rows(self.part[r], labels[rows], here, sign)
                    self.counts[r] += sign * torch.bincount(labels[rows], minlength=self.counts.shape[1])

    def add_part(self):
        self.sums += self.part
        self.part.zero_()
        self.added = 0


def kmeans_plusplus(x, u):
    """Greedy k-means++ (Arthur & Vassilvitskii 2007; trials as in scikit-learn): rows x (m, d) -> seeds (k,) int64.

    u (k, trials), uniform in [0, 1), makes every choice. The first seed is row floor(m u[0, 0]). Each number in u[i]
    draws a row, with probability proportional to the squared distance to the nearest seed so far: the first row up to
    which the sum of these is more than that share of all. Seed i is the drawn row that leaves the least sum, of equal
    ones the first. A seed is drawn again only where all rows are seeds, or lie on one.
    """
    x = x - x.mean(0)                                                   # small numbers round less
    norm = x.square().sum(-1)
    squared_distances = lambda t: (norm + norm[t, None] - 2 * x[t] @ x.T).clamp_(min=0)     # of rows t to all: (t, m)
    seeds = (u[:1, 0] * len(x)).long()                                  # the first: any row
    closest = squared_distances(seeds)[0]
    for i in range(1, len(u)):
        closest[seeds[-1]] = 0                                          # exactly, whatever was rounded
        mass = closest.double().cumsum(-1)                              # drawing: where in it u falls
        trials = torch.searchsorted(mass, u[i] * mass[-1], right=True).clamp_(max=len(x) - 1)
        distances = torch.minimum(closest, squared_distances(trials))
        best = distances.sum(-1).argmin()
        closest, seeds = distances[best], torch.cat([seeds, trials[best][None]])
    return seeds


class KMeans:
    """Lloyd's algorithm.

    k, metric   number of clusters; "euclidean", or "cosine": rows have unit length, and so have the centroids
    init        "k-means++" on a seeded sample of max(16384, 4 k) rows, "random" rows, or a tensor (k, d)
    tol         stop when the centroids move (squared, summed) less than tol times a column's mean variance
    restarts    seedings that run side by side; the one with the least inertia is kept
    mean, std   of uint8 pixels, see Rows; device: where arrays and streams are worked on; rows: block size

    Afterwards: centroids (k, d) float32, counts (k,) int64 (0: a dead code), inertia (sum of squared
    distances), n_iter, history (the inertia at each iteration). With torch.distributed initialized every
    process passes its own rows and ends with the centroids of one process on all rows.
    """

    def __init__(self, k, metric="euclidean", init="k-means++", max_iter=100, tol=1e-4, seed=0, restarts=1,
                 mean=None, std=None, device=None, rows=None):
        if metric not in ("euclidean", "cosine"):
            raise ValueError(f"metric must be euclidean or cosine, not {metric!r}")
        if not torch.is_tensor(init) and init not in ("k-means++", "random"):
            raise ValueError(f"init must be k-means++, random or a tensor, not {init!r}")
        if min(k, restarts, max_iter) < 1:
            raise ValueError(f"k, restarts and max_iter must be at least 1, not {k}, {restarts} and {max_iter}")
        self.k, self.metric, self.init, self.restarts, self.seed = k, metric, init, restarts, seed
        self.max_iter, self.tol = max_iter, tol
        self.input = dict(metric=metric, mean=mean, std=std, device=device, rows=rows)

    def fit(self, x):
        data = Rows(x, self.k, **self.input)
        n, n_own, start, center, scatter = compute_statistics(data)
        if self.k > n:
            raise ValueError(f"{self.k} clusters of {n} rows: at least as many rows as clusters are wanted")
        # Cosine: the rows have unit length, and centroids must get it back, or the longest would win.
        unit = F.normalize if self.metric == "cosine" else lambda c, dim: c
        c = unit(seed_centroids(data, self.k, self.init, self.restarts, self.seed, n, start), dim=-1)
        clusters = Clusters(data, self.restarts, self.k, n_own, center)
        history, n_iter = [], torch.zeros(self.restarts, dtype=torch.long, device=c.device)
        done = n_iter > 0
        for _ in track(range(self.max_iter), "K-means", self.max_iter, "passes"):
            sums, counts = clusters.run_pass(c)
            sums = data.scale * sums + data.shift * counts[..., None]      # were of rows as stored
            history.append(compute_inertia(scatter, sums, counts, c, center))
            new = torch.where(counts[..., None] > 0, sums / counts[..., None], c.double())      # update
            if (counts == 0).any():
                new = reseed(data, c, new, counts == 0, center, start)
            new = torch.where(done[:, None, None], c, unit(new, dim=-1).float())     # what is done stays
            moved = (new - c).double().square().sum((-1, -2))
            c, n_iter = new, n_iter + ~done
            done = done | (moved <= self.tol * scatter / (n * data.d))
            if done.all():
                break
        counts, inertia = torch.zeros_like(counts), torch.zeros_like(history[0])
        for labels, distances in measure_distances(data, c, center):
            counts.scatter_add_(-1, labels, torch.ones_like(labels, dtype=counts.dtype))
            inertia += distances.sum(-1)
        all_reduce(counts, inertia)
        best = inertia.argmin()
        self.centroids, self.counts, self.inertia = c[best], counts[best].long(), inertia[best].item()
        self.n_iter = n_iter[best].item()
        self.history = torch.stack(history)[:self.n_iter, best].tolist()
        return self

    def predict(self, x):
        return assign(x, self.centroids, **self.input)[0]


def assign(x, centroids, metric="euclidean", mean=None, std=None, device=None, rows=None):
    """Nearest centroids (k, d) of rows (n, d): labels (n,) int64, squared distances (n,) float32.

    The arguments as in KMeans and Rows. Never holds (n, k).
    """
    data = Rows(x, len(centroids), metric, mean, std, device or centroids.device, rows)
    if centroids.shape[-1] != data.d:
        raise ValueError(f"rows {data.shape} do not fit centroids {tuple(centroids.shape)}")
    c = centroids.to(data.device).float()[None]
    labels, distances = zip(*measure_distances(data, c, c[0].double().mean(0)))
    return torch.cat(labels, 1)[0], torch.cat(distances, 1)[0]


class KMeansTokenizer(nn.Module):
    """images (b, 3, S, S) -> tokens (b, n) int64. uint8 images are normalized here, float images already are.

    S is image_size; for clip also twice that, which spares it the blur of enlarging (`input_size`: the best).
    It belongs beside a model, never inside: MAE's weight initialization would wipe it.

    encoder   of a learned tokenizer (dvae, vq, peco, vqkd): the weights of f, see PatchFeatures
    made      how and of which images it was fitted, see fit_tokenizer
    """

    def __init__(self, features, centroids, metric, patch_size, image_size, mean, std, encoder=None, made=None):
        super().__init__()
        self.features, self.metric, self.patch_size, self.image_size = features, metric, patch_size, image_size
        self.mean, self.std = (tuple(float(value) for value in values) for values in (mean, std))
        self.extract, self.learned = PatchFeatures(features, patch_size, image_size, encoder), encoder is not None
        self.vocab_size, self.n_patches = len(centroids), (image_size // patch_size) ** 2
        self.input_size = image_size * (2 if features == "clip" else 1)
        self.register_buffer("centroids", centroids.detach().float().clone())
        self.folded, self.made = None, made                    # folded: see fold

    @torch.no_grad()
    def rows(self, images):
        """What is clustered: (b, n, d); pixels stay uint8, which `assign` standardises."""
        side, best = images.shape[-1], self.input_size
        if images.shape[1:] != (3, side, side) or side not in (self.image_size, best):
            raise ValueError(f"this tokenizer takes images (b, 3, {best}, {best}), not {tuple(images.shape)}")
        if self.features == "pixel":
            return patchify(images, self.patch_size)
        return self.extract(normalize(images, self) if images.dtype == torch.uint8 else images)

    def assign(self, images):
        """Tokens (b, n) and squared distances (b, n)."""
        rows = self.rows(images)
        labels, distances = assign(rows.flatten(0, 1), self.centroids, self.metric, self.mean, self.std)
        return labels.view(rows.shape[:2]), distances.view(rows.shape[:2])

    def forward(self, images):
        rows = self.rows(images)
        block = rows.flatten(0, 1)
        size, before_unit, w, bias = self.fold(block)
        labels = [find_nearest(to_unit(part, before_unit), w, bias)[0] for part in block.split(size)]
        return torch.cat(labels, 1).view(rows.shape[:2])

    def fold(self, block):
        """The centroids as `find_nearest` wants them, kept: making them for each crop would wait for the GPU."""
        key = self.centroids.device, self.centroids._version, block.dtype, self.centroids.data_ptr()
        if self.folded is None or self.folded[0] != key:
            data, c = Rows(block, len(self.centroids), self.metric, self.mean, self.std), self.centroids[None]
            self.folded = key, data.rows, data.before_unit, *score_weights(c, c[0].double().mean(0), data)
        return self.folded[1:]

    def save(self, path):
        keys = "features", "metric", "patch_size", "image_size", "mean", "std", "vocab_size", "made"
        state = {"centroids": self.centroids.cpu(), **{key: getattr(self, key) for key in keys}}
        if self.learned:
            state["encoder"] = {key: value.cpu() for key, value in self.extract.state_dict().items()}
        save(state, path)


# ==========================================================================================================
# Machinery. The method ends here: what follows reads rows and images, runs on CUDA, and takes commands.
# ==========================================================================================================

# --- the rest of the fit: seeds, exact distances, empty clusters, the mean of the data --------------------

def seed_centroids(data, k, init, restarts, seed, n, start):
    """(r, k, d): every process makes the same choices among the n rows of all; its own begin at `start`."""
    generator = torch.Generator().manual_seed(seed)
    if torch.is_tensor(init):
        if init.shape != (k, data.d):
            raise ValueError(f"init is {tuple(init.shape)}: {k} centroids of {data.d} values are wanted")
        return init.to(data.device).float().repeat(restarts, 1, 1)
    if init == "random":
        index = torch.cat([torch.randperm(n, generator=generator)[:k] for _ in range(restarts)])
        return data.gather(index, start).view(restarts, k, data.d)
    size = max(16384, 4 * k)
    index = torch.randperm(n, generator=generator)[:size] if size < n else torch.arange(n)
    sample, trials = data.gather(index, start), 2 + int(math.log(k))
    u = torch.rand(restarts, k, trials, generator=generator, dtype=torch.float64).to(data.device)
    return torch.stack([sample[kmeans_plusplus(sample, choices)] for choices in u])


def measure_distances(data, c, origin):
    """Labels and squared distances ||x - c_label||^2 (r, m) of each block; by definition: no cancellation."""
    w, bias = score_weights(c, origin, data)
    for block in data:
        labels, _ = find_nearest(block, w, bias)
        x = data.standardize(block)
        yield labels, torch.stack([(x - c[r, own]).square_().sum(-1) for r, own in enumerate(labels)])


def compute_inertia(scatter, sums, counts, c, mean):
    """sum ||x - c||^2 = sum ||x - mean||^2 - 2 (c - mean).sum (x - mean) + count ||c - mean||^2, of each codebook."""
    c = c.double() - mean
    sums = sums - counts[..., None] * mean
    return (scatter - 2 * (c * sums).sum((-1, -2)) + (counts * c.square().sum(-1)).sum(-1)).clamp(min=0)


def reseed(data, c, new, empty, origin, start):
    """`new` (r, k, d) with its empty clusters moved onto the rows farthest from their centroids c."""
    m, first = int(empty.sum(-1).max()), start
    far = torch.full((len(c), m), -1., device=c.device)         # the m greatest distances, and of which rows
    index = torch.zeros_like(far, dtype=torch.long)
    for labels, distances in measure_distances(data, c, origin):
        rows = torch.arange(first, first + labels.shape[-1], device=c.device).expand_as(labels)
        far, at = torch.cat([far, distances], -1).topk(m)
        index = torch.cat([index, rows], -1).gather(-1, at)
        first += labels.shape[-1]
    far, at = all_gather(far).topk(m)
    index = all_gather(index).gather(-1, at)
    for r in empty.any(-1).nonzero()[:, 0].tolist():
        codes = empty[r].nonzero()[:, 0]
        codes = codes[far[r, :len(codes)] > 0]                 # every row sits on a centroid: nothing to gain
        new[r, codes] = data.gather(index[r, :len(codes)].cpu(), start).double()
    return new


def compute_statistics(data):
    """One pass: n of all processes, of this one, rows before its own, mean (d,), sum ||x - mean||^2; float64."""
    n, origin, sums, squares = 0, None, 0., 0.
    for block in data:
        x = data.standardize(block)
        if origin is None:                                      # near the mean: no cancellation below
            origin = x.mean(0)
            all_reduce(origin)
            origin /= rank_and_world()[1]
        x = x - origin
        n += len(x)
        sums = sums + x.sum(0).double()
        squares = squares + x.square().sum().double()
    sizes = all_gather(torch.tensor([n], device=data.device)).tolist()
    all_reduce(sums, squares)
    total = sum(sizes)
    scatter = squares - sums.square().sum() / total
    if not torch.isfinite(scatter):
        raise ValueError("K-means got NaN or infinite values (or some beyond 1e18): clean the data first")
    return total, n, sum(sizes[:rank_and_world()[0]]), origin.double() + sums / total, scatter.clamp(min=0)


class Candidates:
    """The rows that can change their cluster in a pass: all; on the CPU, once few change, those that bounds leave.

    own (r, n) is at least a row's distance to its centroid, others (r, n) at most that to any other; both move with
    the centroids, and where they nearly meet the row is looked at: nothing is approximate (Hamerly 2010). They are
    tried on every 16th block first. If they leave more than 70 % of its rows they are dropped, for 2 passes, then
    for 4, 8, ...
    """

    def __init__(self, data, labels, origin):
        self.data, self.labels, self.origin, self.c = data, labels, origin.float(), None
        self.own = None                                        # no bounds
        self.trial, self.few_change, self.wait, self.pause = True, False, 0, 2

    def begin_pass(self, c):
        """The centroids c (r, k, d) of this pass: by as much as they moved all bounds may be wrong."""
        self.wait -= 1
        self.bounded = self.looked_at = 0                      # rows that had bounds, and those of them looked at
        if self.own is not None:
            drift = F.pad((c - self.c).norm(dim=-1), (0, 1))   # one more, for k = 1
            most, of = drift.topk(2)
            for r, label in enumerate(self.labels):
                self.own[r] += drift[r][label]
                self.others[r] -= torch.where(label == of[r, 0], most[r, 1], most[r, 0])
        elif self.few_change and self.wait < 0 and self.data.device.type == "cpu":
            self.own = torch.full(self.labels.shape, math.inf)          # look at all
            self.others = torch.zeros(self.labels.shape)
            self.norms = torch.empty(self.labels.shape[1])     # ||x - origin||^2
        self.c = c

    def find_nearest(self, r, here, block, w, bias):
        """Of a block, the rows `here`, those that can have changed: where (m,), rows (m, d), labels (m,)."""
        if self.own is None or self.trial and here.start // self.data.rows % 16:
            new = find_nearest(block, w[None], bias[None])[0][0]
            return torch.arange(len(block), device=new.device), block, new
        own, others, norms = self.own[r, here], self.others[r, here], self.norms[here]
        at = (own >= others).nonzero()[:, 0]
        if own.isinf().all():                                  # the first time
            norms.copy_((self.data.standardize(block) - self.origin).square().sum(-1))
        else:
            self.bounded += len(own)
            self.looked_at += len(at)
        if len(at) == 0:
            return at, block[:0], at
        x = block
        if len(at) < len(block):  # few shapes: oneDNN compiles a product for each
            x = block.index_select(0, F.pad(at, (0, -len(at) % 512)))
        scores, x = multiply(x, w[None], bias[None])[:len(at)], x[:len(at)]
        best, labels = scores.max(-1)
        second = scores.scatter_(1, labels[:, None], -math.inf).amax(-1)
        # ||x - c||^2 = ||x - origin||^2 - 2 score. 1e-4 is far above the rounding of the scores.
        own[at] = (1.0001 * norms[at] - 2 * best).clamp(min=0).sqrt()
        others[at] = (.9999 * norms[at] - 2 * second).clamp(min=0).sqrt()
        return at, x, labels

    def end_pass(self, changed):
        """So many rows changed."""
        self.few_change = changed < .05 * self.labels.numel()
        if self.bounded:
            self.trial = self.looked_at > .7 * self.bounded
            if self.trial:
                self.own, self.wait, self.pause = None, self.pause, 2 * self.pause


# --- processes --------------------------------------------------------------------------------------------

def rank_and_world():
    """(rank, world size) of the running process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def print0(*words):
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


def track(items, what, total, unit, size=lambda item: 1):
    """Yields the items and says how far it is: a bar on a terminal, elsewhere a line a minute; on rank 0."""
    rank, world = rank_and_world()
    bar = tqdm(total=total, desc=what, unit=f" {unit}", leave=False, disable=rank != 0 or not sys.stderr.isatty())
    started = said = time.time()
    done = 0
    for item in items:
        yield item
        done += size(item)
        bar.update(size(item))
        if rank == 0 and bar.disable and time.time() > said + 60:
            said = time.time()
            rate = done / (said - started)
            all_rate = rate * world if unit == "images" else rate  # the processes share images, not passes
            minutes = (total - done) / rate / 60
            print0(f"{what}: {done / total:.0%}, {all_rate:.3g} {unit}/s, {minutes:.0f} minutes left")
    bar.close()


@contextlib.contextmanager
def first_on_machine():
    """The first process of a machine goes through the block first; the others find what it left."""
    follows = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if follows:
        barrier()
    try:
        yield
    finally:
        if not follows:
            barrier()


def wait_for(path, seconds=60):
    """Is `path` there? A network disk may show another machine's file late: it is asked for a minute."""
    for _ in range(seconds if rank_and_world()[1] > 1 else 1):
        with contextlib.suppress(OSError):
            os.listdir(os.path.dirname(path) or ".")  # a fresh answer, none remembered
        if os.path.exists(path):
            return True
        time.sleep(1)
    return False


def barrier():
    if rank_and_world()[1] > 1:
        dist.barrier()


def all_reduce(*tensors):
    """Sum each tensor over all processes, in place."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def all_gather(tensor, dim=-1):
    """The tensors of all processes, side by side in dimension `dim`; by default the last."""
    if rank_and_world()[1] == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(rank_and_world()[1])]
    dist.all_gather(parts, tensor)
    return torch.cat(parts, dim)


def setup(device=None):
    """(rank, world, torch.device): joins torchrun's processes, by NCCL on CUDA, by gloo on the CPU."""
    rank, world, local = (int(os.environ.get(key, default))
                          for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:              # an unknown name, or not on this machine
        raise ValueError(f"--device {device}: {str(error)[:70].splitlines()[0]}") from None
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():            # said by each process that it strikes
            raise OSError(f"process {local} of this machine finds {torch.cuda.device_count()} GPUs: --nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward with a mask is wrong for some shapes
    if world > 1 and not dist.is_initialized():
        # Others wait while the first process of a machine downloads, or lists a million files.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world, device


@contextlib.contextmanager
def catch_signals():
    """Yields a function: what does any process want? 2: to stop, it got SIGTERM or SIGINT; 1: to save, as it is
    `late`; 0: neither. All get the same answer in the same step."""
    received, asked, calls, wait = torch.zeros(1), time.time(), 0, 1
    # A side group on the CPU: to ask through NCCL would wait for the GPU in every step.
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def ask_all(late=False):
        nonlocal asked, calls, wait
        calls += 1
        own = max(received.item(), float(late))
        if group is None or calls % wait:
            return own if group is None else 0
        # Many processes do not ask in every step, but about once a second, all in the same steps.
        flags = torch.tensor([own, (time.time() - asked) / wait])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group)
        asked, calls, wait = time.time(), 0, max(1, min(100, int(1 / flags[1].item())))
        return flags[0].item()
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.signal(number, lambda *_: received.fill_(2)) for number in numbers]
    try:
        yield ask_all
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


# --- reading rows: a tensor, an array or memory map, or a function that starts a stream -------------------

class Rows:
    """The rows to cluster; iterating yields them as blocks (m, d) on `device`, in order, as they are stored.

    x   (n, d): tensor, array or memory map; or a function without arguments that yields (m, d) chunks
    uint8 pixels stay 1 byte: what is clustered is scale x + shift, see `pixel_scale`, and `score_weights` moves
    both into the centroids. Only cosine needs it, and unit rows, at once.
    """

    def __init__(self, x, k, metric="euclidean", mean=None, std=None, device=None, rows=None):
        self.parts = x if callable(x) else lambda: [x]
        first = next(iter(self.parts()), None)
        if first is None or first.ndim != 2 or 0 in first.shape:
            found = "an empty stream" if first is None else f"an array of shape {tuple(first.shape)}"
            raise ValueError(f"K-means takes rows (n, d), n and d > 0, not {found}")
        self.shape, self.d = tuple(first.shape), first.shape[1]
        resident = torch.is_tensor(first) and first.is_cuda
        self.device = first.device if resident else torch.empty(0, device=device).device    # cuda -> cuda:0
        # A block's scores, k a row, should fit a cache. Triton's kernels keep none: large blocks hide launches.
        cuda = self.device.type == "cuda"
        most = (1 << 28) // self.d if cuda and use_triton(self.device) else (1 << 23) // k
        self.rows = rows or max(256, min(1 << 19 if cuda else 8192, most))
        unchanged = torch.ones(self.d, dtype=torch.float64), torch.zeros(self.d, dtype=torch.float64)
        is_uint8 = str(first.dtype).endswith("uint8")           # torch.uint8, or numpy's
        scale = pixel_scale(self.d, mean, std) if is_uint8 else unchanged
        self.before_unit = [v.to(self.device).float() for v in scale] if metric == "cosine" else None
        self.scale, self.shift = (v.to(self.device) for v in (unchanged if metric == "cosine" else scale))
        self.rounds = metric != "cosine" and use_triton(self.device) and one_product(is_uint8, self.d, k)

    def __iter__(self):
        for part in self.parts():
            if part.ndim != 2 or part.shape[1] != self.d:
                raise ValueError(f"the stream began with {self.shape} and goes on with {tuple(part.shape)}")
            for start in range(0, len(part), self.rows):
                block = part[start:start + self.rows]
                if not torch.is_tensor(block):
                    block = torch.from_numpy(np.array(block))   # a copy: memory maps may be read-only
                if block.dtype not in (torch.uint8, torch.float16, torch.bfloat16):
                    block = block.float()                       # the kernels know no float64, no int64
                block = to_device(block, self.device)
                yield to_unit(block, self.before_unit)

    def round(self, c):
        """Centroids (r, k, d), less an origin, as they are multiplied: see `find_nearest_fused`."""
        if not self.rounds:
            return c
        high, _, unit = split_half(c * self.scale)
        return high * unit / self.scale

    def standardize(self, block):
        """What is clustered, in float32."""
        return block.float() * self.scale.float() + self.shift.float()

    def gather(self, index, start):
        """Values (s, d) of the rows index (s,) of all processes; ours begin at row `start`."""
        out = torch.zeros(len(index), self.d, device=self.device)
        for block in self:
            inside = (index >= start) & (index < start + len(block))
            out[inside.to(out.device)] = self.standardize(block[(index[inside] - start).to(block.device)])
            start += len(block)
        all_reduce(out)
        return out


def to_unit(block, before_unit):
    """Rows (m, d), for cosine as float32 of length 1; before_unit: scale, shift (d,) before that, or None."""
    if before_unit is None:
        return block
    scale, shift = before_unit
    return F.normalize(block.float() * scale + shift, dim=-1)


def pixel_scale(d, mean, std):
    """scale, shift (d,) float64: scale x + shift = (x / 255 - mean) / std, uint8 rows x in patchify's order.

    mean, std: of 3 channels, on the scale 0..1; in a row the channel runs fastest.
    """
    mean, std = (torch.tensor(v, dtype=torch.float64).expand(3) for v in (mean or 0., std or 1.))
    if d % 3 and (mean.unique().numel() > 1 or std.unique().numel() > 1):
        raise ValueError(f"rows of {d} uint8 values are not pixels of 3 channels: mean and std do not fit")
    return tuple(v.repeat(-(-d // 3))[:d] for v in (1 / (255 * std), -mean / std))


def multiply(x, w, bias):
    """Scores (m, r k) of rows (m, d) by w (r, k, d), bias (r, k); on the CPU a 1x1 convolution: by oneDNN.

    On AMD's CPUs that is twice as fast as MKL's product.
    """
    x, w, bias = x.float(), w.flatten(0, 1), bias.flatten()
    if x.is_cuda or not torch.backends.mkldnn.is_available():
        return F.linear(x, w, bias)
    image = x[None, :, None].permute(0, 3, 1, 2)  # (1, d, m, 1): channels last, as the rows lie
    return F.conv2d(image, w[:, :, None, None], bias)[0, :, :, 0].T


# --- the same two steps on CUDA: no score reaches memory, no two programs add to the same number ----------

def use_triton(device):
    """On GPUs from Ampere on (older ones cannot hold the kernel's tiles), and in Triton's interpreter."""
    if triton is None:
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return os.environ.get("TRITON_INTERPRET") == "1"


def one_product(is_uint8, d, k):
    """Whether float16 rows and weights are multiplied once, not twice: wide rows of pixels, few codes."""
    return is_uint8 and d >= 256 and k <= 128


if triton is not None:
    @triton.jit
    def nearest_kernel(x, w, rest, bias, labels, scores, m, k, d, center, shrink, unit,
                       HALF: tl.constexpr, TWICE: tl.constexpr,
                       ROWS: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr):
        """One program: ROWS rows against all codes of a codebook, CODES at a time; scores stay in registers."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        book = tl.program_id(1).to(tl.int64)
        x_row = x + row[:, None] * d
        best = tl.full((ROWS,), float("-inf"), tl.float32)
        label = tl.zeros((ROWS,), tl.int32)
        for first in range(0, k, CODES):
            code = first + tl.arange(0, CODES)
            w_row = (book * k + code[None, :]) * d
            dot = tl.zeros((ROWS, CODES), tl.float32)
            for at in range(0, d, WIDTH):
                column = at + tl.arange(0, WIDTH)
                seen = (row[:, None] < m) & (column[None, :] < d)
                xs = tl.load(x_row + column[None, :], seen, 0).to(tl.float32)
                at_w, seen_w = w_row + column[:, None], (code[None, :] < k) & (column[:, None] < d)
                if HALF:
                    xs = ((xs - center) * tl.load(shrink)).to(tl.float16)
                dot = tl.dot(xs, tl.load(w + at_w, seen_w, 0), dot, input_precision="tf32x3")     # if float32
                if TWICE:
                    dot = tl.dot(xs, tl.load(rest + at_w, seen_w, 0), dot)
            score = dot * tl.load(unit) + tl.load(bias + book * k + code, code < k, float("-inf"))[None, :]
            top, arg = tl.max(score, 1, return_indices=True)
            label = tl.where(top > best, first + arg, label)
            best = tl.maximum(top, best)
        tl.store(labels + book * m + row, label, row < m)
        tl.store(scores + book * m + row, best, row < m)


def tile(size, most):
    return min(most, max(16, triton.next_power_of_2(size)))     # 16 is the least that a matrix unit takes


def power_of_two(x):
    """The greatest one that is at most max |x|, (1,) float32; nothing is read back: no GPU is waited for."""
    largest = torch.linalg.vector_norm(x.flatten(), math.inf).float().clamp(min=1e-30).view(1)
    return largest / (2 * torch.frexp(largest).mantissa)


def split_half(w):
    """w = unit (high + low), both float16, 22 bits in all; unit (1,), a power of two, for any range."""
    unit = power_of_two(w)
    high = (w / unit).half()
    return high, (w / unit - high).half(), unit


def find_nearest_fused(x, w, bias):
    """`find_nearest` without a matrix of scores: float16 products of 8 and 16 bits, tf32 x 3 of float32.

    uint8 - 128 is exact in float16, and so are bfloat16's 8 bits once a power of two has moved them into
    range; w is split in two, and nothing is lost. Pixels and few codes, where a second product would take
    longer than reading the rows, have one: `Rows.round` leaves 11 bits of the centroids before their bias is
    made. (With the true ones' bias errors grow with the distance to the origin, not to the centroid.)
    """
    (r, k, d), m = w.shape, len(x)
    x, w, half, center = x.contiguous(), w.contiguous(), x.dtype != torch.float32, 0.
    rest, twice = w, half and not one_product(x.dtype == torch.uint8, d, k)
    shrink = unit = torch.ones(1, device=x.device)
    if half:
        if x.dtype == torch.uint8:
            center, bias = 128., bias + 128 * w.sum(-1)         # x.w = (x - 128).w + 128 sum(w)
        elif x.dtype == torch.bfloat16:
            shrink = 1 / power_of_two(x)
        w, rest, unit = split_half(w)
    labels = torch.empty(r, m, dtype=torch.int32, device=x.device)
    scores = torch.empty(r, m, device=x.device)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():  # Triton's is the current
        nearest_kernel[triton.cdiv(m, 128), r](
            x, w, rest, bias.contiguous(), labels, scores, m, k, d, center, shrink, unit / shrink,
            half, twice, 128, tile(k, 128), tile(d, 64 if half else 32),
            num_warps=8, num_stages=2 if twice else 3)          # in 100 KB of shared memory
    return labels.long(), scores


def add_rows(sums, labels, x, sign):
    """Add sign times rows x (m, d) to sums (k, d), by labels (m,); on CUDA without atomics: two runs agree."""
    k = len(sums)
    if not x.is_cuda:
        sums.index_add_(0, labels, x.float(), alpha=sign)
    elif k <= 257 and x.dtype != torch.float32:                    # one-hot(labels)^T x
        kind = torch.float16 if x.dtype == torch.uint8 else x.dtype
        hot = labels == torch.arange(k, device=x.device)[:, None]
        sums += sign * torch.mm(hot.to(kind), x.to(kind), out_dtype=torch.float32)
    else:
        ordered, lengths = x[labels.argsort(stable=True)].float(), torch.bincount(labels, minlength=k)
        sums += sign * torch.segment_reduce(ordered, "sum", lengths=lengths, axis=0, initial=0)


# --- from a data set to tokenizer.pt and tokens.npy -------------------------------------------------------

def outlive_signals(_):
    """For loading processes: Ctrl-C and SIGTERM reach them, too, but the main process decides when to stop.

    Ten seconds after SIGTERM, with which Python also ends them at its exit, they go.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


def make_loader(ds, batches, workers=0, device="cpu"):
    """DataLoader over `batches`, lists of the keys of `ds`, in that order."""
    return DataLoader(ds, batch_sampler=batches, num_workers=workers, worker_init_fn=outlive_signals,
                      pin_memory=torch.device(device).type == "cuda")


def load_batches(ds, indices, batch_size, workers=0, device="cpu", what=None):
    """(images uint8 (b, 3, S, S) on device, labels (b,), index really read (b,)), in the order of `indices`.

    what: a name for this pass, to say how far it is.
    """
    indices = torch.as_tensor(indices).split(batch_size)
    loader = make_loader(ds, [part.tolist() for part in indices], workers, device)
    batches = zip(indices, loader)
    if what:
        batches = track(batches, f"{what} of {ds.name}", sum(map(len, indices)), "images", lambda batch: len(batch[0]))
    for wanted, (images, labels, read) in batches:
        if hasattr(ds, "note_unreadable"):                    # a neighbor may stand in for a damaged picture
            ds.note_unreadable(wanted, read)
        yield images.to(device, non_blocking=True), labels, read


def derive_seed(*numbers):
    """One seed from several, as different from its neighbors' as a random number."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def identify(ds):
    """The number of images and a checksum of their names and labels: what work that goes on must agree on."""
    found = 0
    for part in (getattr(ds, "names", None), getattr(ds, "labels", None)):
        if part is not None:
            found = zlib.crc32(np.ascontiguousarray(part).view(np.uint8), found)
    return f"{len(ds)} ({found:08x})"


def stream_patches(tokenizer, ds, keep, images, seed, batch_size, workers, device):
    """(function that starts a stream of this process's rows, their number): `keep` patches of each image.

    So many images, in a seeded order: sorted by class, as folders are, they would seed k-means++ with one
    class (as ClusterMIM's code does). Which patches are kept depends on (seed, image) alone.
    """
    rank, world = rank_and_world()
    order = torch.randperm(len(ds), generator=torch.Generator().manual_seed(seed))[:images]
    mine = order[rank * images // world:(rank + 1) * images // world]

    def choose(image, n):
        return torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(seed, image)))[:keep]

    def stream():
        batches = load_batches(ds, mine, batch_size, workers, device, "patches")
        for picked, (images, _, _) in zip(mine.split(batch_size), batches):
            x = tokenizer.rows(images)
            if keep < x.shape[1]:
                kept = torch.stack([choose(image, x.shape[1]) for image in picked.tolist()])
                x = gather_patches(x, kept.to(device))
            yield x.flatten(0, 1)
    return stream, len(mine) * keep


def available_memory(device):
    """Bytes that one process may fill: 80 % of what CUDA has free, or its share of half the RAM."""
    if device.type == "cuda":
        return .8 * torch.cuda.mem_get_info(device)[0]
    memory = 1 << 34                                           # on Windows nothing says it
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return .5 * memory / rank_and_world()[1]


def blank_tokenizer(ds, features, patch_size, image_size=None, k=1, metric="euclidean"):
    """A tokenizer before its fit: it knows the features of the images of `ds` (`rows`), but no centroids."""
    known = {"clip": CLIP, "vqkd": SYMMETRIC, **dict.fromkeys(ENCODERS, IMAGENET)}
    mean, std = known.get(features, (ds.mean, ds.std))
    return KMeansTokenizer(features, torch.zeros(k, 1), metric, patch_size, image_size or ds.image_size, mean, std)


def fit_tokenizer(ds, features="pixel", k=64, metric="euclidean", patch_size=16, image_size=None, fraction=None,
                  init=None, max_iter=None, tol=1e-4, restarts=None, seed=0, batch_size=64, workers=0, device="cpu",
                  images=None):
    """K-means on the patches of `ds`: a KMeansTokenizer, equal on every process; its .kmeans is the KMeans.

    fraction   of each image's patches, at least one; default: all of them
    images     so many, a seeded sample; default: enough for 256 patches a code, at least 20,000
    Defaults for clip are k-CLIP's (MaPeT Sec. 4.2 and its code): 5 % of the patches, random seeds, 20 iterations,
    the best of 5; otherwise k-means++, 100 iterations, one start.
    The rows are computed once and kept (pixels: 1 byte a value, others float16 on CUDA) if they fit into memory,
    otherwise they are streamed from the images in every pass.
    """
    clip, device = features == "clip", torch.device(device)
    init, max_iter = init or ("random" if clip else "k-means++"), max_iter or (20 if clip else 100)
    restarts, fraction = restarts or (5 if clip else 1), fraction or (.05 if clip else 1.)
    if fraction > 1:
        raise ValueError(f"fraction is a share of an image's patches, above 0 and at most 1, not {fraction}")
    tokenizer = blank_tokenizer(ds, features, patch_size, image_size, k, metric).to(device)
    tokenizer.made = dict(seed=seed, fraction=fraction, fit_images=images, images=identify(ds))
    keep = max(1, round(fraction * tokenizer.n_patches))
    images = min(len(ds), images or max(20000, -(-256 * k // keep)))
    if images < rank_and_world()[1]:
        raise ValueError(f"{images} images to fit on (--fit-images) are fewer than the processes")
    stream, n = stream_patches(tokenizer, ds, keep, images, seed, batch_size, workers, device)
    first = next(stream())
    kind = torch.float16 if device.type == "cuda" and first.dtype == torch.float32 else first.dtype
    data = stream
    states = 48 * restarts * k * first.shape[1]                # float64 sums, their copies, the centroids
    if n * first.shape[1] * kind.itemsize + states < available_memory(device):
        data, at = torch.empty(n, first.shape[1], dtype=kind, device=device), 0
        for x in stream():
            data[at:at + len(x)] = x
            at += len(x)
    kmeans = KMeans(k, metric, init, max_iter, tol, seed, restarts, tokenizer.mean, tokenizer.std, device)
    tokenizer.kmeans = kmeans.fit(data)
    tokenizer.centroids = kmeans.centroids
    return tokenizer


def select_vqkd(state, path):
    """KMeansTokenizer's arguments for the official weights of BEiT v2's VQ-KD: its codes are centroids."""
    weights = {f"encoder.{key}": value for key, value in select_vit(state, path).items()}
    weights |= {key.replace("encode_task_layer.", "project."): value for key, value in state.items()
                if key.startswith("encode_task_layer.")}
    p, n = weights["encoder.patch_embed.proj.weight"].shape[-1], weights["encoder.pos_embed"].shape[1] - 1
    codes, (mean, std) = state["quantize.embedding.weight"], SYMMETRIC
    return dict(features="vqkd", centroids=codes, metric="cosine", patch_size=p, image_size=p * math.isqrt(n),
                mean=mean, std=std, encoder=weights, vocab_size=len(codes))


def load_tokenizer(path):
    """What `save` wrote, or VQ-KD (a file, or "vqkd": fetched); ValueError, one line, for anything else."""
    path = download(**PUBLIC[path]) if path == "vqkd" else path
    state = read_checkpoint(path)
    try:
        if "quantize.embedding.weight" in state.get("model", ()):
            state = select_vqkd(state["model"], path)
        if state.pop("vocab_size") != len(state["centroids"]):
            raise ValueError("vocab_size is not the number of centroids")
        return KMeansTokenizer(**state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a tokenizer of kmeans.py fit ({str(error).splitlines()[0]})") from None


def load_tokens(path):
    """tokens.npy as a read-only memory map (images, n) uint16; ValueError, one line, for any other file."""
    try:
        tokens = np.lib.format.open_memmap(path, "r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a token file ({str(error).splitlines()[0]})") from None
    if tokens.dtype != np.uint16 or tokens.ndim != 2:
        raise ValueError(f"{path}: not a token file: that is uint16 (images, n)")
    return tokens


def write_rows(path, shape, rows):
    """A .npy file of rows, arrays of one type that follow each other, atomically.

    Written as bytes: np.save does not notice when its last ones do not fit on the disk.
    """
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        for i, row in enumerate(rows):
            if i == 0:
                header = np.lib.format.header_data_from_array_1_0(np.broadcast_to(row.flat[0], shape))
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(row))


def tokenize(tokenizer, ds, path, batch_size=64, workers=0, device="cpu"):
    """Tokens of all images in the data set's own order: writes `path`, a memory map (images, n) uint16.

    The processes share the work in pieces of SHARD images, each a file in a folder beside `path`: a killed run is
    taken up at the pieces that are missing, by any number of processes; the first one puts them together.
    """
    (rank, world), tokenizer, n = rank_and_world(), tokenizer.to(device), tokenizer.n_patches
    if tokenizer.vocab_size > MOST_CODES:
        raise ValueError(f"tokens have 16 bits: {tokenizer.vocab_size} centroids are more than {MOST_CODES}")
    if os.path.exists(path):
        tokens, few = load_tokens(path), sorted({0, len(ds) // 2, len(ds) - 1})
        images, _, _ = next(load_batches(ds, few, len(few), device=device))
        if tokens.shape == (len(ds), n):
            if (tokenizer(images).cpu().numpy() == tokens[few]).mean() >= .9:  # hardware may break a near-tie
                return tokens
        raise ValueError(f"{path} is of another tokenizer or of other images than {ds.name}: "
                         "remove it or choose another folder")
    made_of = f"{ds.name} {identify(ds)} {tokenizer.features}".encode() + tokenizer.centroids.cpu().numpy().tobytes()
    folder = f"{path}.{hashlib.sha256(made_of).hexdigest()[:8]}"            # of no other tokenizer or images
    os.makedirs(folder, exist_ok=True)
    shards = {f"{start:09}.npy": range(start, min(start + SHARD, len(ds))) for start in range(0, len(ds), SHARD)}
    there = set(os.listdir(folder))
    barrier()                                                      # nobody writes before everybody has looked
    mine = [name for name in shards if name not in there][rank::world]
    batches = load_batches(ds, [i for name in mine for i in shards[name]], batch_size, workers, device, "tokens")
    rows = (row for images, _, _ in batches for row in tokenizer(images).cpu().numpy().astype(np.uint16))
    for name in mine:
        write_rows(os.path.join(folder, name), (len(shards[name]), n), itertools.islice(rows, len(shards[name])))
    barrier()
    if rank == 0:
        parts = [load_tokens(os.path.join(folder, name)) for name in shards]
        write_rows(path, (len(ds), n), parts)
        del parts                                              # a network disk keeps files that are mapped
        shutil.rmtree(folder, ignore_errors=True)
    barrier()
    wait_for(path)
    return load_tokens(path)


# --- pictures ---------------------------------------------------------------------------------------------

def rebuild_images(tokenizer, tokens):
    """Tokens (b, n) of raw pixels -> [images (b, 3, S, S) in 0..1, patches as centroids]; [] for others."""
    if tokenizer.features != "pixel" or tokenizer.metric != "euclidean":
        return []
    c = tokenizer.centroids.cpu()
    scale, shift = pixel_scale(c.shape[1], tokenizer.mean, tokenizer.std)
    pixels = ((c - shift) / scale / 255).float()
    return [unpatchify(pixels[tokens], tokenizer.patch_size).clamp(0, 1)]


def draw_codebook(tokenizer, ds, path, rows=16, columns=12, images=400):
    """PNG: a row for each of the most used codes: its centroid (pixels only), then the nearest patches."""
    few = range(0, len(ds), max(1, len(ds) // images))
    p = tokenizer.patch_size * tokenizer.input_size // tokenizer.image_size       # CLIP sees twice the pixels
    found = [(patchify(x, p), *tokenizer.assign(x)) for x, _, _ in load_batches(ds, few, 64)]
    patches, labels, distances = (torch.cat(parts).flatten(0, 1) for parts in zip(*found))
    lines = []
    for code in labels.bincount(minlength=tokenizer.vocab_size).argsort(descending=True)[:rows]:
        own = (labels == code).nonzero()[:, 0]
        own = own[distances[own].argsort()[:columns]]
        line = unpatchify(patches[own][:, None] / 255, p)
        line = F.pad(line, (0, 0, 0, 0, 0, 0, 0, columns - len(own)), value=1.)
        lines.append(torch.cat([*rebuild_images(tokenizer, code.view(1, 1)), line]))
    draw_grid(lines, path, times=max(1, 32 // p))                       # small patches are enlarged


def draw_tokens(tokenizer, ds, path, images=6):
    """PNG: images; under each its token map, one color a token; of raw pixels also what its tokens make."""
    x, _, _ = next(load_batches(ds, range(0, len(ds), max(1, len(ds) // images)), images))
    tokens = tokenizer(x)
    colors = torch.rand(tokenizer.vocab_size, 3, generator=torch.Generator().manual_seed(0))
    maps = rearrange(colors[tokens], "b (y x) c -> b c y x", y=tokenizer.image_size // tokenizer.patch_size)
    draw_grid([x / 255, F.interpolate(maps, x.shape[-2:]), *rebuild_images(tokenizer, tokens)], path)


# --- commands ---------------------------------------------------------------------------------------------

def measure_seconds(*calls):
    """Least seconds of each call, device work included; they take turns, so that noise strikes all alike."""
    def finish(call):
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    rounds = [[timeit.timeit(lambda: finish(call), number=1) for call in calls] for _ in range(8)]
    return np.min(rounds, 0)                            # the first round, which compiles, is never the least


def read_peak_memory():
    """Of this process, in bytes: Linux counts in kB, macOS in bytes."""
    import resource                                             # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 << 10 if sys.platform == "linux" else 1)


def bench_cpu(n, d, ks):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    before = read_peak_memory()
    KMeans(max(ks), max_iter=2).fit(x)
    print0("CUDA: not run (no GPU, or --device cpu)")
    more = (read_peak_memory() - before) / 2 ** 20
    print0(f"peak memory of a fit beyond the data, n = {n}, d = {d}, K = {max(ks)}: {more:.0f} MB")
    print0(f"{'K':>6} {'product ms':>10} {'iteration ms':>12} {'ratio':>6}")
    for k in ks:
        c, data, origin = x[:k].clone(), Rows(x, k), x.mean(0).double()
        first = lambda: Clusters(data, 1, k, n, origin).run_pass(c[None])
        product, iteration = 1e3 * measure_seconds(lambda: x @ c.T, first)
        print0(f"{k:>6} {product:>10.0f} {iteration:>12.0f} {iteration / product:>6.2f}")


def bench_cuda(device):
    a = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    bandwidth = 2 * a.numel() / measure_seconds(lambda: b.copy_(a))[0]
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192 ** 3 / measure_seconds(lambda: a @ b)[0]
    print0(f"copy {bandwidth / 1e12:.2f} TB/s read + written, bfloat16 product {rate / 1e12:.0f} TFLOP/s")
    for n, d, k, kind in ((24_800_000, 768, 100, torch.uint8), (4_200_000, 1024, 8192, torch.bfloat16)):
        x = torch.empty(n, d, dtype=kind, device=device)
        for part in x.split(1 << 18):
            part.random_(256) if kind == torch.uint8 else part.normal_()
        data = Rows(x, k)
        c = data.standardize(x[:k])[None]
        clusters = Clusters(data, 1, k, n, c[0].double().mean(0))
        clusters.run_pass(c)  # the first adds all rows, later ones what changes
        t = measure_seconds(lambda: clusters.run_pass(c))[0]
        print0(f"n = {n}, d = {d}, K = {k}, {kind}: {t:.4f} s an iteration: "
               f"the data at {x.nbytes / t / bandwidth:.0%} of the copy bandwidth, "
               f"products at {2 * n * d * k / t / rate:.0%} of the bfloat16 rate")
        del x, data, clusters


def parse(argv, check_numbers):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="kmeans.py")
    commands = parser.add_subparsers(dest="command", required=True)
    fit, tokens, show, bench = (commands.add_parser(name, help=line, description=line) for name, line in (
        ("fit", "patches -> OUT/tokenizer.pt"), ("tokenize", "images -> OUT/tokens.npy; goes on after a kill"),
        ("show", "OUT/codebook.png, OUT/tokens.png"), ("bench", "time of a Lloyd iteration over the product's")))
    for add in (fit.add_argument, tokens.add_argument, show.add_argument, bench.add_argument):
        add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    for add in (fit.add_argument, tokens.add_argument, show.add_argument):
        add("--data", default="textures", help="textures, a torchvision name or a folder")
        add("--classes", help="file of class folders to keep, e.g. ImageNet-100's")
        add("--out", help="folder for what is written (runs/tokenizer-DATA-FEATURES-kK; the tokenizer's)")
        add("--batch-size", type=int, default=64, help="images a process at a time (%(default)s)")
        add("--workers", type=int, default=0, help="loading processes (%(default)s)")
    for add in (tokens.add_argument, show.add_argument):
        add("--tokenizer", required=True, help="tokenizer.pt of kmeans.py fit or train.py")
        add("--split", default="train", choices=["train", "test"], help="test: tokens-test.npy")
    add = fit.add_argument
    add("--image-size", type=int, help="pixels a side (textures 48, otherwise 224)")
    add("--patch-size", type=int, help="pixels a side (textures 8, otherwise 16)")
    add("--features", default="pixel", help="pixel, pixel-norm, hog, dino, deit, mae, clip, a ViT file")
    add("--k", "--vocab-size", type=int, help="codebook size (textures 64; others pixel 50, features 100)")
    add("--metric", default="euclidean", choices=["euclidean", "cosine"])
    add("--init", choices=["k-means++", "random"], help="of the centroids (default: k-means++; clip random)")
    add("--max-iter", type=int, help="passes over the patches (100; clip 20)")
    add("--tol", type=float, default=1e-4, help="movement that counts as none (%(default)s)")
    add("--restarts", type=int, help="seedings, of which the best is kept (1; clip 5)")
    add("--fraction", type=float, help="share of each image's patches that is used (1; clip .05)")
    add("--fit-images", type=int, help="so many random images (enough for 256 patches a code, 20,000)")
    add("--seed", type=int, default=0, help="of the patches and the first centroids (%(default)s)")
    show.add_argument("--rows", type=int, default=16, help="codes to draw, the most used ones (%(default)s)")
    show.add_argument("--images", type=int, default=400, help="images to look for patches in (%(default)s)")
    bench.add_argument("--n", type=int, default=100_000, help="rows, CPU only (%(default)s)")
    bench.add_argument("--d", type=int, default=768, help="their width, CPU only (%(default)s)")
    bench.add_argument("--k", type=int, nargs="+", default=[50, 100, 1000], help="codebook sizes, CPU only")
    args = parser.parse_args(argv)
    check_numbers(parser, args, {"workers", "seed", "tol"})
    return args


def name_folder(args, k):
    """runs/tokenizer-DATA-FEATURES-kK, and what else was asked for: no two tokenizers meet in one folder."""
    parts = ["tokenizer", os.path.basename(os.path.normpath(args.data)), args.features, f"k{k}"]
    usual = dict(metric="euclidean", tol=1e-4, seed=0)
    for key in ("metric init max_iter tol restarts fraction fit_images image_size patch_size seed "
                "classes").split():
        if (value := getattr(args, key)) not in (None, usual.get(key)):
            parts.append(f"{key.replace('_', '')}{value}")
    return os.path.join("runs", re.sub(r"[^\w.-]+", "_", "-".join(parts)))


def run_fit(args, ds, k, p, size, device):
    started, path = time.perf_counter(), os.path.join(args.out, "tokenizer.pt")
    tokenizer = fit_tokenizer(
        ds, args.features, k, args.metric, p, size, args.fraction, args.init, args.max_iter, args.tol,
        args.restarts, args.seed, args.batch_size, args.workers, device, args.fit_images)
    found, n = tokenizer.kmeans, int(tokenizer.kmeans.counts.sum())
    share = found.counts / n
    print0(f"{n} patches, K = {k}: {found.n_iter} iterations, {time.perf_counter() - started:.1f} s, "
           f"squared distance a patch {found.history[0] / n:.4g} -> {found.inertia / n:.4g}")
    print0(f"{(share > 0).sum()} of {k} codes used, perplexity {torch.special.entr(share).sum().exp():.1f}, "
           f"shares {share.min():.2%} to {share.max():.2%}")
    if rank_and_world()[0] == 0:
        verb = "replaced" if os.path.exists(path) else "wrote"     # tokens.npy of the old one will be refused
        tokenizer.save(path)
        print0(f"{verb} {path}")


def main(argv=None):
    from train import check_numbers, open_dataset                  # the only import against the table's order
    args = parse(argv, check_numbers)
    with exit_on_error("kmeans.py"):
        rank, _, device = setup(args.device)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device {args.device}: K-means adds up in float64, on cpu or cuda")
        if args.command == "bench":
            return bench_cuda(device) if device.type == "cuda" else bench_cpu(args.n, args.d, args.k)
        if args.command == "fit":
            textures = args.data == "textures"
            size, p = args.image_size or (48 if textures else 224), args.patch_size or (8 if textures else 16)
            k = args.k or (64 if textures else 50 if args.features == "pixel" else 100)
            args.out = args.out or name_folder(args, k)
            split, side = "train", size * (2 if args.features == "clip" else 1)  # CLIP sees twice the pixels
        else:
            tokenizer = load_tokenizer(args.tokenizer)
            args.out = args.out or os.path.dirname(args.tokenizer) or "."
            split, side = args.split, tokenizer.input_size
        path = lambda name: os.path.join(args.out, name)
        os.makedirs(args.out, exist_ok=True)
        if not os.access(args.out, os.W_OK):  # before the work: it must not be for nothing
            raise ValueError(f"--out {args.out}: this folder cannot be written, choose another")
        ds = open_dataset(args.data, split, side, classes=args.classes)
        if ds is None:
            raise ValueError(f"--data {args.data}: no folder for --split {split} (val or test) in it")
        if args.command == "fit":
            run_fit(args, ds, k, p, size, device)
        elif args.command == "tokenize":
            file = path("tokens.npy" if split == "train" else "tokens-test.npy")
            tokens = tokenize(tokenizer, ds, file, args.batch_size, args.workers, device)
            print0(f"{file}: {tokens.shape[0]} images x {tokens.shape[1]} tokens of {tokenizer.vocab_size}")
        elif rank == 0:
            draw_codebook(tokenizer, ds, path("codebook.png"), args.rows, images=args.images)
            draw_tokens(tokenizer, ds, path("tokens.png"))
            print0(f"wrote {path('codebook.png')} and {path('tokens.png')}")


if __name__ == "__main__":
    main()
