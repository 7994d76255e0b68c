"""Pre-training objectives on visual tokens: MIM, PIM and MaPeT (Masked and Permuted Vision Transformer, 2306.07346).

    PIM    max E_x E_z  sum_{i >= c} log p(t_{z_i} | x_{z_<i})                      (MaPeT Eq. 1)
    MaPeT  max E_x E_z  sum_{i >= c} log p(t_{z_i} | x_{z_<i}, m_{z_>=i})           (MaPeT Eq. 2)

x_j is a patch, t_j its token, z a random order, c the cutting point, and m_j = mask token + position j: "there is a
patch at j", without its content. MaPeT masks *and* permutes; take one of the two away and its parents appear:
    MaPeT - positions of what is not seen yet (m)    = PIM
    MaPeT - content of targets that were predicted   = MIM (BEiT with random masking)

The cutting point counts the class token, as the paper's Table 6 does: c = 50 of 197 tokens leaves 49 visible patches and
147 targets (75 %). Every target is predicted, each with the cross-entropy of its token.

python objectives.py                                  the masks of all three, 6 patches cut at 3, printed and drawn
python objectives.py mapet --patches 6 --cut 3        one of them
"""
import argparse
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

from vit import init_weights, take


# --- orders and masks ---------------------------------------------------------------------------------------------

def random_order(b, n, generator=None, device=None):
    """(b, n) int64: a fresh random permutation z of the n patches for each image; the first ones are the visible ones."""
    return torch.rand(b, n, generator=generator, device=device).argsort(1)


def two_stream_mask(visible, targets, positions=True):
    """Who may look at whom in PIM and MaPeT: bool (rows, keys), True = may attend (MaPeT Eq. 3, METHODS 1.3).

    visible    V, how many rows every row may see: the class token and the visible patches, i.e. the cutting point c
    targets    T, how many patches are predicted, in the order z
    positions  True: MaPeT, with the T position-only mask tokens; False: PIM, without them

    keys (columns)              V visible | T targets, their content | T mask tokens, position only
    rows  class token, visible      all   |          none            |     all
          target i (content)        all   |       targets <= i       |  of targets > i
          mask token                all   |          none            |     all
          query of target i         all   |       targets <  i       |  of targets >= i

    The patches were permuted before, so this one mask serves every image and every step. Each row of MaPeT's mask has
    V + T keys: every position is seen exactly once, as content or as position.
    """
    V, T = visible, targets
    earlier = torch.ones(T, T).tril(-1).bool()                 # [i, j]: target j comes before target i
    so_far = torch.ones(T, T).tril().bool()                    # ... or is target i itself
    full, none = lambda rows, keys: torch.ones(rows, keys).bool(), lambda rows, keys: torch.zeros(rows, keys).bool()
    content = [[full(V, V), none(V, T), full(V, T)],
               [full(T, V), so_far, ~so_far]]
    mask_tokens = [[full(T, V), none(T, T), full(T, T)]]
    queries = [[full(T, V), earlier, ~earlier]]
    if positions:
        rows = content + mask_tokens + queries
    else:                                                      # PIM: the same without the last rows and columns
        rows = [row[:2] for row in content + queries]
    return torch.cat([torch.cat(row, 1) for row in rows])


# --- objectives ---------------------------------------------------------------------------------------------------

