"""TCAS, a score of tokenizers that needs no training, and its theory (ClusterMIM, arXiv:2407.09087, Sec. 2 and 3).

    R[k, c] = patches with token k in images of class c     R' = R with rows of norm 1     C = R' R'^T        (Sec. 3.1)
    TCAS    = 1/K sum_i (1 - C_ii)^2 + 1/K^2 sum_{i != j} C_ij^2         0 is best                            (Eq. 8)

Is each token of one class (first term), are two tokens of different classes (second)? The text divides rows by their
sum (norm "l1"); the published values fit rows of unit length only (norm "l2", the default), whose first term is zero.
In l2 a single token, or one token for several whole classes, scores 0 as well: compare tokenizers of equal K.

python tcas.py score --data textures --tokenizer a.pt b.pt   a table: labels < good tokenizers < random tokens; a minute
python tcas.py score --probes runs/*                         the tokenizers of finished runs, Pearson r, the fitted line
python tcas.py toy --n 10 --overlap 2 --classes 2            Sec. 2.2 by brute force and by algebra, seconds: class-wise
                                                             tokens have the least bound, in a window of c2/c1 only
python tcas.py toy --graph ring --n 12 --width 1             a sparse graph, where class-wise tokens win for any c1, c2
"""
import argparse
import functools
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import repeat
from torchvision.utils import save_image
from tqdm import tqdm

EPS = 1e-12                                         # two numbers of the toy model that are closer than this are equal
TOKENIZERS = ("mae", "classwise", "crossclass")     # Sec. 2.2: S^MAE, S^class, S^cross
LEGEND = """
w_in, w_x   mean edge weight of two points of one class only, of the same or of different classes
sum, alpha  of all squared eigenvalues, ||A||_F^2 (Eq. 17); labelling error, the edges between classes (Eq. 18)
tail        of the squared eigenvalues beyond the first one per class: what the theory behind the bound sums
linked      fraction of the pairs of one class that have an edge at all
bound       c1 sum + c2 alpha (Eq. 3) with c1 = {c1:g}, c2 = {c2:g}, less is better; bound_tail with tail for sum
"""
WHY = {"complete": """
Merging tokens cannot lower w_x nor raise an eigenvalue (p q / (p + q) is concave; A projects on the tokens): each
tokenizer trades spectrum for labelling error, of which MAE has the least. So the order of the bounds is a matter of
c2/c1. With 2 classes, class-wise < MAE needs c2/c1 < 2 (1 - r)(2 - r), r = overlap/n, Theorem 1 c2/c1 >= 4 - 2/n: no
constants make both true. Every tail is 0, as all points of a class are linked already: see --graph ring.""",
       "ring": """
Each point meets its neighbours only. Class-wise tokens cannot raise the mean weight inside a class, but link pairs that
MAE leaves apart: the tail falls to 0 and alpha stays 0, the least bound there is, for any c1 and c2. This is the sense
in which tokens "raise intra-class connectivity". A local tokenizer ("pairs", two neighbours) is in between."""}


# --- token-class alignment similarity (Sec. 3.1) -----------------------------------------------------------------

