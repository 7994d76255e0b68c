"""TCAS, a score of tokenizers that needs no training, and its theory (ClusterMIM, 2407.09087, Sec. 2 and 3).

    R[k, c] = patches with token k in images of class c;  R' = R, rows of norm 1;  C = R' R'^T      (Sec. 3.1)
    TCAS    = 1/K sum_i (1 - C_ii)^2 + 1/K^2 sum_{i != j} C_ij^2                     0 is best      (Eq. 8)

First term: is each token of one class? Second: do two tokens share a class? The text divides rows by their
sum (norm "l1"); the published values fit rows of unit length only ("l2", the default). Then C_ii = 1, the
second term is left, and TCAS is 0 if and only if all patches of a class have the same token. One token for
everything scores 0, too: compare tokenizers of equal K.

Read down to the ruled line: the score, the toy model point by point, the same by algebra, Theorem 1. Below
it, to be skipped at first: words, pictures and the two commands.

python tcas.py score --data textures --tokenizer a.pt b.pt   labels < good tokenizers < random tokens
python tcas.py score --probes runs/*                         finished runs: Pearson r, a line per objective
python tcas.py toy --n 10 --overlap 2 --classes 2            Sec. 2.2 by brute force and by algebra, seconds
python tcas.py toy --graph ring --n 12 --width 1             a sparse graph: class-wise tokens always win
"""
import argparse
import functools
import inspect
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import repeat
from torchvision.transforms.functional import to_pil_image

EPS = 1e-12                                         # two numbers of the toy model that are closer are equal
TOKENIZERS = ("mae", "classwise", "crossclass")     # Sec. 2.2: S^MAE, S^class, S^cross


# --- token-class alignment similarity (Sec. 3.1) ----------------------------------------------------------