class MaPeT(nn.Module):
    """MaPeT and its two parents: predict the tokens of the patches that come at or after the cutting point of an order.

    permute    the content of predicted targets is revealed to later ones, in a two-stream attention (PIM, MaPeT)
    positions  mask tokens tell where the unseen targets are (MIM, MaPeT)
    cut        the cutting point c, class token included: c - 1 visible patches, T = 1 + n - c targets

    Rows of the sequence, and who they look at (`two_stream_mask`):
        MIM    [cls, visible,          mask tokens]            everyone sees everyone; the mask tokens are the output
        PIM    [cls, visible, targets,              queries]
        MaPeT  [cls, visible, targets, mask tokens, queries]
    Two sub-systems of MaPeT are closed, i.e. look at nothing outside themselves (METHODS 1.3): {cls, visible, mask
    tokens} is exactly MIM's sequence above, and it never learns any target's content; {cls, visible, targets, mask
    tokens} is the content stream, which never sees a query. The queries are therefore an autoregressive layer on top
    that reads a MIM forward: the first query equals the first mask token in every layer, and the k-th query is MIM
    with k - 1 masked patches revealed.
    """
    needs = "tokens"

    def __init__(self, vit, vocab_size, cut, permute=True, positions=True):
        super().__init__()
        n = vit.n_patches
        if not vit.prefix:
            raise ValueError("MIM, PIM and MaPeT need a ViT with a class token: the cutting point counts it")
        if not 1 <= cut <= n:
            raise ValueError(f"cutting point {cut} is out of range: with {n} patches and the class token it is 1 to {n}")
        self.encoder, self.vocab_size, self.cut = vit, vocab_size, cut
        self.permute, self.positions, self.targets = permute, positions, 1 + n - cut
        self.mask_token = nn.Parameter(torch.empty(1, 1, vit.width))
        self.head = nn.Linear(vit.width, vocab_size)
        nn.init.trunc_normal_(self.mask_token, std=.02)
        self.head.apply(init_weights)
        mask = two_stream_mask(cut, self.targets, positions) if permute else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, images, tokens, order=None, noise=None):
        """images (b, 3, S, S) normalised, tokens (b, n) int64 -> loss, a dict of 0-d tensors to log.

        order (b, n): the patches in the order z, visible ones first; None = random_order. noise: see ViT.encode.
        """
        logits, wanted = self.predict(images, tokens, order, noise)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())          # Eq. 1, Eq. 2: all ranks >= c
        return loss, {"accuracy": (logits.detach().argmax(-1) == wanted).float().mean()}

    def predict(self, images, tokens, order=None, noise=None):
        """Logits (b, T, K) of the targets in the order z, and their tokens (b, T)."""
        b, vit = len(images), self.encoder
        order = random_order(b, vit.n_patches, device=images.device) if order is None else order
        target_order = order[:, self.cut - 1:]
        content = vit.embed(images, order if self.permute else order[:, :self.cut - 1])   # [cls, visible, targets?]
        unseen = self.mask_token + vit.positions(target_order)                            # m_j, and g_j before layer 1
        keys = [content] + [unseen] * self.positions
        queries = [unseen] * self.permute                               # MIM asks with the mask tokens themselves
        n_keys = sum(part.shape[1] for part in keys)
        g = vit.encode(torch.cat(keys + queries, 1), self.mask, n_keys, n_out=self.targets, noise=noise)
        return self.head(g), take(tokens, target_order)


OBJECTIVES = {
    "mim": dict(permute=False, positions=True),
    "pim": dict(permute=True, positions=False),
    "mapet": dict(permute=True, positions=True),
}


