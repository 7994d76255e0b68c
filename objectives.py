"""Every pre-training objective of ClusterMIM (2407.09087) and MaPeT (2306.07346): hide patches, predict what they were.

    objective    what the encoder looks at                   who predicts                   what, and the loss on it
    mae          visible patches only                        a decoder                      pixels, MSE
    maskfeat     visible patches only                        a decoder                      HOG or features, MSE
    clustermim   visible patches only                        a decoder                      tokens, cross-entropy
    cae          visible patches only                        a regressor, then a decoder    tokens, and latents (MSE)
    mim, beit    visible patches and mask tokens             the encoder                    tokens
    pim          patches up to the predicted one in order z  the encoder's query stream     tokens
    mapet        the same and mask tokens of all others      the encoder's query stream     tokens

Three classes: `MaskedAutoencoder` (the first three rows differ in the target only), `CAE`, and `MaPeT` (the last three
rows; take one of its two ideas away and its parents appear):
    PIM    max E_x E_z  sum_{i >= c} log p(t_{z_i} | x_{z_<i})                      (MaPeT Eq. 1)
    MaPeT  max E_x E_z  sum_{i >= c} log p(t_{z_i} | x_{z_<i}, m_{z_>=i})           (MaPeT Eq. 2)
    MaPeT - positions of what is not seen yet (m) = PIM;  MaPeT - content of targets that were predicted = MIM

x_j is a patch, t_j its token, z an order of the patches, visible ones first, c the cutting point, and m_j = mask token +
position j: "there is a patch at j", without its content. The cutting point counts the class token, as MaPeT's Table 6
does: c = 50 of 197 tokens leaves 49 visible patches and 147 targets (75 %). `beit` and `cae` hide blocks of patches, all
others random ones: only the order z differs.

python objectives.py                                  who may look at whom: 6 patches cut at 3, printed and drawn
python objectives.py mapet --patches 6 --cut 3        one of them
python objectives.py beit                             and the blocks that it hides
"""
import argparse
import copy
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw

from vit import (MLP, PATCH_FEATURES, Block, LayerScale, gather_patches, init_weights, mae_init, patchify, principal_colors,
                 sincos_positions, unpatchify)
from vit import hog     # noqa: F401: used through PATCH_FEATURES; here because it is an objective's target, like the rest

# --- orders and masks ---------------------------------------------------------------------------------------------

def random_order(b, n, generator=None, device=None):
    """(b, n) int64: a fresh random permutation z of the n patches for each image; the first ones are the visible ones."""
    return torch.rand(b, n, generator=generator, device=device).argsort(1)


def blockwise_mask(b, grid, count, min_block=None, generator=None, device=None, exact=True):
    """BEiT's block-wise masking (METHODS 2.3): bool (b, n), True = hidden, of n = grid * grid patches.

    Rectangles of min_block patches or more are hidden one after the other, as long as they hide something new and no
    more than `count` patches in all; an image whose 10 tries for the next one all fail has enough (BEiT v1).
    min_block  BEiT's scripts: 16 of 196 patches; other grids: the same share
    exact      then hide random patches until `count` are hidden (BEiT v2); False: leave it at the blocks
    All images at once: of the 10 tries, made in parallel, each image takes the first that fits.
    """
    min_block = max(1, round(16 / 196 * grid ** 2)) if min_block is None else min_block
    rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)
    cell = torch.arange(grid, device=device)
    sides = lambda start, length: (cell >= start[..., None]) & (cell < (start + length)[..., None])    # (b, 10, grid)
    mask, going = torch.zeros(b, grid, grid, dtype=torch.bool, device=device), torch.ones(b, 1, device=device).bool()
    while going.any():
        remaining = count - mask.sum((1, 2))[:, None]
        area = min_block + (remaining - min_block) * rand(b, 10)
        aspect = torch.exp(math.log(.3) * (2 * rand(b, 10) - 1))                    # log-uniform between 0.3 and 1 / 0.3
        h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        rows = sides((rand(b, 10) * (grid + 1 - h)).floor(), h)                     # of each block: its rows, its columns
        columns = sides((rand(b, 10) * (grid + 1 - w)).floor(), w)
        new = h * w - ((rows.float() @ mask.float()) * columns).sum(-1)
        fits = going & (h < grid) & (w < grid) & (0 < new) & (new <= remaining)
        first = (fits & (fits.cumsum(1) == 1))[..., None]
        mask |= (rows & first).any(1)[:, :, None] & (columns & first).any(1)[:, None]
        going = fits.any(1, keepdim=True)
    mask = mask.flatten(1)
    if exact:
        last = (mask + rand(b, grid ** 2)).argsort(1)[:, grid ** 2 - count:]         # hidden patches last, random within
        mask = torch.zeros_like(mask).scatter(1, last, True)
    return mask


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
    else:                                                      # PIM: the same without mask tokens
        rows = [row[:2] for row in content + queries]
    return torch.cat([torch.cat(row, 1) for row in rows])