def cooccurrence(tokens, labels, k, c, chunk=1 << 22):
    """R (k, c) int64: how many patches have each of k tokens, in images of each of c classes (Sec. 3.1).

    tokens (m, n) integers in 0..k-1, a row per image: a tensor (R is on its device), array or memory map, read
    `chunk` patches at a time; labels (m,) in 0..c-1. R of parts of the data add up. ValueError if they do not fit.
    """
    m, n = tokens.shape
    device = tokens.device if torch.is_tensor(tokens) else "cpu"
    labels = torch.as_tensor(labels, device=device).long()
    if len(labels) != m:
        raise ValueError(f"tokens of {m} images but {len(labels)} labels: they must be of the same data set")
    if m and not 0 <= labels.min() <= labels.max() < c:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, outside 0..{c - 1}: all need one")
    counts = torch.zeros(k * c, dtype=torch.int64, device=device)
    step = max(1, chunk // n)
    for start in range(0, m, step):
        part = tokens[start:start + step]
        part = part.long() if torch.is_tensor(part) else torch.from_numpy(part.astype(np.int64))
        if not 0 <= part.min() <= part.max() < k:
            raise ValueError(f"tokens from {part.min()} to {part.max()}, outside 0..{k - 1}, the codebook")
        pair = part * c + labels[start:start + step, None]
        counts += torch.bincount(pair.flatten(), minlength=k * c)
    return counts.view(k, c)


def tcas_terms(counts, norm="l2", weighted=False, chunk=2048):
    """Both terms of Eq. 8 and what helps to read them, a dict: tcas impurity confusion used dead perplexity.

    counts (k, c), see `cooccurrence`. Dead codes (no patch) are dropped: they have no class distribution. The
    paper's averages count every used code once, however rare; `weighted`: by w_i, its share of the patches,
    with w_i for 1/K and w_i w_j for 1/K^2. perplexity: exp(entropy of the shares). ValueError: one class only.
    Few patches look like alignment in l2: random tokens score about (p / (1 + p))^2, p patches a (k, c) cell.
    Memory (c, c) + (chunk, c) float64, time O(k c^2): the (k, k) matrix C is never built.
    """
    if norm not in ("l2", "l1") or counts.ndim != 2 or counts.min() < 0:
        raise ValueError(f"TCAS takes counts (k, c) >= 0, norm l2 or l1, not {tuple(counts.shape)}, {norm!r}")
    if (counts.sum(0) > 0).sum() < 2:
        raise ValueError("TCAS compares classes: patches of at least 2 classes are needed")
    patches = counts.sum(1).double()
    share = patches / patches.sum()
    used = int((patches > 0).sum())
    weight = share if weighted else (patches > 0).double() / used
    gram, impurity, diagonal = 0, 0, 0
    for r, w in zip(counts.split(chunk), weight.split(chunk)):
        r = F.normalize(r.double(), p=2 if norm == "l2" else 1, dim=1)       # R'; rows of dead codes stay 0
        c_ii = r.square().sum(1)
        impurity += w @ (1 - c_ii).square()                        # 1/K sum_i (1 - C_ii)^2
        diagonal += (w * c_ii).square().sum()
        gram = gram + r.T @ (w[:, None] * r)
    confusion = (gram.square().sum() - diagonal).clamp(min=0)      # sum C_ij^2 = ||R'^T R'||_F^2, less i = j
    return {"tcas": float(impurity + confusion), "impurity": float(impurity), "confusion": float(confusion),
            "used": used, "dead": len(counts) - used,
            "perplexity": float(torch.special.entr(share).sum().exp())}


def tcas(counts, norm="l2", weighted=False):
    """Token-class alignment similarity (Eq. 8), a float, 0 is best; `tcas_terms` has its two terms."""
    return tcas_terms(counts, norm, weighted)["tcas"]


def bag_accuracy(tokens, labels, k, c, held=None, epochs=20, batch=256, lr=.01, seed=0, device="cpu"):
    """Accuracy (0..1) of a linear softmax head on the histogram of an image's tokens, a bag of words.

    tokens (m, n), labels (m,) fit it; held = (tokens, labels) scores it, or else a random fifth of the images.
    The head is a row of c logits per token, summed over the patches. Adam, learning rate falling to 0.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(tokens))
    if held is None:
        order, out = np.split(order, [len(order) * 4 // 5])
        held = tokens[out], labels[out]
    to_device = lambda a: torch.from_numpy(np.asarray(a, np.int64)).to(device)
    x, y, held_x, held_y = map(to_device, (tokens, labels, *held))
    head, bias = nn.EmbeddingBag(k, c, mode="sum", device=device), nn.Parameter(torch.zeros(c, device=device))
    nn.init.zeros_(head.weight)                                    # the problem is convex: any start will do
    optimizer = torch.optim.Adam([head.weight, bias], lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, epochs * math.ceil(len(order) / batch))
    for _ in range(epochs):
        for i in torch.from_numpy(rng.permutation(order)).to(device).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(head(x[i]) + bias, y[i]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        guess = torch.cat([(head(part) + bias).argmax(1) for part in held_x.split(4096)])
    return (guess == held_y).double().mean().item()


# --- the toy model (Sec. 2.2, App. B and C), brute force --------------------------------------------------

def populations(n, overlap, classes):
    """Classes of n points, any two share `overlap` -> groups [(classes they are in, number of points)], and
    membership z (points, classes) float64, in the same order: 1 where the point is in the class."""
    own = n - (classes - 1) * overlap
    if classes < 2 or overlap < 0 or own < 1 or classes * n > 2000:
        raise ValueError(f"--classes {classes} --n {n} --overlap {overlap}: needs 2 classes, 2000 points at most, "
                         "and (classes - 1) * overlap < n, so that every class has points of its own")
    groups = [[((c,), own)] + [((c, other), overlap) for other in range(c + 1, classes)] for c in range(classes)]
    groups = [(owners, size) for group in groups for owners, size in group if size]
    z = [[c in owners for c in range(classes)] for owners, size in groups for _ in range(size)]
    return groups, torch.tensor(z).double()


def name_groups(groups):
    return ", ".join(f"{size} of class {' and '.join(map(str, owners))}" for owners, size in groups)


def assignment(tokenizer, groups):
    """The token of every point, (points,) int64; `tokenizer`: a name, or a list in the order of `groups`."""
    points = [(owners, size, i) for owners, size in groups for i in range(size)]
    named = {"mae": range(len(points)),                                      # every point its own
             "classwise": [owners[i * len(owners) // size] for owners, size, i in points],  # overlaps: halves
             "crossclass": [i % 2 for _, _, i in points],                    # two, each half of every group
             "pairs": [j - i % 2 for j, (_, _, i) in enumerate(points)]}     # neighbors, two by two
    if isinstance(tokenizer, str):
        if tokenizer not in named:
            raise ValueError(f"no tokenizer {tokenizer!r}: {', '.join(named)}, or a list of tokens")
        odd = [owners for owners, size in groups if size % 2]
        if tokenizer == "crossclass" and odd or tokenizer == "classwise" and max(map(len, odd), default=0) > 1:
            raise ValueError(f"{tokenizer} tokens halve groups, {name_groups(groups)}: other --n, --overlap")
        tokenizer = named[tokenizer]
    if len(tokenizer) != len(points):
        raise ValueError(f"{len(tokenizer)} tokens for {len(points)} points: {name_groups(groups)}, in this order")
    return torch.unique(torch.tensor(tokenizer), return_inverse=True)[1]


def mask_graph(z, graph="complete", width=1):
    """M(x1, x2) (points, points), the joint probability of both views: draw a class, a point of it, then a
    second one, any ("complete", App. B) or at most `width` places away ("ring")."""
    mask = torch.zeros(len(z), len(z), dtype=torch.float64)
    for member in z.T:
        index = member.nonzero()[:, 0]
        n = len(index)
        step = (torch.arange(n)[:, None] - torch.arange(n)).abs()
        near = torch.minimum(step, n - step) <= (width if graph == "ring" else n)
        mask[index[:, None], index] += near / near.sum().double() / z.shape[1]
    return mask


def augmentation_graph(mask, tokens):
    """Mask graph M(x, S) (Eq. 4), augmentation graph A(x, x') (Sec. 2.1), A normalized (Eqs. 9, 16): D^-1/2 A D^-1/2.

    mask M(x1, x2) (points, points), tokens (points,) int64: K of them, all used -> (points, K), twice (points, points).
    """
    to_token = mask @ F.one_hot(tokens).double()                             # sum of M(x, x2), x2 in S
    a = (to_token / to_token.sum(0)) @ to_token.T                            # sum_S M(x, S) M(x', S) / d(S)
    d = mask.sum(1)
    return to_token, a, a / torch.outer(d, d).sqrt()


def describe(mask, z, tokens):
    """The numbers of `toy_model`, but for the bounds, and the tensors behind them: to_token M(x, S), graph A."""
    to_token, a, normalized = augmentation_graph(mask, tokens)
    classes = z.shape[1]
    label = z / z.sum(1, keepdim=True)                                       # shared points: evenly
    only = z * (z.sum(1, keepdim=True) == 1)                                 # the points of one class only
    weight = only.T @ a @ only / torch.outer(only.sum(0), only.sum(0))       # mean weight, class by class
    spectrum = torch.linalg.eigvalsh(normalized).flip(0)
    return {"w_in": weight.trace().item() / classes,
            "w_x": (weight.sum() - weight.trace()).item() / (classes * (classes - 1)),
            "sum": normalized.square().sum().item(),                         # sum lambda^2 (Eq. 17)
            "alpha": abs(1 - (label.T @ a @ label).trace().item()),          # P(y(x) != y(x')) (Eq. 18)
            "tail": spectrum[classes:].square().sum().item(),
            "linked": (a[z @ z.T > 0] > EPS).double().mean().item(),
            "spectrum": spectrum, "tokens": tokens, "to_token": to_token, "graph": a}


def toy_model(n, overlap, tokenizer="mae", classes=2, graph="complete", width=1, c1=1., c2=None):
    """The augmentation graph of one tokenizer in the world of Sec. 2.2, point by point: a dict of numbers.

    tokenizer   "mae", "classwise", "crossclass", "pairs", or a list with the token of every point
    w_in, w_x   mean edge weight of two points of one class only, of the same or of different classes
    linked      fraction of the pairs of one class that have an edge at all
    sum, tail   of squared eigenvalues: of all (Eq. 17); of all but the `classes` largest (HaoChen et al. 2021)
    alpha       labelling error P(y(x) != y(x')) (Eq. 18)
    bound       c1 sum + c2 alpha (Eq. 3), less is better, c2 = `classes` by default; bound_tail: tail for sum
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


# --- the same by algebra, and Theorem 1 -------------------------------------------------------------------

def closed_form(n, overlap, tokenizer="mae", classes=2):
    """w_in, w_x, sum and alpha of `toy_model` on the complete graph, by algebra.

    p_c(S): points of class c with token S; C classes. The tokens enter A only through the matrix (Eqs. 10-15)
        T_cd = 1/n sum_S p_c p_d / sum_e p_e = mu [c = d] + (1 - mu) / C,
    so for the three tokenizers, and for any if C = 2. mu = 1: classes are never confused; mu = 0: always.
    A normalized has the eigenvalues 1 (once), mu kappa (C - 1 times) and 0. ValueError: a list of tokens and C > 2.
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
            "sum": 1 + (classes - 1) * (mu * kappa) ** 2,                    # spectrum: 1, mu kappa, 0
            "alpha": (classes - 1) / classes * (1 - mu * kappa ** 2)}


def window(better, worse, spectrum="sum", tie=False):
    """(low, high): the c2/c1 for which `better` has the smaller (tie: or equal) c1 sum + c2 alpha; (0, 0): none."""
    d_sum, d_alpha = (better[key] - worse[key] for key in (spectrum, "alpha"))
    if abs(d_alpha) < EPS:
        return (0., math.inf) if d_sum < (EPS if tie else -EPS) else (0., 0.)
    ratio = max(0., -d_sum / d_alpha) if abs(d_sum) > EPS else 0.
    return (0., ratio) if d_alpha > 0 else (ratio, math.inf)


def partitions(points):
    """Every way to put points into tokens, each once, as lists of tokens: 1, 2, 5, 15, 52, 203, 877 ..."""
    if points == 0:
        yield []
        return
    for first in partitions(points - 1):
        for token in range(max(first, default=-1) + 2):
            yield first + [token]


def theorem1(mask, z):
    """Theorem 1 by trying every tokenizer of at most 8 points, where M(x1, x2) > 0 only inside a class.

    -> {"sum": (low, high), "tail": ...}, the c2/c1 where no bound is below the labels'; tokenizers tried
    """
    labels = describe(mask, z, z.argmax(1))
    rivals = [describe(mask, z, torch.tensor(tokens)) for tokens in partitions(len(z))]
    limits = {}
    for key in ("sum", "tail"):
        low, high = zip(*[window(labels, rival, key, tie=True) for rival in rivals])
        limits[key] = max(low), min(high)
    return limits, len(rivals)


# ==========================================================================================================
# Machinery. The method ends here: what follows puts the results into words, tables and pictures.
# ==========================================================================================================

def describe_codebook(tokens, labels, k, seed=0):
    """(lines on what a codebook is worth before any training: used codes, TCAS beside that of shuffled labels;
    entropy of its codes, which is the loss of a guess by code frequency).

    tokens (m, n) in 0..k-1; labels (m,), or None or -1: none, then as with one class there is no TCAS.
    """
    if labels is None or labels.min() < 0:
        labels = np.zeros(len(tokens), np.int64)
    counts = cooccurrence(tokens, labels, k, 1 + int(labels.max()))
    share = counts.sum(1) / counts.sum()
    entropy = torch.special.entr(share).sum().item()
    lines = [f"codebook: {int((share > 0).sum())} of {k} codes used, perplexity {math.exp(entropy):.1f}; "
             f"a uniform guess has loss ln {k} = {math.log(k):.3f}, one by code frequency {entropy:.3f}"]
    if len(np.unique(labels)) > 1:
        shuffled = np.random.default_rng(seed).permutation(labels)           # the same codes, of no class
        random = cooccurrence(tokens, shuffled, *counts.shape)
        lines.append(f"TCAS {tcas(counts):.3f}, of random tokens {tcas(random):.3f} "
                     "(0: no two tokens share a class)")
    return lines, entropy


def fit_line(x, y):
    """Least squares y = intercept + slope x -> Pearson r, slope, intercept. App. E's "r-value" is r^2."""
    if len(x) < 3 or np.std(x) < EPS or np.std(y) < EPS:
        raise ValueError(f"no line through {len(x)} tokenizers: at least 3, of unequal TCAS and accuracy")
    slope, intercept = np.polyfit(x, y, 1)
    return float(np.corrcoef(x, y)[0, 1]), float(slope), float(intercept)


def claims(toys, found, tried):
    """The claims of Sec. 2.2, App. C and Theorem 1, each with the (low, high) of c2/c1 where it holds.

    toys: {name: toy_model(...)} of the three tokenizers; found, tried: what `theorem1` returned.
    """
    mae, own, cross = (toys[name] for name in TOKENIZERS)
    less = lambda a, b: (0., math.inf) if a < b - EPS else (0., 0.)          # whatever c1 and c2
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
    """Matrices A, points sorted by class, a panel per tokenizer: (3, h, w) in 0..1; darker = larger, one scale.

    Strips at the top and the left: each point's token, a color per token; red lines part groups of points.
    """
    ends = np.cumsum([size for _, size in groups])
    scale = max(1, side // ends[-1])
    parts = ends[:-1] * scale
    top = max(toy["graph"].max() for toy in toys.values())
    ink, red = torch.tensor([[.03, .15, .4], [.9, .2, .1]])[:, :, None, None]
    panels = []
    for toy in toys.values():
        shade = repeat((toy["graph"] / top).sqrt().float(), "x y -> 1 (x i) (y j)", i=scale, j=scale)
        image = 1 - shade * (1 - ink)
        image[:, parts], image[:, :, parts] = red, red
        # One hue per token, a golden ratio of the color wheel apart.
        turn = 2 * math.pi * (toy["tokens"] * .618 + torch.tensor([0, 1 / 3, 2 / 3])[:, None])
        strip = F.pad(repeat(.6 + .4 * turn.cos(), "rgb x -> rgb 10 (x j)", j=scale), (0, 0, 0, 4), value=1.)
        image = torch.cat([F.pad(strip, (14, 0), value=1.), torch.cat([strip.transpose(1, 2), image], 2)], 1)
        panels.append(F.pad(image, (10, 10, 10, 10), value=1.))
    return torch.cat(panels, 2)


WHY = {"complete": """
Merging tokens cannot lower w_x nor raise an eigenvalue, so the order of the bounds is a matter of c2/c1. With 2
classes, class-wise < MAE needs c2/c1 < 2 (1 - r)(2 - r), r = overlap/n, Theorem 1 c2/c1 >= 4 - 2/n: never both.
Every tail is 0, as all points of a class are linked already: see --graph ring.""",
       "ring": """
Each point meets its neighbors only. Class-wise tokens link pairs that MAE leaves apart: tail and alpha are 0, the
least bound for any c1, c2. So tokens "raise intra-class connectivity"; "pairs", a local tokenizer, in part."""}


def toy(args, vit):
    """Prints a row of numbers per tokenizer, brute force above algebra, and the claims; draws the graphs."""
    ring = args.graph == "ring"
    overlap = args.overlap if args.overlap is not None else 0 if ring else 2
    tokenizers = {name: name for name in TOKENIZERS + ("pairs",) * ring} | {"yours": args.assign}
    toys = {name: toy_model(args.n, overlap, tokens, args.classes, args.graph, args.width, args.c1, args.c2)
            for name, tokens in tokenizers.items() if tokens}
    groups, z = populations(args.n, overlap, args.classes)
    print(f"{args.graph} graph of {len(z)} points: {name_groups(groups)}")
    columns = ("w_in", "w_x", "sum", "alpha", "tail", "linked", "bound", "bound_tail")
    print(f"\n{'':10}" + "".join(f"{column:>12}" for column in columns))
    for name, numbers in toys.items():
        print(f"{name:10}" + "".join(f"{numbers[column]:12.7f}" for column in columns))
        if not ring and (name in TOKENIZERS or args.classes == 2):
            exact = closed_form(args.n, overlap, tokenizers[name], args.classes)
            print(f"{'  algebra':10}" + "".join(f"{exact[column]:12.7f}" for column in columns[:4]))
    c2 = args.classes if args.c2 is None else args.c2
    print(f"\n{inspect.getdoc(toy_model)}\nHere c1 = {args.c1:g}, c2 = {c2:g}.\n")
    _, z = populations(4 if ring else 3, 0, 2)                     # Theorem 1: classes without overlap
    for claim, limits in claims(toys, *theorem1(mask_graph(z, args.graph), z)):
        print(f"{verdict(*limits):28} {claim}")
    print(WHY[args.graph])
    vit.save_picture(to_pil_image(draw(toys, groups)), args.out)
    print(f"\n{args.out}: the graphs, panels from left to right: {', '.join(toys)}")


def read_runs(folders, data, train, vit):
    """[(folder, its tokens, linear-probe accuracy 0..1, objective and steps)] of finished runs on `data`.

    Its tokens: a tokenizer.pt, or the token file it was given. Equal runs on one tokenizer are one: their mean.
    """
    runs, name = {}, lambda data: os.path.basename(os.path.normpath(data))
    for folder in filter(Path.is_dir, map(Path, folders)):
        tokenizer, (end, why) = folder / "tokenizer.pt", train.read_summary(folder)
        tokens = str(tokenizer) if tokenizer.is_file() else end and end["tokens"]
        if why is None and name(end["data"]) != name(data):
            why = f"its data are {end['data']}"
        if why or not tokens:
            print(f"{folder}: left out, {why or 'no tokens'}")
            continue
        state = {} if tokens.endswith(".npy") else vit.read_checkpoint(tokens)  # no network is built yet
        key = state["centroids"].numpy().tobytes() if "centroids" in state else tokens
        objective = f"{end['objective']}, {end['steps']} steps"
        runs.setdefault((objective, key), (str(folder), tokens, []))[2].append(end["linear"])
    if folders and max(Counter(objective for objective, _ in runs).values(), default=0) < 3:
        raise ValueError("--probes: needs 3 tokenizers or more with runs of one objective")
    return [(folder, tokens, float(np.mean(linear)), objective)
            for (objective, _), (folder, tokens, linear) in runs.items()]


def choose_images(n, args):
    """The indices of --images of n: all, or a random part, in order."""
    return np.sort(np.random.default_rng(args.seed).permutation(n)[:args.images])


def encode(tokenizer, ds, args, kmeans, device):
    """(tokens (m, n) uint16, labels (m,)) of the images that were really read; None if there is no split."""
    if ds is None:
        return None
    chosen = choose_images(len(ds), args)
    batches = kmeans.load_batches(ds, chosen, args.batch_size, args.workers, device, "tokens")
    parts = [(tokenizer(images).to(torch.uint16).cpu().numpy(), labels) for images, labels, _ in batches]
    return tuple(np.concatenate(part) for part in zip(*parts))


def print_row(name, k, fit, held, args, device):
    """Prints a line of the table, returns its TCAS. fit, held: (tokens, labels) of a split, or None."""
    if fit[1] is None or fit[1].min() < 0:
        raise ValueError(f"--data {args.data}: these images have no labels, and TCAS needs them")
    c = 1 + int(max(labels.max() for _, labels in filter(None, (fit, held))))
    counts = cooccurrence(*fit, k, c)
    l2, l1 = (tcas_terms(counts, norm, args.weighted) for norm in ("l2", "l1"))
    bag = bag_accuracy(*fit, k, c, held, seed=args.seed, device=device)
    print(f"{name[-40:]:40}{k:7}{l2['used']:7}{l2['perplexity']:12.1f}", end="")
    print(f"{l2['tcas']:9.3f}{l1['tcas']:9.3f}{bag:8.3f}", flush=True)
    return l2["tcas"]


def print_lines(points, path, vit):
    """The line through each objective's runs; points: [(objective, TCAS, accuracy 0..1)]. Drawn to path, too."""
    dots, lines = {}, {}
    for name in sorted({objective for objective, _, _ in points}):
        x, y = zip(*[(score, 100 * linear) for objective, score, linear in points if objective == name])
        try:
            r, slope, intercept = fit_line(x, y)
            label, ends = f"{name}, r = {r:.2f}", (min(x), max(x))
            dots[label], lines[label] = [(x, y)], [(ends, [intercept + slope * end for end in ends])]
            print(f"{name}: linear probe = {intercept:.1f} {slope:+.1f} TCAS l2 (%), Pearson r = {r:.3f}, "
                  f"r^2 = {r * r:.3f}, {len(x)} tokenizers")
        except ValueError as error:
            print(f"{name}: left out, {error}")
    print("the paper's Table 7: 62.9 -24.0 TCAS, r = -0.920, r^2 = 0.846, 16 tokenizers")
    if dots:
        vit.save_plots([vit.draw_plot("TCAS", "linear probe, %", lines, dots)], path)
        print(f"drawn in {path}")


def score(args, kmeans, train, vit):
    """Prints a row per tokenizer, token file and run, the reference rows, the lines through the runs."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("score is one process: torchrun kmeans.py tokenize, then score --tokens")
    sources = [(path, path, None, None) for path in args.tokenizer + args.tokens]
    sources += read_runs(args.probes, args.data, train, vit)
    of_runs = [path for _, path, linear, _ in sources if linear is not None]
    token_files = args.tokens + [path for path in of_runs if path.endswith(".npy")]
    if not sources:
        raise ValueError("nothing to score: give --tokenizer (of kmeans.py fit), --tokens or --probes")
    loaded = {path: kmeans.load_tokens(path) if path in token_files else kmeans.load_tokenizer(path)
              for _, path, _, _ in sources}                        # all of them first: fail early
    device = train.setup(args.device)[2]
    opened = functools.cache(lambda split, size: train.open_dataset(args.data, split, size, args.classes))
    print(f"{'tokens':40}{'K':>7}{'used':>7}{'perplexity':>12}{'TCAS l2':>9}{'TCAS l1':>9}{'bag':>8}")
    codebooks, points = set(), []
    for name, path, linear, objective in sources:
        if path in token_files:
            tokens, labels, held = loaded[path], opened("train", None).labels, None
            k, fit = args.vocab_size or int(tokens.max()) + 1, (tokens, labels)
            if args.images and labels is not None and len(tokens) == len(labels):      # else `print_row` errs
                chosen = choose_images(len(labels), args)
                fit = tokens[chosen], labels[chosen]
        else:
            tokenizer = loaded[path].to(device)
            k, size = tokenizer.vocab_size, tokenizer.input_size   # k-CLIP sees twice the pixels
            fit, held = (encode(tokenizer, opened(split, size), args, kmeans, device)
                         for split in ("train", "test"))
        points.append((objective, print_row(name, k, fit, held, args, device), linear))
        codebooks.add(k)
    # What a score can be: 0 for Theorem 1's optimum, and what K lets tokens score that know nothing.
    n, rng = fit[0].shape[1], np.random.default_rng(args.seed)
    as_tokens = lambda split: split and (np.repeat(split[1][:, None], n, 1), split[1])
    at_random = lambda split: split and (rng.integers(k, size=(len(split[1]), n), dtype=np.uint16), split[1])
    print_row("labels as tokens", 1 + int(fit[1].max()), as_tokens(fit), as_tokens(held), args, device)
    for k in sorted(codebooks):
        print_row("random tokens", k, at_random(fit), at_random(held), args, device)
    print("bag: accuracy of a linear softmax head on the histogram of an image's tokens, on the test split\n"
          "(token files, or no test split: on a random fifth of the images, which the fit leaves out)")
    if args.probes:
        print_lines([point for point in points if point[2] is not None], args.out, vit)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tcas.py", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("score", help="TCAS of tokenizers on a data set with labels").add_argument
    add("--data", default="textures", help="data set, see train.py (%(default)s)")
    add("--classes", metavar="FILE", help="class folders to keep, one a line (ImageNet-100)")
    add("--tokenizer", nargs="+", default=[], metavar="FILE", help="tokenizer.pt files")
    add("--tokens", nargs="+", default=[], metavar="FILE", help="tokens.npy files of the training split")
    add("--probes", nargs="+", default=[], metavar="RUN", help="folders of train.py's runs")
    add("--vocab-size", type=int, help="K of the token files (default: their largest token + 1)")
    add("--weighted", action="store_true", help="average over patches; the paper averages over used codes")
    add("--images", type=int, help="use this many random images of each split only")
    add("--batch-size", type=int, default=64, help="images (%(default)s)")
    add("--workers", type=int, default=0, help="processes that read images (%(default)s)")
    add("--seed", type=int, default=0, help="of the images, the random tokens and the bag (%(default)s)")
    add("--device", help="cuda or cpu (default: cuda where there is one)")
    add("--out", default="runs/tcas.png", help="picture of --probes: TCAS and linear probe (%(default)s)")
    add = commands.add_parser("toy", help="the theory of Sec. 2.2, point by point").add_argument
    add("--n", type=int, default=10, help="points per class (%(default)s)")
    add("--overlap", type=int, help="points that any two classes share (default 2; 0 for --graph ring)")
    add("--classes", type=int, default=2, help="of the toy world (%(default)s)")
    add("--graph", choices=("complete", "ring"), default="complete", help="who can be masked with whom")
    add("--width", type=int, default=1, help="ring: how many places away (%(default)s)")
    add("--assign", type=int, nargs="+", metavar="TOKEN", help="your own tokenizer: a token per point")
    add("--c1", type=float, default=1., help="weight of the spectrum (%(default)s)")
    add("--c2", type=float, help="weight of the labelling error (default: the number of classes)")
    add("--out", default="runs/toy.png", help="picture (%(default)s)")
    args = parser.parse_args(argv)
    import kmeans                                                  # only here: train.py imports this file
    import train
    import vit
    train.check_numbers(parser, args, {"seed", "workers", "overlap", "assign"})
    with vit.exit_on_error("tcas.py"):
        toy(args, vit) if args.command == "toy" else score(args, kmeans, train, vit)


if __name__ == "__main__":
    main()