def make(name, vit, vocab_size=None, cut=None, mask_ratio=None):
    """The objective `name` around `vit`, an nn.Module: forward(images, tokens, order=None) -> (loss, dict to log).

    Say how much is predicted by `cut` (the cutting point, class token included) or by `mask_ratio` (share of the
    patches); the default is the paper's cut at 50 of 197 tokens, i.e. 75 % of the patches, for PIM and MaPeT, and 75 of
    196 patches for MIM. `.encoder` is the ViT that is kept, `.needs` what the objective wants besides images.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}: choose from {', '.join(OBJECTIVES)}")
    if not vocab_size or vocab_size < 2:
        raise ValueError(f"objective {name} needs a vocab_size of at least 2, not {vocab_size}")
    if cut is not None and mask_ratio is not None:
        raise ValueError("give a cutting point or a mask ratio, not both: the one follows from the other")
    if cut is None:
        ratio = mask_ratio if mask_ratio is not None else 75 / 196 if name == "mim" else .75
        if not 0 < ratio <= 1:
            raise ValueError(f"mask ratio {ratio} is out of range: more than 0, at most 1")
        cut = 1 + vit.n_patches - max(1, round(vit.n_patches * ratio))
    return MaPeT(vit, vocab_size, cut, **OBJECTIVES[name])


# --- the masks, printed and drawn ----------------------------------------------------------------------------------

def named_mask(name, order, cut):
    """The mask of an objective with row and column names, for one order (n,) of the patches: (mask, rows, keys).

    x3 is patch 3's content, m3 its mask token, g3 its query; the class token comes first.
    """
    order = [int(j) for j in order]
    visible, targets = ["cls"] + [f"x{j}" for j in order[:cut - 1]], order[cut - 1:]
    permute, positions = OBJECTIVES[name]["permute"], OBJECTIVES[name]["positions"]
    keys = visible + [f"x{j}" for j in targets] * permute + [f"m{j}" for j in targets] * positions
    rows = keys + [f"g{j}" for j in targets] * permute
    mask = two_stream_mask(cut, len(targets), positions) if permute else torch.ones(len(rows), len(keys)).bool()
    return mask, rows, keys


def print_mask(mask, rows, keys):
    print("      " + " ".join(f"{key:>3}" for key in keys) + "   keys")
    for row, sees in zip(rows, mask):
        print(f"{row:>5} " + " ".join("  #" if s else "  ." for s in sees) + f"   {int(sees.sum())}")


def draw_mask(mask, rows, keys, cut, path, cell=26):
    """PNG of a mask as in MaPeT Fig. 2: a line for each row, a column for each key.

    Blue = its content may be attended to, orange = only its position, white = nothing. Black lines part the visible
    rows from the targets, these from the mask tokens, and those from the queries.
    """
    colours = {"c": (49, 104, 173), "x": (49, 104, 173), "m": (236, 151, 60)}
    left, top, right = 2 * cell, 2 * cell, 6 * cell
    picture = Image.new("RGB", (left + cell * len(keys) + right, top + cell * len(rows) + cell), "white")
    draw = ImageDraw.Draw(picture)
    text = lambda x, y, words, anchor="mm": draw.text((x, y), words, fill="black", anchor=anchor, font_size=cell * .48)
    for x, key in enumerate(keys):
        text(left + (x + .5) * cell, top - .5 * cell, key)
    for y, row in enumerate(rows):
        text(left - .8 * cell, top + (y + .5) * cell, row)
        for x, key in enumerate(keys):
            box = (left + x * cell, top + y * cell, left + (x + 1) * cell, top + (y + 1) * cell)
            draw.rectangle(box, fill=colours[key[0]] if mask[y, x] else "white", outline=(205, 205, 205))
    # Where the kind of row changes; the class token counts as visible content.
    kinds = lambda names: ["visible" if i < cut else name[0] for i, name in enumerate(names)]
    edges = lambda names: [i for i, (a, b) in enumerate(zip(kinds(names), kinds(names)[1:]), 1) if a != b]
    for x in edges(keys):
        draw.line((left + x * cell, top, left + x * cell, top + len(rows) * cell), fill="black", width=2)
    for y in edges(rows):
        draw.line((left, top + y * cell, left + len(keys) * cell, top + y * cell), fill="black", width=2)
    captions = {"visible": "content, visible", "x": "content, targets", "m": "mask tokens", "g": "query stream"}
    for y in [0] + edges(rows):
        text(left + (len(keys) + .5) * cell, top + (y + .5) * cell, captions[kinds(rows)[y]], "lm")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    picture.save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print and draw who may attend to whom in MIM, PIM and MaPeT.")
    parser.add_argument("objective", nargs="?", choices=list(OBJECTIVES), help="default: all of them")
    parser.add_argument("--patches", type=int, default=6, metavar="N", help="patches in the image (default 6)")
    parser.add_argument("--cut", type=int, default=3, metavar="C",
                        help="cutting point, class token included: C - 1 visible patches (default 3; paper 50 of 197)")
    parser.add_argument("--seed", type=int, default=0, help="of the random order")
    parser.add_argument("--out", default="runs/masks", metavar="FOLDER", help="for the PNGs (default runs/masks)")
    args = parser.parse_args(argv)
    if not 1 <= args.cut <= args.patches:
        parser.error(f"--cut {args.cut} is out of range: with --patches {args.patches} it is 1 to {args.patches}")
    generator = torch.Generator().manual_seed(args.seed)
    order = random_order(1, args.patches, generator)[0]
    print(f"order z: {' '.join(f'x{int(j)}' for j in order)}; cut {args.cut}: the class token and the first {args.cut - 1} "
          f"are visible, {1 + args.patches - args.cut} are targets. x content, m mask token (position only), g query")
    for name in [args.objective] if args.objective else OBJECTIVES:
        mask, rows, keys = named_mask(name, order, args.cut)
        path = os.path.join(args.out, f"{name}.png")
        print(f"\n{name}: rows attend to columns marked #")
        print_mask(mask, rows, keys)
        draw_mask(mask, rows, keys, args.cut, path)
        print(f"drawn in {path}")


if __name__ == "__main__":
    main()