def cooccurrence(tokens, labels, k, c, distributed=False, chunk=1 << 22):
    """R[k, c], the number of patches with token k in images of class c: (k, c) int64 on the device of `tokens`.

    tokens (m, n) integers in 0..k-1, a row per image: a tensor, an array or a memory map; labels (m,) in 0..c-1, each
    patch has the class of its image. Reads `chunk` patches at a time, so ImageNet's 251 M fit; counts of parts add up.
    distributed=True: every rank of torch.distributed calls it, with its own images, and every rank gets the sum.
    ValueError when tokens, labels, k and c do not fit each other.
    """
    m, n = tokens.shape
    device = tokens.device if torch.is_tensor(tokens) else "cpu"
    labels = torch.as_tensor(labels, device=device).long()
    if len(labels) != m:
        raise ValueError(f"tokens of {m} images but {len(labels)} labels: they must be of the same data set")
    if m and not 0 <= labels.min() <= labels.max() < c:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, outside 0..{c - 1}: every image needs a class")
    counts = torch.zeros(k * c, dtype=torch.int64, device=device)
    step = max(1, chunk // n)
    for start in range(0, m, step):
        part = tokens[start:start + step]
        part = part.long() if torch.is_tensor(part) else torch.from_numpy(part.astype(np.int64))
        if not 0 <= part.min() <= part.max() < k:
            raise ValueError(f"tokens from {part.min()} to {part.max()}, outside 0..{k - 1}: not a codebook of {k}")
        pair = part * c + labels[start:start + step, None]
        counts += torch.bincount(pair.flatten(), minlength=k * c)
    if distributed:
        counts = counts.cuda() if dist.get_backend() == "nccl" else counts                 # NCCL sums on GPUs only
        dist.all_reduce(counts)
    return counts.view(k, c)


def tcas_terms(counts, norm="l2", weighted=False, chunk=2048):
    """Both terms of Eq. 8 and what one needs to read them: dict of tcas impurity confusion used dead perplexity.

    counts (k, c), see `cooccurrence`. Dead codes (no patch) are dropped: they have no class distribution. The paper's
    averages (1/K, 1/K^2) count every used code once, however rare; `weighted` counts it by its share of the patches.
    Too few patches look like alignment in l2: random tokens score about (p / (1 + p))^2 with p patches per (k, c) cell.
    Memory (c, c) + (chunk, c) float64, time O(k c^2): the (k, k) matrix C is never built.
    """
    if norm not in ("l2", "l1") or counts.ndim != 2 or counts.min() < 0:
        raise ValueError(f"TCAS takes counts (k, c) >= 0 and norm l2 or l1, not {tuple(counts.shape)} and {norm!r}")
    if (counts.sum(0) > 0).sum() < 2:
        raise ValueError("TCAS compares classes: patches of at least 2 classes are needed")
    mass = counts.sum(1).double()
    share = mass / mass.sum()                                      # of the patches, per token
    used = int((mass > 0).sum())
    weight = share if weighted else (mass > 0).double() / used
    gram, impurity, diagonal = 0, 0, 0
    for r, w in zip(counts.split(chunk), weight.split(chunk)):
        r = F.normalize(r.double(), p=2 if norm == "l2" else 1, dim=1)                   # R'; rows of dead codes stay 0
        c_ii = r.square().sum(1)
        impurity += w @ (1 - c_ii).square()                        # 1/K sum_i (1 - C_ii)^2
        diagonal += (w * c_ii).square().sum()
        gram = gram + r.T @ (w[:, None] * r)
    confusion = (gram.square().sum() - diagonal).clamp(min=0)      # sum_ij C_ij^2 = ||R'^T R'||_F^2, less i = j
    return {"tcas": float(impurity + confusion), "impurity": float(impurity), "confusion": float(confusion),
            "used": used, "dead": len(counts) - used, "perplexity": float(torch.special.entr(share).sum().exp())}


def tcas(counts, norm="l2", weighted=False):
    """Token-class alignment similarity (Eq. 8), a float, 0 is best. `tcas_terms` returns its two terms as well."""
    return tcas_terms(counts, norm, weighted)["tcas"]


def bag_accuracy(tokens, labels, k, c, held=None, epochs=20, batch=256, lr=.01, seed=0, device="cpu"):
    """Accuracy (0..1) of a linear softmax head on the histogram of an image's tokens: what a bag of tokens tells.

    tokens (m, n), labels (m,) fit the head and held = (tokens, labels) scores it, or else a random fifth of the images
    does. Such a head is a row of c logits per token, summed over the patches. Adam, learning rate falling to 0.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(tokens))
    if held is None:
        order, out = np.split(order, [len(order) * 4 // 5])
        held = tokens[out], labels[out]
    x, y, held_x, held_y = (torch.from_numpy(np.asarray(a, np.int64)).to(device) for a in (tokens, labels, *held))
    head, bias = nn.EmbeddingBag(k, c, mode="sum", device=device), nn.Parameter(torch.zeros(c, device=device))
    nn.init.zeros_(head.weight)                                    # the problem is convex: the start does not matter
    optimizer = torch.optim.Adam([head.weight, bias], lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, epochs * math.ceil(len(order) / batch))
    for _ in range(epochs):
        for i in torch.from_numpy(rng.permutation(order)).to(device).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(head(x[i]) + bias, y[i]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = [(head(part) + bias).argmax(1) == label for part, label in zip(held_x.split(4096), held_y.split(4096))]
    return torch.cat(right).double().mean().item()


def fit_line(x, y):
    """Least squares y = intercept + slope x -> (Pearson r, slope, intercept). The "r-value 0.85" of App. E is r^2."""
    if len(x) < 3 or np.std(x) < EPS or np.std(y) < EPS:
        raise ValueError(f"no line through {len(x)} runs: at least 3 are needed, of different TCAS and accuracy")
    slope, intercept = np.polyfit(x, y, 1)
    return float(np.corrcoef(x, y)[0, 1]), float(slope), float(intercept)


# --- the toy model (Sec. 2.2, App. B and C), brute force ---------------------------------------------------------

def populations(n, overlap, classes):
    """Classes of n points, any two share `overlap` -> groups [(classes they are in, number of points)], in order,
    and membership Z (points, classes) float64, 1 where the point is in the class."""
    own = n - (classes - 1) * overlap
    if classes < 2 or overlap < 0 or own < 1 or classes * n > 2000:
        raise ValueError(f"--classes {classes} --n {n} --overlap {overlap}: needs 2 classes, at most 2000 points, "
                         "and (classes - 1) * overlap < n, so that every class has points of its own")
    groups = [[((c,), own)] + [((c, other), overlap) for other in range(c + 1, classes)] for c in range(classes)]
    groups = [(owners, size) for group in groups for owners, size in group if size]
    return groups, torch.tensor([[float(c in owners) for c in range(classes)] for owners, size in groups
                                 for _ in range(size)], dtype=torch.float64)


def in_words(groups):
    return ", ".join(f"{size} of class {' and '.join(map(str, owners))}" for owners, size in groups)


def assignment(tokenizer, groups):
    """The token of every point, (points,) int64. `tokenizer` is a name, or a list in the order of `groups`."""
    points = [(owners, size, i) for owners, size in groups for i in range(size)]
    named = {"mae": range(len(points)),                                             # every point its own
             "classwise": [owners[i * len(owners) // size] for owners, size, i in points],  # overlaps: half to each
             "crossclass": [i % 2 for _, _, i in points],                           # two, each half of every group
             "pairs": [j - i % 2 for j, (_, _, i) in enumerate(points)]}            # neighbours, two by two
    if isinstance(tokenizer, str):
        if tokenizer not in named:
            raise ValueError(f"no tokenizer {tokenizer!r}: {', '.join(named)}, or a list of tokens")
        halved = {"classwise": 2, "crossclass": 1}.get(tokenizer, math.inf)         # groups of this many classes
        if any(size % 2 for owners, size in groups if len(owners) >= halved):
            raise ValueError(f"{tokenizer} tokens halve groups, here are {in_words(groups)}: change --n or --overlap")
        tokenizer = named[tokenizer]
    if len(tokenizer) != len(points):
        raise ValueError(f"{len(tokenizer)} tokens for {len(points)} points: give {in_words(groups)}, in this order")
    return torch.unique(torch.tensor(tokenizer), return_inverse=True)[1]


def mask_graph(z, graph="complete", width=1):
    """M(x1, x2) (points, points), the joint probability of visible and masked view: draw a class, a point of it, then a
    second point of it, which is any one ("complete", App. B) or at most `width` places away ("ring")."""
    mask = torch.zeros(len(z), len(z), dtype=torch.float64)
    for member in z.T:
        index = member.nonzero()[:, 0]
        n = len(index)
        step = (torch.arange(n)[:, None] - torch.arange(n)).abs()
        near = torch.minimum(step, n - step) <= (width if graph == "ring" else n)
        mask[index[:, None], index] += near / near.sum().double() / z.shape[1]
    return mask


def augmentation_graph(mask, tokens):
    """Tokenised mask graph M(x, S) (Eq. 4), augmentation graph A(x, x') (Sec. 2.1), A normalised (Eqs. 9, 16)."""
    to_token = mask @ F.one_hot(tokens).double()                             # M(x, S) = sum of M(x, x2) over x2 in S
    a = (to_token / to_token.sum(0)) @ to_token.T                            # A(x, x') = sum_S M(x, S) M(x', S) / d(S)
    d = mask.sum(1)
    return to_token, a, a / torch.outer(d, d).sqrt()


def describe(mask, z, tokens):
    """The numbers behind the bound and the claims, for one tokenizer. Keys: see `toy_model`."""
    to_token, a, normalized = augmentation_graph(mask, tokens)
    classes = z.shape[1]
    label = z / z.sum(1, keepdim=True)                                       # a shared point is of either class, evenly
    only = z * (z.sum(1, keepdim=True) == 1)                                 # the points of one class only
    between = only.T @ a @ only / torch.outer(only.sum(0), only.sum(0))      # mean weight, class by class
    spectrum = torch.linalg.eigvalsh(normalized).flip(0)
    return {"w_in": between.trace().item() / classes,
            "w_x": (between.sum() - between.trace()).item() / (classes * (classes - 1)),
            "sum": normalized.square().sum().item(),                         # ||A||_F^2 = sum lambda^2 (Eq. 17)
            "alpha": abs(1 - (label.T @ a @ label).trace().item()),          # P(y(x) != y(x')) (Eq. 18)
            "tail": spectrum[classes:].square().sum().item(),
            "linked": (a[z @ z.T > 0] > EPS).double().mean().item(),
            "spectrum": spectrum, "tokens": tokens, "mask": to_token, "graph": a, "normalised": normalized}


def toy_model(n, overlap, tokenizer="mae", classes=2, graph="complete", width=1, c1=1., c2=None):
    """The augmentation graph of one tokenizer in the world of Sec. 2.2, built point by point: a dict of exact numbers.

    tokenizer: "mae", "classwise", "crossclass", "pairs", or a list with the token of every point (see `assignment`).
    w_in, w_x: mean weight of two points of one class only, of the same or of different classes; linked: fraction of the
    pairs of one class that have an edge; sum, tail: of the squared eigenvalues, all of them (the paper) or all but the
    first one per class (the usual theory); alpha: labelling error; bound = c1 sum + c2 alpha (Eq. 3), and bound_tail.
    c2 defaults to the number of classes. spectrum, tokens, mask M(x, S), graph A and normalised are tensors.
    """
    groups, z = populations(n, overlap, classes)
    c2 = classes if c2 is None else c2
    if c1 <= 0 or c2 <= 0:
        raise ValueError(f"--c1 {c1} --c2 {c2}: both are positive in Eq. 3")
    if graph == "ring" and (overlap or not 1 <= width <= (n - 1) / 2):
        raise ValueError(f"--graph ring needs --overlap 0 and --width from 1 to (n - 1) / 2, not --n {n} "
                         f"--overlap {overlap} --width {width}")
    toy = describe(mask_graph(z, graph, width), z, assignment(tokenizer, groups))
    return toy | {"bound": c1 * toy["sum"] + c2 * toy["alpha"], "bound_tail": c1 * toy["tail"] + c2 * toy["alpha"]}


# --- the same by algebra, and the paper's claims -----------------------------------------------------------------

def closed_form(n, overlap, tokenizer="mae", classes=2):
    """w_in, w_x, sum and alpha of `toy_model` on the complete graph, by algebra.

    With p_c(S) the points of token S that are in class c, A depends on the tokens only through the matrix
    T_cd = 1/n sum_S p_c p_d / sum_e p_e. It is mu I + (1 - mu) / C for the three tokenizers, and for any if C = 2 (Eqs.
    10-15): mu = 1, no confusion of classes, to mu = 0, nothing but confusion.
    """
    kappa = 1 - classes * overlap / (2 * n)
    if isinstance(tokenizer, str):
        mu = {"mae": kappa, "classwise": kappa ** 2, "crossclass": 0.}[tokenizer]
    elif classes == 2:
        groups, z = populations(n, overlap, classes)
        p, q = z.T @ F.one_hot(assignment(tokenizer, groups)).double()
        mu = 1 - 2 / n * (p * q / (p + q)).sum().item()
    else:
        raise ValueError("the closed form of an arbitrary tokenizer is for 2 classes")
    t_in, t_x = mu + (1 - mu) / classes, (1 - mu) / classes                  # T_cc and T_cd
    return {"w_in": t_in / (classes * n * n), "w_x": t_x / (classes * n * n),
            "sum": 1 + (classes - 1) * (mu * kappa) ** 2,                    # eigenvalues: 1, C - 1 times mu kappa, 0
            "alpha": (classes - 1) / classes * (1 - mu * kappa ** 2)}


def window(better, worse, spectrum="sum", tie=False):
    """(low, high): the c2/c1 between which `better` has the smaller bound, c1 sum + c2 alpha; (0, 0) = for none."""
    d_sum, d_alpha = (better[key] - worse[key] for key in (spectrum, "alpha"))
    if abs(d_alpha) < EPS:
        return (0., math.inf) if d_sum < (EPS if tie else -EPS) else (0., 0.)
    ratio = max(0., -d_sum / d_alpha) if abs(d_sum) > EPS else 0.
    return (0., ratio) if d_alpha > 0 else (ratio, math.inf)


def partitions(points):
    """Every way to put the points into tokens, each once, as lists of tokens: 1, 2, 5, 15, 52, 203, 877, 4140 ..."""
    if points == 0:
        yield []
        return
    for first in partitions(points - 1):
        for token in range(max(first, default=-1) + 2):
            yield first + [token]


def theorem1(mask, z):
    """Theorem 1 by trying every tokenizer of at most 8 points, where M(x1, x2) > 0 only inside a class.

    -> {"sum": (low, high), "tail": (low, high)}: the c2/c1 for which no tokenizer has a smaller bound than the labels;
    and the number of tokenizers tried.
    """
    label = describe(mask, z, z.argmax(1))
    tried = [describe(mask, z, torch.tensor(tokens)) for tokens in partitions(len(z))]
    limits = {key: zip(*(window(label, other, key, tie=True) for other in tried)) for key in ("sum", "tail")}
    return {key: (max(lows), min(highs)) for key, (lows, highs) in limits.items()}, len(tried)


def claims(toys, found, tried):
    """The claims of Sec. 2.2, App. C and Theorem 1, each with the (low, high) of c2/c1 for which it is true here.

    toys: {name: toy_model(...)} of the three tokenizers; found, tried: what `theorem1` returned.
    """
    mae, own, cross = (toys[name] for name in TOKENIZERS)
    less = lambda a, b: (0., math.inf) if a < b - EPS else (0., 0.)          # true or false, whatever c1 and c2
    yield "class-wise tokens raise the weights inside a class above MAE's", less(mae["w_in"], own["w_in"])
    yield "class-wise tokens lower the weights between classes below MAE's", less(own["w_x"], mae["w_x"])
    yield "class-wise tokens link more pairs of one class than MAE", less(mae["linked"], own["linked"])
    yield "cross-class tokens have smaller weights inside a class than class-wise", less(cross["w_in"], own["w_in"])
    yield "cross-class tokens have larger weights between classes than class-wise", less(own["w_x"], cross["w_x"])
    for key, bound in (("sum", "bound"), ("tail", "tail bound")):
        first, second = window(own, mae, key), window(mae, cross, key)
        yield f"{bound}: class-wise < MAE", first
        yield f"{bound}: MAE < cross-class", second
        yield f"{bound}: class-wise < MAE < cross-class", (max(first[0], second[0]), min(first[1], second[1]))
        yield f"{bound}: the labels are the best of all {tried} tokenizers of a small graph (Theorem 1)", found[key]


def verdict(low, high):
    """A range of c2/c1 in words."""
    if high <= low:
        return "NOT TRUE"
    if (low, high) == (0, math.inf):
        return "EXACTLY TRUE"
    return "TRUE IF " + f"{low:.4g} < " * (low > 0) + "c2/c1" + f" < {high:.4g}" * (high < math.inf)


def draw(toys, groups, side=240):
    """Adjacency matrices A, points sorted by class, a panel per tokenizer: (3, h, w) in 0..1. Darker = larger.

    One scale for all panels. The strips at the top and the left show each point's token, a colour per token; red lines
    part the groups of points.
    """
    sizes = [size for _, size in groups]
    scale = max(1, side // sum(sizes))
    ends = (np.cumsum(sizes)[:-1] * scale).tolist()
    top = max(toy["graph"].max() for toy in toys.values())
    ink, red = torch.tensor([[.03, .15, .4], [.9, .2, .1]])[:, :, None, None]
    panels = []
    for toy in toys.values():
        shade = repeat((toy["graph"] / top).sqrt().float(), "x y -> 1 (x i) (y j)", i=scale, j=scale)
        image = 1 - shade * (1 - ink)
        image[:, ends], image[:, :, ends] = red, red
        # One hue per token, a golden ratio of the colour wheel apart.
        turn = 2 * math.pi * (toy["tokens"] * .618 + torch.tensor([0, 1 / 3, 2 / 3])[:, None])
        strip = F.pad(repeat(.6 + .4 * turn.cos(), "rgb x -> rgb 10 (x j)", j=scale), (0, 0, 0, 4), value=1.)
        image = torch.cat([F.pad(strip, (14, 0), value=1.), torch.cat([strip.transpose(1, 2), image], 2)], 1)
        panels.append(F.pad(image, (10, 10, 10, 10), value=1.))
    return torch.cat(panels, 2)


# --- what the commands do ----------------------------------------------------------------------------------------

def toy(args):
    """Prints a row of numbers per tokenizer, brute force above algebra, then the claims, and draws the graphs."""
    ring = args.graph == "ring"
    overlap = args.overlap if args.overlap is not None else 0 if ring else 2
    names = {name: name for name in TOKENIZERS + ("pairs",) * ring} | ({"yours": args.assign} if args.assign else {})
    toys = {name: toy_model(args.n, overlap, tokenizer, args.classes, args.graph, args.width, args.c1, args.c2)
            for name, tokenizer in names.items()}
    groups, z = populations(args.n, overlap, args.classes)
    print(f"{args.graph} graph of {len(z)} points: {in_words(groups)}")
    columns = ("w_in", "w_x", "sum", "alpha", "tail", "linked", "bound", "bound_tail")
    print(f"\n{'':10}" + "".join(f"{column:>12}" for column in columns))
    for name, numbers in toys.items():
        print(f"{name:10}" + "".join(f"{numbers[column]:12.7f}" for column in columns))
        if not ring and (name in TOKENIZERS or args.classes == 2):
            exact = closed_form(args.n, overlap, names[name], args.classes)
            print(f"{'  algebra':10}" + "".join(f"{exact[column]:12.7f}" for column in columns[:4]))
    print(LEGEND.format(c1=args.c1, c2=args.classes if args.c2 is None else args.c2))
    _, z = populations(4 if ring else 3, 0, 2)                               # Theorem 1: classes without overlap
    for claim, limits in claims(toys, *theorem1(mask_graph(z, args.graph), z)):
        print(f"{verdict(*limits):28} {claim}")
    print(WHY[args.graph])
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    save_image(draw(toys, groups), args.out + ".tmp", format="png")
    os.replace(args.out + ".tmp", args.out)
    print(f"\n{args.out}: the graphs, panels from left to right: {', '.join(toys)}")


def read_runs(folders):
    """[(folder, its tokenizer.pt, linear-probe accuracy 0..1)] of the finished runs of train.py among `folders`."""
    runs = []
    for folder in map(Path, folders):
        log = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        found = [line["linear"] for line in lines if line.get("summary") and line.get("linear") is not None]
        if found and (folder / "tokenizer.pt").is_file():
            runs.append((str(folder), str(folder / "tokenizer.pt"), found[-1]))
        elif folder.is_dir():
            print(f"{folder}: left out, no {'tokenizer.pt' if found else 'linear accuracy in metrics.jsonl'}")
    if folders and len(runs) < 3:
        raise ValueError(f"--probes: needs 3 runs or more that have tokenizer.pt and linear accuracy, not {len(runs)}")
    return runs


def score(args, kmeans, train):
    """Prints a row per tokenizer, token file and run, then the reference rows, then the line through the runs."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("score is one process: make tokens with torchrun kmeans.py tokenize, then score --tokens")
    sources = [(path, path, None) for path in args.tokenizer + args.tokens] + read_runs(args.probes)
    if not sources:
        raise ValueError("nothing to score: give --tokenizer, --tokens or --probes (kmeans.py fit makes a tokenizer)")
    loaded = {path: kmeans.load_tokens(path) if path in args.tokens else kmeans.load_tokenizer(path)
              for _, path, _ in sources}                                     # all of them first: fail early
    device = train.setup(args.device)[2]
    opened = functools.cache(lambda split, size: train.open_dataset(args.data, split, image_size=size))

    def encode(tokenizer, split):
        """(tokens (m, n) uint16, labels (m,)) of the images that were really read; None if there is no such split."""
        ds = opened(split, tokenizer.image_size)
        if ds is None:
            return None
        some = np.sort(np.random.default_rng(args.seed).permutation(len(ds))[:args.images])
        steps = tqdm(train.load_batches(ds, some, args.batch_size, args.workers, device), ds.name,
                     math.ceil(len(some) / args.batch_size), disable=not sys.stderr.isatty())
        parts = [(tokenizer(images).cpu().numpy().astype(np.uint16), labels) for images, labels, _ in steps]
        return tuple(np.concatenate(part) for part in zip(*parts))

    def row(name, k, fit, held):
        """Prints a line, returns its TCAS. fit, held: (tokens, labels) of training and test split, or None."""
        if fit[1] is None or fit[1].min() < 0:
            raise ValueError(f"--data {args.data}: these images have no labels, and TCAS needs them")
        c = 1 + int(max(split[1].max() for split in (fit, held) if split))
        counts = cooccurrence(*fit, k, c)
        l2, l1 = (tcas_terms(counts, norm, args.weighted) for norm in ("l2", "l1"))
        bag = bag_accuracy(*fit, k, c, held, seed=args.seed, device=device)
        print(f"{name[-40:]:40}{k:7}{l2['used']:7}{l2['perplexity']:12.1f}{l2['tcas']:9.3f}{l1['tcas']:9.3f}{bag:8.3f}",
              flush=True)
        return l2["tcas"]

    print(f"{'tokens':40}{'K':>7}{'used':>7}{'perplexity':>12}{'TCAS l2':>9}{'TCAS l1':>9}{'bag':>8}")
    codebooks, points = set(), []
    for name, path, linear in sources:
        if path in args.tokens:
            tokens, held = loaded[path], None
            k, fit = args.vocab_size or int(tokens.max()) + 1, (tokens, opened("train", None).labels)
        else:
            tokenizer = loaded[path].to(device)
            k, fit, held = tokenizer.vocab_size, encode(tokenizer, "train"), encode(tokenizer, "test")
        points.append((row(name, k, fit, held), linear))
        codebooks.add(k)
    # What a score can be: 0 for Theorem 1's optimum, and for tokens that know nothing a value that depends on K.
    splits, n, rng = (fit, held), fit[0].shape[1], np.random.default_rng(args.seed)
    row("labels as tokens", 1 + int(fit[1].max()), *[s and (np.repeat(s[1][:, None], n, 1), s[1]) for s in splits])
    for k in sorted(codebooks):
        row("random tokens", k, *[s and (rng.integers(k, size=(len(s[1]), n), dtype=np.uint16), s[1]) for s in splits])
    print("bag: accuracy of a linear softmax head on the histogram of an image's tokens, fitted on the training split\n"
          "and scored on the test split (token files, or no test split: on a random fifth of the images)")
    if args.probes:
        r, slope, intercept = fit_line(*np.array([(x, 100 * y) for x, y in points if y is not None]).T)
        print(f"linear probe = {intercept:.1f} {slope:+.1f} TCAS l2 (%), Pearson r = {r:.3f}, r^2 = {r * r:.3f}   "
              "(the paper's Table 7: 62.9 -24.0 TCAS, r = -0.920, r^2 = 0.846)")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tcas.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("score", help="TCAS of tokenizers on a data set with labels")
    p.add_argument("--data", default="textures", help="data set, see train.py (%(default)s)")
    p.add_argument("--tokenizer", nargs="+", default=[], metavar="FILE", help="tokenizer.pt files")
    p.add_argument("--tokens", nargs="+", default=[], metavar="FILE", help="tokens.npy files of the training split")
    p.add_argument("--probes", nargs="+", default=[], metavar="RUN", help="folders of train.py's runs")
    p.add_argument("--vocab-size", type=int, help="K of the token files (default: their largest token + 1)")
    p.add_argument("--weighted", action="store_true", help="average over patches; the paper averages over used codes")
    p.add_argument("--images", type=int, help="use this many random images of each split only")
    p.add_argument("--batch-size", type=int, default=64, help="images (%(default)s)")
    p.add_argument("--workers", type=int, default=0, help="processes that read images (%(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    p = commands.add_parser("toy", help="the theory of Sec. 2.2, point by point")
    p.add_argument("--n", type=int, default=10, help="points per class (%(default)s)")
    p.add_argument("--overlap", type=int, help="points that any two classes share (default 2; 0 for --graph ring)")
    p.add_argument("--classes", type=int, default=2)
    p.add_argument("--graph", choices=("complete", "ring"), default="complete", help="who can be masked with whom")
    p.add_argument("--width", type=int, default=1, help="ring: how many places away (%(default)s)")
    p.add_argument("--assign", type=int, nargs="+", metavar="TOKEN", help="your own tokenizer: a token per point")
    p.add_argument("--c1", type=float, default=1., help="weight of the spectrum (%(default)s)")
    p.add_argument("--c2", type=float, help="weight of the labelling error (default: the number of classes)")
    p.add_argument("--out", default="runs/toy.png", help="picture (%(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.command == "toy":
            return toy(args)
        import kmeans                                                        # only here: they import this file
        import train
        score(args, kmeans, train)
    except (ValueError, OSError) as error:                                   # bad input: one line, and nothing else
        parser.exit(2, f"tcas.py: error: {error}\n")


if __name__ == "__main__":
    main()
def describe_codebook(tokens, labels, k, seed=0, sampled=False):  # TEMP
    labels = np.zeros(len(tokens), np.int64) if labels is None else labels
    count = lambda labels: cooccurrence(tokens, labels, k, 1 + int(labels.max()))
    counts = count(labels)
    share = counts.sum(1) / counts.sum()
    entropy = torch.special.entr(share).sum().item()
    lines = [f"codebook: {int((share > 0).sum())} of {k} codes used, perplexity {math.exp(entropy):.1f}; "
        f"a uniform guess has loss ln {k} = {math.log(k):.3f}, one by code frequency {entropy:.3f}"]
    if len(np.unique(labels)) > 1:
        random = count(np.random.default_rng(seed).permutation(labels))
        lines.append(f"TCAS {tcas(counts):.3f}, of random tokens {tcas(random):.3f}")
    return lines