# --- objectives ---------------------------------------------------------------------------------------------------

class Objective(nn.Module):
    """What all objectives share: the encoder that is kept, and which patches are hidden.

    needs   what it wants besides images: "tokens" (b, n) int64, "features" (b, n, values), or None
    logs    names of what forward returns beside the loss
    cut     the cutting point c: c - 1 visible patches, targets = 1 + n - c hidden ones
    smoothing   of the labels, in the cross-entropy; blockwise: hide blocks (`blockwise_mask`), not random patches
    """
    needs, logs = "tokens", ("accuracy",)

    def __init__(self, vit, cut, smoothing=0., blockwise=False):
        super().__init__()
        n = vit.n_patches
        if not 1 <= cut <= n:
            raise ValueError(f"cutting point {cut} is out of range: with {n} patches and the class token it is 1 to {n}")
        self.encoder, self.cut, self.targets = vit, cut, 1 + n - cut
        self.smoothing, self.blockwise = smoothing, blockwise
        # The last forward of an optimiser step? (Gradient accumulation has several; see CAE.)
        self.completes_step = True

    def draw_order(self, b, seed=None, device="cpu"):
        """An order z (b, n) of the patches of each image, visible ones first; a function of the seed if one is given."""
        at = "cpu" if self.blockwise else device               # blocks need decisions, and each waits for a GPU's answer
        generator = None if seed is None else torch.Generator(at).manual_seed(seed)
        if not self.blockwise:
            return random_order(b, self.encoder.n_patches, generator, at)
        mask = blockwise_mask(b, self.encoder.grid, self.targets, generator=generator)
        order = mask.int().argsort(dim=1, stable=True)
        return order.to(device) if torch.device(device).type != "cuda" else order.pin_memory().to(device, non_blocking=True)

    def split(self, images, order):
        """An order (drawn here if None) -> visible patches (b, c - 1), hidden patches (b, T), both in that order."""
        order = self.draw_order(len(images), device=images.device) if order is None else order
        return order[:, :self.cut - 1], order[:, self.cut - 1:]

    def forward(self, images, tokens=None, order=None, noise=None):
        """images (b, 3, S, S) normalised, tokens (b, n) or what `needs` says -> loss, dict of 0-d tensors to log.

        order (b, n): visible patches first; None = draw_order. noise: see ViT.encode.
        """
        prediction, wanted = self.predict(images, tokens, order, noise)
        return self.loss(prediction, wanted)

    def loss(self, logits, wanted):
        """Cross-entropy, the mean over all targets: logits (b, T, K), tokens (b, T); with the share that is right."""
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), label_smoothing=self.smoothing)
        return loss, {"accuracy": (logits.detach().argmax(-1) == wanted).float().mean()}


class Decoder(nn.Module):
    """Transformer blocks, final norm and head: rows (b, m, d) -> (b, n_out, values), of the last n_out rows."""

    def __init__(self, width, depth, heads, values, layer_scale=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale=layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, values)

    def forward(self, x, n_out):
        for block in self.blocks[:-1]:
            x = block(x)
        for block in self.blocks[-1:]:                          # asks for the wanted rows only
            x = block(x, n_out=n_out)
        return self.head(self.norm(x[:, -n_out:]))


