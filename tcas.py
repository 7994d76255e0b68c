"""TCAS, a score of tokenizers that needs no training, and its theory (ClusterMIM, 2407.09087, Sec. 2 and 3).

    R[k, c] = patches with token k in images of class c;  R' = R, rows of norm 1;  C = R' R'^T      (Sec. 3.1)
    TCAS    = 1/K sum_i (1 - C_ii)^2 + 1/K^2 sum_{i != j} C_ij^2                     0 is best      (Eq. 8)

First term: is each token of one class? Second: do two tokens share a class? One token for everything scores
0, too: compare tokenizers of equal K. How far this is the paper's:

stated                         R, C and both terms in words; the values of Table 7
stated, lost in our copy       Eq. 8 with its weights, restored above. The evidence is Table 7: its values fit
                               rows of length 1 ("l2", the default; then C_ii = 1, the second term is left),
                               not the distributions of the text, rows of sum 1 ("l1").
                               Eqs. 5-7, 9-18, 20-29, c1, c2: in the model as worded; the printed formulas
                               were not available
not stated                     codes without patches (here: dropped), the split (here: training)

python tcas.py score --data textures --tokenizer a.pt b.pt   labels < good tokenizers < random tokens
python tcas.py score --probes runs/*                         finished runs: Pearson r, a line per objective
python tcas.py toy --n 10 --overlap 2 --classes 2            Sec. 2.2 by brute force and by algebra, seconds
python tcas.py toy --graph ring --n 12 --width 1             a sparse graph, where neighbors only are linked
"""
import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


# --- token-class alignment similarity (Sec. 3.1) ----------------------------------------------------------

def cooccurrence(tokens, labels, k, c):
    """R (k, c) int64: how many patches have each of k tokens, in images of each of c classes (Sec. 3.1).

    tokens (m, n), an image a row: array, memory map or tensor on the CPU, read class by class; labels (m,),
    images with another label than 0..c-1 do not count.
    """
    tokens, labels = np.asarray(tokens), np.asarray(labels)
    if len(tokens) != len(labels):
        raise ValueError(f"tokens of {len(tokens)} images but {len(labels)} labels: of two data sets?")
    counts = [np.bincount(tokens[labels == label].ravel(), minlength=k) for label in range(c)]
    return torch.from_numpy(np.stack(counts, 1))


def tcas_terms(counts, norm="l2"):
    """Both terms of Eq. 8 and what helps to read them, a dict: tcas impurity confusion used perplexity.

    counts (k, c), see `cooccurrence`. Every used code counts once, however rare. perplexity: exp(entropy).
    Few patches look like alignment: random tokens have l2 (p / (1 + p))^2, p patches a cell of counts.
    """
    r = counts[counts.sum(1) > 0].double()          # dead codes have no class distribution
    used = len(r)
    share = r.sum(1) / r.sum()
    r = F.normalize(r, p={"l2": 2, "l1": 1}[norm], dim=1)
    c_ii = r.square().sum(1)
    # The sum of all C_ij^2 is ||R' R'^T||^2 = ||R'^T R'||^2, whichever is smaller.
    gram = r @ r.T if used < r.shape[1] else r.T @ r
    impurity = (1 - c_ii).square().mean().item()
    confusion = gram.square().sum() - c_ii.square().sum()
    confusion = confusion.abs().item() / used ** 2  # abs: rounding may leave less than 0
    return {"tcas": impurity + confusion, "impurity": impurity, "confusion": confusion,
            "used": used, "perplexity": torch.special.entr(share).sum().exp().item()}


def tcas(counts, norm="l2"):
    """Token-class alignment similarity (Eq. 8), 0 is best; `tcas_terms` has its two terms."""
    return tcas_terms(counts, norm)["tcas"]


def describe_codebook(tokens, labels, k):
    """What a codebook is worth before any training, one line: used codes; the entropy of its codes, which is
    the loss of a guess by their frequency; TCAS, if labels (m,) tell two classes. tokens (m, n) in 0..k-1.
    """
    known = labels.max() > 0
    labels = labels if known else np.zeros(len(tokens), int)
    terms = tcas_terms(cooccurrence(tokens, labels, k, labels.max() + 1))
    line = (f"codebook: {terms['used']} of {k} codes used, perplexity {terms['perplexity']:.1f}; a guess by "
            f"code frequency has loss {math.log(terms['perplexity']):.3f}")
    return f"{line}; TCAS {terms['tcas']:.3f} (0: no two tokens share a class)" if known else line


