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

python tcas.py score --data textures --tokenizer a.pt b.pt   beside it: random tokens of the same K
python tcas.py score --probes runs/*                         finished runs: Pearson r, a line per objective
python tcas.py toy --n 10 --overlap 2 --n-classes 2          Sec. 2.2 by brute force and by algebra, seconds
python tcas.py toy --n 12 --ring 1                           a sparse graph, where neighbors only are linked
"""
import argparse
import os

import numpy as np
import torch


# --- token-class alignment similarity (Sec. 3.1) ----------------------------------------------------------

def cooccurrence(tokens, labels, k, c):
    """R (k, c) int64: how many patches have each of k tokens, in images of each of c classes (Sec. 3.1).

    tokens (m, n), an image a row: array, memory map or tensor on the CPU, read class by class; labels (m,),
    images with another label than 0..c-1 do not count.
    """
    tokens = np.asarray(tokens)
    labels = np.asarray(labels)
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
    r = torch.nn.functional.normalize(r, p=1 if norm == "l1" else 2, dim=1)
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
    labels = labels if known else 0 * labels
    terms = tcas_terms(cooccurrence(tokens, labels, k, labels.max() + 1))
    line = (f"codebook: {terms['used']} of {k} codes used, perplexity {terms['perplexity']:.1f}; a guess by "
            f"code frequency has loss {np.log(terms['perplexity']):.3f}")
    return f"{line}; TCAS {terms['tcas']:.3f} (0: no two tokens share a class)" if known else line


# --- the toy model (Sec. 2.2, App. B and C), point by point -----------------------------------------------

def populations(n, overlap, classes):
    """Classes of n points, any two share `overlap` -> (points, 2) int, group by group: both classes of a
    point, or its only one twice; membership z (points, classes): 1 where it is in the class, else 0."""
    exclusive = n - (classes - 1) * overlap
    if n % 2 or overlap % 2 or classes < 2 or exclusive < 1 or classes * n > 2000:
        raise ValueError(f"--n-classes {classes} --n {n} --overlap {overlap}: needs 2 classes, at most 2000 "
                         "points, (classes - 1) * overlap < n, and even numbers: tokens halve groups")
    points = []
    for c in range(classes):
        for other in range(c, classes):
            points += [(c, other)] * (exclusive if other == c else overlap)
    return np.array(points), np.eye(classes)[points].max(1)


def assign_tokens(tokenizer, points):
    """The token of every point, numbered from 0 on; `tokenizer`: a name, or a list of tokens.

    points (points, 2) of `populations`, in groups of even numbers: every other one is half of each group.
    """
    # S^MAE: every point is a token. S^class: the label, of points of two classes in turn. S^cross: two
    # tokens, each has half of every group. Pairs (ours, for the ring): two neighbors are a token.
    place = np.arange(len(points))
    named = {"mae": place, "classwise": points[place, place % 2],
             "crossclass": place % 2, "pairs": place // 2}
    tokens = named[tokenizer] if isinstance(tokenizer, str) else tokenizer
    return np.unique(tokens, return_inverse=True)[1]


def mask_graph(z, ring=None):
    """M(x1, x2) (points, points), the joint probability of both views: draw a class, a point of it, then a
    second one, any (the complete graph, App. B) or, in a circle, at most `ring` places away (ours)."""
    mask = 0
    for member in z.T:
        linked = np.outer(member, member)
        if ring:
            place = member.cumsum()
            near = np.subtract.outer(place, place) % member.sum() <= ring
            linked *= near | near.T
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
    """The numbers of `toy_model` and the graph A, from mask (points, points), z, tokens (points,)."""
    _, graph, normalized = augmentation_graph(mask, tokens)
    classes = z.shape[1]
    owners = z.sum(1)
    label = z / owners[:, None]                                    # of shared points: evenly
    single = np.outer(owners, owners) == 1                         # pairs of points of one class only
    inside = z @ z.T > 0                                           # pairs of points that share a class
    alpha = (graph * (1 - label @ label.T)).sum()
    spectrum = np.linalg.eigvalsh(normalized)                      # the largest last
    tail = spectrum[:-classes]
    total = spectrum @ spectrum
    return {"w_in": graph[single & inside].mean(), "w_x": graph[single & ~inside].mean(),
            "sum": total, "alpha": alpha, "tail": tail @ tail, "linked": (graph[inside] > 1e-12).mean(),
            "bound": total + classes * alpha, "graph": graph}


def toy_model(n, overlap, tokenizer="mae", classes=2, ring=None):
    """The augmentation graph of one tokenizer in the world of Sec. 2.2, point by point: a dict of numbers.

    w_in, w_x   mean edge weight of two points of one class only, of the same or of different classes
    sum, tail   of squared eigenvalues: of all (Eq. 17); of all but the `classes` largest (HaoChen et al.)
    alpha       labeling error P(y(x) != y(x')) (Eq. 18), points of two classes count half for each
    linked      fraction of the pairs of one class that have an edge at all
    bound       c1 sum + c2 alpha (Eq. 3), less is better; here c1 = 1, c2 = `classes`
    """
    points, z = populations(n, overlap, classes)
    return measure_graph(mask_graph(z, ring), z, assign_tokens(tokenizer, points))


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
    return {"w_in": (mu + t_x) / scale, "w_x": t_x / scale,
            "sum": 1 + (classes - 1) * (mu * kappa) ** 2,
            "alpha": (classes - 1) / classes * (1 - mu * kappa ** 2)}


def window(better, worse, spectrum="sum"):
    """(low, high): the c2/c1 where `better` has at most the c1 sum + c2 alpha of `worse`; inf, inf: none."""
    gain = round(worse[spectrum] - better[spectrum], 12)
    cost = round(better["alpha"] - worse["alpha"], 12)             # c2 cost <= c1 gain
    if cost > 0:
        return 0, max(0, gain / cost)
    if gain >= 0:
        return 0, np.inf
    return gain / cost if cost else np.inf, np.inf


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
    print(f"{name:12}", *[f"{key} {value:.6f}" for key, value in numbers.items()])


def print_window(order, low, high):
    print(f"{order:44} c2/c1", f"{low:.4g} to {high:.4g}" if low < high else "never")


def toy(args):
    """Prints the numbers of each tokenizer, by brute force and by algebra, the windows; draws the graphs."""
    import vit
    print(toy_model.__doc__)
    toys, rows = {}, {}
    for name in ("mae", "classwise", "crossclass", "pairs"):
        numbers = toys[name] = toy_model(args.n, args.overlap, name, args.n_classes, args.ring)
        graph = torch.from_numpy(numbers.pop("graph"))              # A, points sorted by class;
        rows[name] = (1 - graph / graph.max()).expand(1, 3, -1, -1)  # dark: its largest weight
        print_numbers(name, numbers)
        if name != "pairs" and not args.ring:
            print_numbers("  algebra", closed_form(args.n, args.overlap, name, args.n_classes))
    print("\nbound of the left <= bound of the right for these c2/c1; with the sum of all, or the tail")
    z = np.eye(2).repeat(4, 0)                      # Theorem 1: two classes without overlap
    for key, found in theorem1(mask_graph(z, args.ring), z).items():
        print_window(f"labels <= all others (Theorem 1), {key}", *found)
        for better, worse in (("classwise", "mae"), ("mae", "crossclass")):
            print_window(f"{better} <= {worse}, {key}", *window(toys[better], toys[worse], key))
    vit.draw_rows(rows, "runs/toy.png")


# --- python tcas.py score ---------------------------------------------------------------------------------

def read_runs(args):
    """Finished runs on the data set: yields the file of its tokens, objective, accuracy in %."""
    import train
    for folder in args.probes:
        summary, why = train.read_summary(folder)
        if why or summary["data"] != args.data:
            print(f"{folder}: left out, {why or 'it has other data'}")
            continue
        accuracy = summary["linear"] if args.against == "closing" else None
        for line in train.read_metrics(f"{folder}/probe.jsonl"):   # the last result counts
            kind = f"{line['what']}-{line.get('protocol')}"
            if kind.startswith(args.against) and line["data"] == args.data:
                accuracy = line[line["what"]]
        settings = summary["settings"]
        path = settings["tokens"] or f"{folder}/tokens.npy"
        if not os.path.exists(path):
            path = settings["tokenizer"] or f"{folder}/tokenizer.pt"
        if accuracy is None or not os.path.exists(path):
            print(f"{folder}: left out, it has no tokens, or no result of {args.against}")
            continue
        yield path, f"{summary['objective']}, {summary['steps']} steps", 100 * accuracy


def load_labeled_tokens(path, args):
    """Tokens (m, n) and labels (m,) of the training images: by a tokenizer.pt, or stored in a tokens.npy."""
    import kmeans
    import train
    if path.endswith(".npy"):
        tokens = kmeans.load_tokens(path)
        ds = train.open_dataset(args.data, classes=args.classes)
    else:
        device = train.setup()
        tokenizer = kmeans.load_tokenizer(path).to(device)
        ds = train.open_dataset(args.data, "train", tokenizer.input_size, args.classes)
        tokens = kmeans.run_network(tokenizer, ds, device, 0).numpy(force=True).astype("uint16")
    if not ds.classes:
        raise ValueError(f"--data {args.data}: no labels, and TCAS compares classes")
    if args.group:                                  # neighbors, 16 bits each, are one token, numbered anew
        tokens = np.unique(tokens.view(np.uint32), return_inverse=True)[1].reshape(len(tokens), -1)
    return tokens, ds.labels


def draw_lines(dots, args):
    """A least-squares line for each objective (Fig. 4), printed, drawn; dots {name: {TCAS: accuracies}}."""
    import vit
    plt = vit.load_matplotlib()
    for objective, runs in dots.items():
        x = list(runs)
        y = list(map(np.mean, runs.values()))
        if plt:
            plt.plot(x, y, "o", label=objective)
        if len(x) < 3:
            print(f"{objective}: no line, it needs 3 tokenizers of unequal TCAS or more")
            continue
        slope, intercept = np.polyfit(x, y, 1)
        r = np.corrcoef(x, y)[0, 1]                 # App. E's "r-value" .85 is r^2
        print(f"{objective}: {args.against} = {intercept:.1f} {slope:+.1f} TCAS l2 (%), Pearson r = {r:.3f}, "
              f"r^2 = {r * r:.3f}, {len(x)} tokenizers")
        if plt:
            plt.axline((0, intercept), slope=slope)
    print("the paper's Table 7: 62.9 -24.0 TCAS, r = -0.920, r^2 = 0.846, 16 tokenizers")
    if plt:
        plt.xlabel("TCAS")
        plt.ylabel(f"{args.against}, %")
        plt.legend()
        vit.save_figure(plt, "runs/tcas.png")


def score(args):
    """Prints a row per tokenizer, token file and run, and the lines through the runs."""
    sources = [(path, None, None) for path in args.tokenizer]
    sources += read_runs(args)
    print(f"on {args.data}; compare at equal K only; random: TCAS l2 of as many random tokens\n"
          f"{'tokens':40}{'K used':>8}{'perplexity':>12}{'TCAS l2':>9}{'TCAS l1':>9}{'random':>9}")
    dots = {}
    for path, objective, accuracy in sources:
        tokens, labels = load_labeled_tokens(path, args)
        c = labels.max() + 1
        counts = cooccurrence(tokens, labels, int(tokens.max()) + 1, c)
        terms = tcas_terms(counts)
        k = terms["used"]
        random = tcas(cooccurrence(
            np.random.default_rng(0).integers(k, size=tokens.shape), labels, k, c))
        print(f"{path[-40:]:40}{k:8}{terms['perplexity']:12.1f}{terms['tcas']:9.3f}"
              f"{tcas(counts, 'l1'):9.3f}{random:9.3f}")
        if objective:                               # runs on the same tokens are one dot, their mean
            dots.setdefault(objective, {}).setdefault(terms["tcas"], []).append(accuracy)
    if dots:
        draw_lines(dots, args)


def main(argv=None):
    parser = argparse.ArgumentParser(description="TCAS, and its theory; see the top of tcas.py")
    add = parser.add_argument
    add("command", choices=["score", "toy"])
    add("--data", default="textures", help="score: data set with labels, see train.py (%(default)s)")
    add("--classes", help="score: file of the class folders to keep")
    add("--tokenizer", "--tokens", nargs="+", action="extend", default=[],
        help="tokenizer.pt files, or tokens.npy files of the training split")
    add("--probes", nargs="+", default=[], help="folders of train.py's runs")
    add("--against", default="closing", help="accuracy of the runs: closing (the table of train.py), or of "
        "probe.py linear-fast, linear-mae, linear-beit, finetune (%(default)s)")
    add("--group", choices=["2"], help="2: neighboring pairs are one token")
    add("--n-classes", type=int, default=2, help="toy: how many classes")
    add("--n", type=int, default=10, help="toy: points a class")
    add("--overlap", type=int, default=0, help="toy: points that two classes share")
    add("--ring", type=int, help="toy: points stand in a circle, views at most so many places apart (any)")
    args = parser.parse_args(argv)
    import train                                    # only here: train.py imports this file
    import vit
    train.check_numbers(parser, args, {"overlap"})
    with vit.exit_on_error("tcas.py"):
        toy(args) if args.command == "toy" else score(args)


if __name__ == "__main__":
    main()