class MaskedAutoencoder(Objective):
    """MAE, MaskFeat and ClusterMIM: encode the visible quarter, decode the rest; they differ in the target alone.

        latent     = encoder([cls ; visible patches + pos])                      25 % of the rows: this is why it is fast
        prediction = decoder([W latent ; mask tokens] + pos)  at the mask tokens
        loss       = MSE(prediction, target)                                     MAE, MaskFeat
                   = CE(prediction, t(x))                                        ClusterMIM (Sec. 3.2, METHODS 4)

    target   "tokens": ClusterMIM, t(x) of a codebook of `size`; "pixel", "pixel-norm" (each patch standardised): MAE;
             "hog": MaskFeat; "features": MaskFeat, rows of `size` values, brought to unit length
    depth    of the decoder; its width is 2/3 of the encoder's, at most 512, in heads of 32 (METHODS 4.1)
    The rows stay in the order z: MAE puts them back into raster order before its decoder, which attention cannot notice.
    """

    def __init__(self, vit, cut, size=None, target="tokens", depth=8, smoothing=0.):
        super().__init__(vit, cut, smoothing)
        self.target = target
        self.needs = target if target in ("tokens", "features") else None
        self.logs = ("accuracy",) if target == "tokens" else ("explained",)
        if not self.needs:
            images = torch.empty(1, 3, vit.image_size, vit.image_size, device="meta")       # for the shape only
            size = PATCH_FEATURES[target](images, vit.patch_size).shape[-1]
        width = min(512, max(32, 2 * vit.width // 3 // 32 * 32))
        self.narrow = nn.Linear(vit.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("pos", sincos_positions(vit.grid, width, prefix=0), persistent=False)
        self.decoder = Decoder(width, depth, width // 32, size)
        self.narrow.apply(mae_init)
        self.decoder.apply(mae_init)
        self.decoder.head.apply(init_weights)                   # small: an untrained network starts at ln K
        nn.init.normal_(self.mask_token, std=.02)

    def predict(self, images, tokens=None, order=None, noise=None):
        """Predictions (b, T, size) at the hidden patches, in the order z, and what they should be."""
        vit, (visible, hidden) = self.encoder, self.split(images, order)
        latent = self.narrow(vit.encode(vit.embed(images, visible), noise=noise))
        cls, latent = latent[:, :vit.prefix], latent[:, vit.prefix:]
        patches = torch.cat([latent, self.mask_token.expand(*hidden.shape, -1)], 1)
        patches = patches + gather_patches(self.pos.expand(len(images), -1, -1), torch.cat([visible, hidden], 1))
        prediction = self.decoder(torch.cat([cls, patches], 1), hidden.shape[1])        # cls: its position is zero
        return prediction, gather_patches(self.wanted(images, tokens), hidden)

    @torch.no_grad()
    def wanted(self, images, given=None):
        """The target of every patch: (b, n) int64, or (b, n, size) float32."""
        if self.target == "tokens":
            return given
        with torch.autocast(images.device.type, enabled=False):
            if self.target == "features":
                return F.normalize(given.float(), dim=-1)
            return PATCH_FEATURES[self.target](images.float(), self.encoder.patch_size)

    def loss(self, prediction, wanted):
        if self.target == "tokens":
            return super().loss(prediction, wanted)
        loss = F.mse_loss(prediction, wanted)
        # Beside predicting the mean of the batch for every patch: 0 = no better, 1 = perfect.
        return loss, {"explained": 1 - loss.detach() / wanted.var((0, 1), unbiased=False).mean()}


class RegressorBlock(nn.Module):
    """Cross-attention of CAE's latent contextual regressor: hidden rows ask, visible and hidden rows answer."""

    def __init__(self, width, heads, layer_scale=None):
        super().__init__()
        scale = lambda: nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(4))
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.mlp = MLP(width, 4 * width)
        self.ls1, self.ls2 = scale(), scale()

    def forward(self, x, visible, pos, pos_visible):
        """Hidden x (b, T, d), visible (b, v, d), and where they are -> (b, T, d). Values carry no position."""
        rows, where = torch.cat([visible, x], 1), torch.cat([pos_visible, pos], 1)
        q, k, v = self.q(self.norm_q(x + pos)), self.k(self.norm_k(rows + where)), self.v(self.norm_v(rows))
        q, k, v = (rearrange(y, "b r (h d) -> b h r d", h=self.heads) for y in (q, k, v))
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b h r d -> b r (h d)")
        # CAE's quirk: the *normalised* rows go on as the residual, where a ViT block would keep the sum itself.
        x = self.norm2(x + self.ls1(self.proj(y)))
        return x + self.ls2(self.mlp(x))


class CAE(Objective):
    """Context Autoencoder (METHODS 3): guess the latents of hidden patches from those of visible ones, then the tokens.

        latent = encoder([cls ; visible])             latents of visible patches; the encoder sees nothing else
        guess  = regressor(mask tokens | latent)      4 cross-attention blocks
        target = teacher([cls ; hidden])              the encoder of one optimiser step before, without gradient
        loss   = CE(decoder(guess + pos), t(x)) + 2 MSE(guess, target)
    So the encoder only encodes; that the latents agree (alignment) leaves the prediction to the regressor. Both parts are
    as wide as the encoder. The published encoder has no bias on keys: adding one changes no attention.
    """
    logs = "accuracy", "alignment"

    def __init__(self, vit, cut, vocab_size, depth=4, align=2., smoothing=0., blockwise=False):
        super().__init__(vit, cut, smoothing, blockwise)
        width, heads = vit.width, vit.blocks[0].attn.heads
        self.align = align
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.regressor = nn.ModuleList(RegressorBlock(width, heads, vit.layer_scale) for _ in range(depth))
        self.regressor_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder = Decoder(width, depth, heads, vocab_size, vit.layer_scale)
        self.regressor.apply(init_weights)
        self.decoder.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=.02)
        self.teacher = copy.deepcopy(vit).eval().requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()                                      # its latents are a target: no stochastic depth
        return self

    def predict(self, images, tokens, order=None, noise=None):
        """Logits (b, T, K) of the hidden patches, in the order z, and their tokens (b, T)."""
        logits, _, _, hidden = self.run(images, order, noise)
        return logits, gather_patches(tokens, hidden)

    def forward(self, images, tokens=None, order=None, noise=None):
        logits, guess, target, hidden = self.run(images, order, noise)
        loss, logs = self.loss(logits, gather_patches(tokens, hidden))
        alignment = F.mse_loss(guess, target)
        return loss + self.align * alignment, {**logs, "alignment": alignment.detach()}

    def run(self, images, order, noise):
        """-> logits (b, T, K), guessed and true latents (b, T, d), the hidden patches (b, T)."""
        vit, (visible, hidden) = self.encoder, self.split(images, order)
        latent = vit.encode(vit.embed(images, visible), noise=noise)[:, vit.prefix:]
        with torch.no_grad():
            target = self.teacher.encode(self.teacher.embed(images, hidden))[:, vit.prefix:]
        if self.training and self.completes_step:
            self.update_teacher()
        pos, pos_visible = vit.positions(hidden), vit.positions(visible)
        guess = self.mask_token.expand(*hidden.shape, -1)
        for block in self.regressor:
            guess = block(guess, latent, pos, pos_visible)
        guess = self.regressor_norm(guess)
        return self.decoder(guess + pos, hidden.shape[1]), guess, target, hidden

    @torch.compiler.disable
    @torch.no_grad()
    def update_teacher(self):
        """Keep the weights that this step is about to change: the next step's targets are theirs."""
        for old, new in zip(self.teacher.parameters(), self.encoder.parameters()):
            old.copy_(new)


class MaPeT(Objective):
    """MaPeT and its parents: predict the tokens of the patches that come at or after the cutting point of an order.

    permute    the content of predicted targets is revealed to later ones, in a two-stream attention (PIM, MaPeT)
    positions  mask tokens tell where the unseen targets are (MIM, BEiT, MaPeT)

    Rows of the sequence, and who they look at (`two_stream_mask`):
        MIM, BEiT  [cls, visible,          mask tokens]            everyone sees everyone; the mask tokens are the output
        PIM        [cls, visible, targets,              queries]
        MaPeT      [cls, visible, targets, mask tokens, queries]
    Two sub-systems of MaPeT are closed, i.e. look at nothing outside themselves (METHODS 1.3): {cls, visible, mask
    tokens} is exactly MIM's sequence above, and it never learns any target's content; {cls, visible, targets, mask
    tokens} is the content stream, which never sees a query. The queries are therefore an autoregressive layer on top
    that reads a MIM forward: the first query equals the first mask token in every layer, and the k-th query is MIM
    with k - 1 masked patches revealed.
    """

    def __init__(self, vit, cut, vocab_size, permute=True, positions=True, smoothing=0., blockwise=False):
        super().__init__(vit, cut, smoothing, blockwise)
        if not vit.prefix:
            raise ValueError("MIM, BEiT, PIM and MaPeT need a ViT with a class token: the cutting point counts it")
        self.permute, self.positions = permute, positions
        self.mask_token = nn.Parameter(torch.empty(1, 1, vit.width))
        self.head = nn.Linear(vit.width, vocab_size)
        nn.init.trunc_normal_(self.mask_token, std=.02)
        self.head.apply(init_weights)
        mask = two_stream_mask(cut, self.targets, positions) if permute else None
        self.register_buffer("mask", mask, persistent=False)

    def predict(self, images, tokens, order=None, noise=None):
        """Logits (b, T, K) of the targets in the order z, and their tokens (b, T)."""
        vit, (visible, target_order) = self.encoder, self.split(images, order)
        shown = torch.cat([visible, target_order], 1) if self.permute else visible
        content = vit.embed(images, shown)                              # [cls, visible, targets?]
        unseen = self.mask_token + vit.positions(target_order)          # m_j, and g_j before layer 1
        keys = [content] + [unseen] * self.positions
        queries = [unseen] * self.permute                               # MIM asks with the mask tokens themselves
        n_keys = sum(part.shape[1] for part in keys)
        g = vit.encode(torch.cat(keys + queries, 1), self.mask, n_keys, n_out=self.targets, noise=noise)
        return self.head(g), gather_patches(tokens, target_order)                 # Eq. 1, Eq. 2: all ranks >= c


# What separates the objectives: class, its switches, and the share of patches that is hidden by default.
OBJECTIVES = {
    "mae": (MaskedAutoencoder, dict(), .75),
    "maskfeat": (MaskedAutoencoder, dict(), .75),
    "clustermim": (MaskedAutoencoder, dict(), .75),
    "cae": (CAE, dict(blockwise=True), .5),
    "beit": (MaPeT, dict(permute=False, positions=True, blockwise=True), 75 / 196),
    "mim": (MaPeT, dict(permute=False, positions=True), 75 / 196),
    "pim": (MaPeT, dict(permute=True, positions=False), .75),
    "mapet": (MaPeT, dict(permute=True, positions=True), .75),
}
TARGETS = {"mae": ("pixel", "pixel-norm"), "maskfeat": ("hog", "features")}     # the others predict tokens


def make(name, vit, vocab_size=None, cut=None, mask_ratio=None, target=None, label_smoothing=0., decoder_depth=None):
    """The objective `name` around `vit`, an nn.Module: forward(images, tokens, order=None) -> (loss, dict to log).

    vocab_size       codebook size K; of maskfeat with target="features" the values a patch
    cut, mask_ratio  how much is hidden: the cutting point, class token included, or a share of the patches; the defaults
                     are the papers' (MaPeT's 75 % is its cut at 50 of 197 tokens)
    target           mae: "pixel" or "pixel-norm" (each patch standardised); maskfeat: "hog" or "features"
    decoder_depth    of mae, maskfeat and clustermim (8 blocks); of cae's regressor and of its decoder (4 each)
    `.encoder` is the ViT that is kept, as it comes; `.needs` is what the objective wants besides images.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}: choose from {', '.join(OBJECTIVES)}")
    choices = TARGETS.get(name, ("tokens",))
    target = target or choices[0]
    if target not in choices:
        raise ValueError(f"{name} cannot predict {target!r}: choose from {', '.join(choices)}")
    if target in ("tokens", "features") and (vocab_size or 0) < (2 if target == "tokens" else 1):
        raise ValueError(f"objective {name} needs a vocab_size, of at least 2 tokens, not {vocab_size}")
    if cut is not None and mask_ratio is not None:
        raise ValueError("give a cutting point or a mask ratio, not both: the one follows from the other")
    kind, options, ratio = OBJECTIVES[name]
    if cut is None:
        ratio = ratio if mask_ratio is None else mask_ratio
        if not 0 < ratio <= 1:
            raise ValueError(f"mask ratio {ratio} is out of range: more than 0, at most 1")
        cut = 1 + vit.n_patches - max(1, round(vit.n_patches * ratio))
    options = dict(options, smoothing=label_smoothing)
    if kind is MaskedAutoencoder:
        options["target"] = target
    if kind is not MaPeT and decoder_depth is not None:
        options["depth"] = decoder_depth
    return kind(vit, cut, vocab_size, **options)


# --- the masks, printed and drawn ----------------------------------------------------------------------------------

def list_stages(name, order, cut):
    """Who looks at whom in each network of an objective, for one order (n,): a list of (network, mask, rows, keys).

    Rows and keys are names: cls, x3 = patch 3's content, m3 its mask token (position only), g3 its query.
    """
    kind, options, _ = OBJECTIVES[name]
    named = lambda letter, patches: [f"{letter}{int(j)}" for j in patches]
    visible, targets = ["cls"] + named("x", order[:cut - 1]), order[cut - 1:]
    m, everyone = named("m", targets), lambda rows, keys: torch.ones(len(rows), len(keys)).bool()
    if kind is MaskedAutoencoder:
        both = visible + m
        return [("encoder", everyone(visible, visible), visible, visible), ("decoder", everyone(both, both), both, both)]
    if kind is CAE:
        keys = visible[1:] + m                                  # the class token stays in the encoder
        return [("encoder", everyone(visible, visible), visible, visible), ("regressor", everyone(m, keys), m, keys),
                ("decoder", everyone(m, m), m, m)]
    permute, positions = options["permute"], options["positions"]
    keys = visible + named("x", targets) * permute + m * positions
    rows = keys + named("g", targets) * permute
    return [("encoder", two_stream_mask(cut, len(m), positions) if permute else everyone(rows, keys), rows, keys)]


def print_mask(mask, rows, keys):
    print("      " + " ".join(f"{key:>3}" for key in keys) + "   keys")
    for row, sees in zip(rows, mask):
        print(f"{row:>5} " + " ".join("  #" if s else "  ." for s in sees) + f"   {int(sees.sum())}")


def draw_mask(mask, rows, keys, visible, path, cell=26):
    """PNG of a mask as in MaPeT Fig. 2: a line for each row, a column for each key; `visible` names those of V.

    Blue = its content may be attended to, orange = only its position, white = nothing. Black lines part the visible
    rows from the targets, these from the mask tokens, and those from the queries.
    """
    colors = {"c": (49, 104, 173), "x": (49, 104, 173), "m": (236, 151, 60)}
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
            draw.rectangle(box, fill=colors[key[0]] if mask[y, x] else "white", outline=(205, 205, 205))
    # Where the kind of row changes; the class token counts as visible content.
    kinds = lambda names: ["visible" if name in visible else name[0] for name in names]
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


# --- what was predicted, drawn ---------------------------------------------------------------------------------------

def hog_picture(x, p):
    """HOG (b, n, 27 m^2) -> patches (b, n, p*p*3) in 0..1: in each cell nine strokes along the edges, bright if strong."""
    m = math.isqrt(x.shape[-1] // 27)
    bins = rearrange(x, "b n (c o i j) -> b n c o i j", c=3, o=9, i=m).clamp(min=0).mean(2)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, p // m, device=x.device)] * 2, indexing="ij")
    angle = (torch.arange(9, device=x.device) + .5) * math.pi / 9           # of the gradient, from the y axis
    along = torch.cos(angle)[:, None, None] * x - torch.sin(angle)[:, None, None] * y      # the edge is square to it
    across = torch.sin(angle)[:, None, None] * x + torch.cos(angle)[:, None, None] * y
    strokes = torch.exp(-8 * across ** 2) * (along.abs() < 1)
    gray = torch.einsum("bnoij,oyx->bniyjx", bins, strokes)
    gray = rearrange(gray, "b n i y j x -> b n (i y j x) 1") / gray.amax().clamp(min=1e-6)
    return gray.expand(-1, -1, -1, 3).flatten(2)


@torch.no_grad()
def predictions(model, images, mean, std, tokens=None, patch_of=None, seed=0):
    """Rows of images (b, 3, S, S): the images, what was visible, what was predicted, and for what is no image the target.

    images (b, 3, S, S) in 0..1, mean and std (3,) of the normalisation, tokens as in forward (None: not known);
    patch_of (K, 3 p^2) in 0..1: a picture of each code.
    """
    p, b, kept = model.encoder.patch_size, len(images), model.training
    mean, std = (torch.tensor(v, device=images.device) for v in (mean, std))
    x = (images - mean[:, None, None]) / std[:, None, None]
    order = model.draw_order(b, seed, images.device)
    hidden = order[:, model.cut - 1:, None]
    put = lambda values, at: at.scatter(1, hidden.expand(values.shape), values.to(at))
    given = tokens if tokens is not None else order.clamp(max=0)            # any token: only the target row needs them
    predicted, wanted = model.eval().predict(x, given, order)
    model.train(kept)
    patches = patchify(images, p)
    gray = torch.full((b, model.targets, patches.shape[-1]), .5, device=images.device)
    rows = [images, unpatchify(put(gray, patches), p)]
    if model.needs == "tokens":
        shown = [patch_of[predicted.argmax(-1)]] + [patch_of[wanted]] * (tokens is not None)
        rows += [unpatchify(put(values, patches), p) for values in shown]
    elif model.target.startswith("pixel"):
        predicted = predicted.float()
        if model.target == "pixel-norm":                                    # in the hidden patch's own mean and contrast
            own = gather_patches(patchify(x, p), hidden[..., 0])
            predicted = predicted * (own.var(-1, keepdim=True) + 1e-6).sqrt() + own.mean(-1, keepdim=True)
        values = predicted * std.repeat(p * p) + mean.repeat(p * p)         # patchify's order: the channel runs fastest
        rows.append(unpatchify(put(values, patches), p))
    else:
        whole = model.wanted(x, tokens)
        pair = [put(predicted.float(), whole), whole]
        if model.target == "hog":
            pair = [hog_picture(v, p) for v in pair]
        else:
            target, guess = principal_colors(whole, pair[0])
            pair = [guess.repeat(1, 1, p * p), target.repeat(1, 1, p * p)]
        rows += [unpatchify(v, p) for v in pair]
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print and draw what each objective hides, and who may look at whom.")
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
        several = list_stages(name, order, args.cut)
        for network, mask, rows, keys in several:
            path = os.path.join(args.out, f"{name}-{network}.png" if len(several) > 1 else f"{name}.png")
            print(f"\n{name}, {network}: rows attend to columns marked #")
            print_mask(mask, rows, keys)
            draw_mask(mask, rows, keys, {"cls"} | {f"x{int(j)}" for j in order[:args.cut - 1]}, path)
            print(f"drawn in {path}")
        if args.objective and OBJECTIVES[name][1].get("blockwise"):
            hidden = round(196 * OBJECTIVES[name][2])
            print(f"\n{name} hides blocks: {hidden} of 14 x 14 patches, marked #")
            for line in blockwise_mask(1, 14, hidden, generator=generator).view(14, 14):
                print("      " + " ".join("#" if hide else "." for hide in line))


if __name__ == "__main__":
    main()