# --- the toy model (Sec. 2.2, App. B and C), point by point -----------------------------------------------

def populations(n, overlap, classes):
    """Classes of n points, any two share `overlap` -> points: the classes that each is in, group by group;
    membership z (points, classes): 1 where the point is in the class, else 0."""
    exclusive = n - (classes - 1) * overlap
    if n % 2 or overlap % 2 or classes < 2 or exclusive < 1 or classes * n > 2000:
        raise ValueError(f"--classes {classes} --n {n} --overlap {overlap}: needs 2 classes, at most "
                         "2000 points, (classes - 1) * overlap < n, and even numbers: tokens halve groups")
    points = []
    for c in range(classes):
        points += [(c,)] * exclusive
        for other in range(c + 1, classes):
            points += [(c, other)] * overlap
    return points, np.array([[c in owners for c in range(classes)] for owners in points], float)


def assign_tokens(tokenizer, points):
    """The token of every point, numbered from 0 on; `tokenizer`: a name, or a list of tokens.

    Points stand group by group, in even numbers: every other one is half of each group.
    """
    # S^MAE: every point is a token. S^class: the label, of points of two classes in turn. S^cross: two
    # tokens, each has half of every group. Pairs (ours, for the ring): two neighbors are a token.
    named = {
        "mae": range(len(points)),
        "classwise": [owners[i % len(owners)] for i, owners in enumerate(points)],
        "crossclass": [i % 2 for i in range(len(points))],
        "pairs": [i // 2 for i in range(len(points))]}
    tokens = named[tokenizer] if isinstance(tokenizer, str) else tokenizer
    return np.unique(tokens, return_inverse=True)[1]


def mask_graph(z, graph="complete", width=1):
    """M(x1, x2) (points, points), the joint probability of both views: draw a class, a point of it, then a
    second one, any ("complete", App. B) or at most `width` places away ("ring", ours)."""
    mask = 0
    for member in z.T:
        linked = np.outer(member, member)
        if graph == "ring":
            place = member.cumsum()
            distance = abs(place[:, None] - place)
            linked *= np.minimum(distance, member.sum() - distance) <= width
        mask += linked / linked.sum() / z.shape[1]
    return mask


def augmentation_graph(mask, tokens):
    """Mask graph M(x, S) (Eq. 4), augmentation graph A(x, x') (Sec. 2.1), D^-1/2 A D^-1/2 (Eqs. 9, 16).

    mask M(x1, x2) (points, points), tokens (points,) in 0..K-1 -> (points, K), twice (points, points).
    """
    to_token = mask @ np.eye(max(tokens) + 1)[tokens]              # sum of M(x, x2), x2 in S
    graph = (to_token / to_token.sum(0)) @ to_token.T              # sum_S M(x, S) M(x', S) / d(S)
    d = mask.sum(1)
    return to_token, graph, graph / np.sqrt(np.outer(d, d))


def measure_graph(mask, z, tokens):
    """The numbers of `toy_model`, but for the bounds, and the graph."""
    _, graph, normalized = augmentation_graph(mask, tokens)
    classes = z.shape[1]
    label = z / z.sum(1, keepdims=True)                            # shared points: evenly
    exclusive = (label == 1) / (label == 1).sum(0)
    weight = exclusive.T @ graph @ exclusive                       # mean weight, class by class
    w_in = weight.trace() / classes
    spectrum = np.linalg.eigvalsh(normalized)[::-1]
    tail = spectrum[classes:]
    return {"w_in": w_in, "w_x": (weight.sum() / classes - w_in) / (classes - 1),
            "sum": spectrum @ spectrum, "alpha": 1 - (label.T @ graph @ label).trace(),
            "tail": tail @ tail, "linked": (graph[z @ z.T > 0] > 1e-12).mean(), "graph": graph}


def toy_model(n, overlap, tokenizer="mae", classes=2, graph="complete", width=1, c1=1., c2=None):
    """The augmentation graph of one tokenizer in the world of Sec. 2.2, point by point: a dict of numbers.

    w_in, w_x   mean edge weight of two points of one class only, of the same or of different classes
    sum, tail   of squared eigenvalues: of all (Eq. 17); of all but the `classes` largest (HaoChen et al.)
    alpha       labeling error P(y(x) != y(x')) (Eq. 18), points of two classes count half for each
    linked      fraction of the pairs of one class that have an edge at all
    bound       c1 sum + c2 alpha (Eq. 3), less is better, c2 = `classes` by default
    """
    points, z = populations(n, overlap, classes)
    numbers = measure_graph(mask_graph(z, graph, width), z, assign_tokens(tokenizer, points))
    return numbers | {"bound": c1 * numbers["sum"] + (classes if c2 is None else c2) * numbers["alpha"]}


# --- the same by algebra, and Theorem 1 -------------------------------------------------------------------

def closed_form(n, overlap, tokenizer="mae", classes=2):
    """w_in, w_x, sum and alpha of `toy_model` on the complete graph, by algebra.

    C classes; p_c(S): points of class c with token S, n in all. M(x, S) = sum_c z_xc p_c(S) / (C n^2) and
    d(S) = sum_c p_c(S) / (C n), so the tokens enter A (Eqs. 10-15) only through a (C, C) matrix T:
        A = Z T Z^T / (C n^2),    T_cd = 1/n sum_S p_c p_d / sum_e p_e.
    T is symmetric, its rows sum to 1. If tokens treat all classes alike, T_cd = mu [c = d] + (1 - mu) / C:
        mae         a point of two classes adds 1/2 to T_cd: (1 - mu) / C = overlap / (2n),
                    mu = 1 - C overlap / (2n) =: kappa. Call this matrix T0
        classwise   token c has p_d = n T0_cd points of class d, n of all classes: T = T0 T0, mu = kappa^2
        crossclass  two tokens with n / 2 points of every class: T_cd = 1 / C, mu = 0.
    D = (classes of x) / (C n) and Z^T D^-1 Z = C n^2 T0: the eigenvalues of D^-1/2 A D^-1/2 are those of
    T T0, which are 1, mu kappa (C - 1 times), and 0. Labels Y = Z / (classes of x) have Y^T Z = n T0:
    alpha = 1 - trace(Y^T A Y) = 1 - trace(T0 T T0) / C.
    """
    kappa = 1 - classes * overlap / (2 * n)
    mu = {"mae": kappa, "classwise": kappa ** 2, "crossclass": 0.}[tokenizer]
    t_x = (1 - mu) / classes                                       # T_cd; T_cc = mu + T_cd
    scale = classes * n * n
    return {"w_in": (mu + t_x) / scale,
            "w_x": t_x / scale,
            "sum": 1 + (classes - 1) * (mu * kappa) ** 2,
            "alpha": (classes - 1) / classes * (1 - mu * kappa ** 2)}


def window(better, worse, spectrum="sum"):
    """(low, high): the c2/c1 where `better` has at most the c1 sum + c2 alpha of `worse`; inf, inf: none."""
    gain = round(worse[spectrum] - better[spectrum], 12)
    cost = round(better["alpha"] - worse["alpha"], 12)             # c2 cost <= c1 gain
    if cost == 0:
        return 0 if gain >= 0 else math.inf, math.inf
    ratio = max(0, gain / cost)
    return (0, ratio) if cost > 0 else (ratio, math.inf)


def partitions(points):
    """Every way to put points into tokens, each once, as lists of tokens: 1, 2, 5, 15, 52, 203, 877 ..."""
    found = [[]]
    for _ in range(points):
        found = [tokens + [new] for tokens in found for new in range(max(tokens, default=-1) + 2)]
    return found


def theorem1(mask, z):
    """Theorem 1 by trying every tokenizer of at most 8 points, where M(x1, x2) > 0 only inside a class.

    -> {"sum": (low, inf), "tail": (low, inf)}, the c2/c1 where no bound is below that of the labels
    """
    labels = measure_graph(mask, z, z.argmax(1))                   # alpha = 0: no window has an upper end
    rivals = [measure_graph(mask, z, tokens) for tokens in partitions(len(z))]
    return {key: max(window(labels, rival, key) for rival in rivals) for key in ("sum", "tail")}


# --- python tcas.py toy -----------------------------------------------------------------------------------

def print_numbers(name, numbers):
    print(f"{name:12}", *[f"{key} {value:.6f}" for key, value in numbers.items() if key != "graph"])


def print_window(order, low, high):
    print(f"{order:44} c2/c1", f"{low:.4g} to {high:.4g}" if low < high else "never")


def toy(args):
    """Prints the numbers of each tokenizer, by brute force and by algebra, the windows; draws the graphs."""
    import vit
    classes, toys = int(args.classes or 2), {}
    for name in ("mae", "classwise", "crossclass", "pairs"):
        toys[name] = toy_model(args.n, args.overlap, name, classes, args.graph, args.width)
        print_numbers(name, toys[name])
        if args.graph == "complete" and name != "pairs":
            print_numbers("  algebra", closed_form(args.n, args.overlap, name, classes))
    print(toy_model.__doc__)
    z = np.repeat(np.eye(2), 4, axis=0)             # Theorem 1: two classes without overlap
    for key, found in theorem1(mask_graph(z, args.graph), z).items():
        print_window(f"labels <= all others (Theorem 1), {key}", *found)
        for better, worse in (("classwise", "mae"), ("mae", "crossclass")):
            print_window(f"{better} <= {worse}, {key}", *window(toys[better], toys[worse], key))
    plt = vit.load_matplotlib()
    if plt:                                         # A, points sorted by class; roots show small weights, too
        plt.matshow(np.sqrt(np.hstack([x["graph"] for x in toys.values()])), cmap="Blues")
        plt.title(", ".join(toys))
        vit.save_figure(plt, args.out or "runs/toy.png")


# --- python tcas.py score ---------------------------------------------------------------------------------

def fit_line(x, y):
    """Least squares y = intercept + slope x -> Pearson r, slope, intercept. App. E's "r-value" .85 is r^2."""
    return np.corrcoef(x, y)[0, 1], *np.polyfit(x, y, 1)


def read_runs(args):
    """Finished runs on the data set: yields folder, objective, file of its tokens, accuracy in %."""
    import train
    for folder in map(Path, args.probes):
        summary, why = train.read_summary(folder)
        if why or summary["data"] != args.data:
            print(f"{folder}: left out, {why or 'it has other data'}")
            continue
        accuracy = summary["linear"] if args.against == "closing" else None
        for line in train.read_metrics(folder / "probe.jsonl"):    # the last result counts
            kind = f"{line['what']}-{line.get('protocol')}"
            if kind.startswith(args.against) and line["data"] == args.data:
                accuracy = line[line["what"]]
        settings = summary["settings"]
        files = folder / "tokens.npy", folder / "tokenizer.pt", settings["tokens"], settings["tokenizer"]
        files = [file for file in files if Path(file or "").is_file()]
        if accuracy is None or not files:
            print(f"{folder}: left out, it has no tokens, or no result of {args.against}")
            continue
        yield folder, f"{summary['objective']}, {summary['steps']} steps", files[0], 100 * accuracy


def load_labeled_tokens(path, args):
    """Tokens (m, n) and labels (m,) of the training images: by a tokenizer.pt, or stored in a tokens.npy."""
    import kmeans
    import train
    if str(path).endswith(".npy"):
        tokens = kmeans.load_tokens(path)
        ds = train.open_dataset(args.data, classes=args.classes)
    else:
        device = train.setup()
        tokenizer = kmeans.load_tokenizer(path).to(device)
        ds = train.open_dataset(args.data, "train", tokenizer.input_size, args.classes)
        with tempfile.TemporaryDirectory() as folder:
            tokens = np.array(kmeans.tokenize(tokenizer, ds, f"{folder}/tokens.npy", device=device))
    if not ds.classes:
        raise ValueError(f"--data {args.data}: no labels, and TCAS compares classes")
    if args.group == 2:                             # neighbors, 16 bits each, are one token, numbered anew
        tokens = np.unique(tokens.view(np.uint32), return_inverse=True)[1].reshape(len(tokens), -1)
    return tokens, ds.labels


def print_row(name, tokens, labels):
    """A line of the table; returns `tcas_terms`."""
    counts = cooccurrence(tokens, labels, int(tokens.max()) + 1, labels.max() + 1)
    l2, l1 = tcas_terms(counts), tcas_terms(counts, "l1")
    print(f"{str(name)[-40:]:40}{l2['used']:8}{l2['perplexity']:12.1f}{l2['tcas']:9.3f}{l1['tcas']:9.3f}")
    return l2


def draw_lines(dots, args):
    """A least-squares line for each objective (Fig. 4), printed, drawn; dots {name: {TCAS: accuracies}}."""
    import vit
    plt = vit.load_matplotlib()
    for objective, runs in dots.items():
        if len(runs) < 3:
            print(f"{objective}: left out, a line needs 3 tokenizers of unequal TCAS or more")
            continue
        x, y = np.array([(score, np.mean(accuracies)) for score, accuracies in runs.items()]).T
        r, slope, intercept = fit_line(x, y)
        print(f"{objective}: {args.against} = {intercept:.1f} {slope:+.1f} TCAS l2 (%), Pearson r = {r:.3f}, "
              f"r^2 = {r * r:.3f}, {len(x)} tokenizers")
        if plt:
            plt.plot(x, y, "o", label=f"{objective}, r = {r:.2f}")
            plt.axline((0, intercept), slope=slope)
    print("the paper's Table 7: 62.9 -24.0 TCAS, r = -0.920, r^2 = 0.846, 16 tokenizers")
    if plt and plt.get_fignums():
        plt.xlabel("TCAS")
        plt.ylabel(f"{args.against}, %")
        plt.legend()
        vit.save_figure(plt, args.out or "runs/tcas.png")


def score(args):
    """Prints a row per tokenizer, token file and run, the reference rows, the lines through the runs."""
    sources = [(path, None, path, None) for path in args.tokenizer]
    sources += read_runs(args)
    if not sources:
        raise ValueError("nothing to score: give --tokenizer (of kmeans.py fit), --tokens or --probes")
    print(f"{'tokens':40}{'K used':>8}{'perplexity':>12}{'TCAS l2':>9}{'TCAS l1':>9}")
    sizes, dots = set(), {}
    for name, objective, path, accuracy in sources:
        tokens, labels = load_labeled_tokens(path, args)
        terms = print_row(name, tokens, labels)
        sizes.add(terms["used"])
        if objective:                               # runs on the same tokens are one dot, their mean
            dots.setdefault(objective, {}).setdefault(terms["tcas"], []).append(accuracy)
    # What a score can be: 0 for Theorem 1's optimum, and what K lets tokens score that know nothing.
    print_row("labels as tokens", np.broadcast_to(labels[:, None], tokens.shape), labels)
    for k in sorted(sizes):
        print_row("random tokens", np.random.default_rng(0).integers(k, size=tokens.shape), labels)
    if dots:
        draw_lines(dots, args)


def main(argv=None):
    parser = argparse.ArgumentParser(description="TCAS, and its theory; see the top of tcas.py")
    add = parser.add_argument
    add("command", choices=["score", "toy"])
    add("--data", default="textures", help="score: data set with labels, see train.py (%(default)s)")
    add("--classes", help="score: file of the class folders to keep; toy: how many classes (2)")
    add("--tokenizer", "--tokens", nargs="+", action="extend", default=[],
        help="tokenizer.pt files, or tokens.npy files of the training split")
    add("--probes", nargs="+", default=[], help="folders of train.py's runs")
    add("--against", default="closing", help="accuracy of the runs: closing (the table of train.py), or of "
        "probe.py linear-fast, linear-mae, linear-beit, finetune (%(default)s)")
    add("--group", type=int, choices=[2], help="2: neighboring pairs are one token")
    add("--n", type=int, default=10, help="toy: points a class")
    add("--overlap", type=int, default=0, help="toy: points that two classes share")
    add("--graph", choices=["complete", "ring"], default="complete")
    add("--width", type=int, default=1)
    add("--out", help="the picture (runs/tcas.png, runs/toy.png)")
    args = parser.parse_args(argv)
    import train                                    # only here: train.py imports this file
    import vit
    train.check_numbers(parser, args, {"overlap"})
    with vit.exit_on_error("tcas.py"):
        toy(args) if args.command == "toy" else score(args)


if __name__ == "__main__":
    main()
