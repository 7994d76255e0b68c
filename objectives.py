"""Every pre-training objective of ClusterMIM (2407.09087) and MaPeT (2306.07346): hide patches, predict them.

    objective    what the encoder looks at              who predicts                 what, and the loss on it
    mae          visible patches only                   a decoder                    pixels, MSE
    maskfeat     visible patches only                   a decoder                    HOG or features, MSE
    clustermim   visible patches only                   a decoder                    tokens, cross-entropy
    cae          visible patches only                   a regressor, then a decoder  tokens, and latents (MSE)
    mim, beit    visible patches and mask tokens        the encoder                  tokens
    pim          patches before the target in order z   the encoder's query stream   tokens
    mapet        the same and mask tokens of the rest   the encoder's query stream   tokens
    dvae, vq     all patches                            a decoder, from codes        pixels, MSE
    peco         all patches                            a decoder, from codes        pixels and features, MSE
    vqkd         all patches                            a decoder, from codes        a teacher's features, cosine

Rows 1 to 3 are one class, `MaskedAutoencoder`; the last three another, `LearnedTokenizer`: its codes are tokens for
the others. MIM, BEiT, PIM and MaPeT are a third, `MaPeT`: take one of its two ideas away and its parents appear:
    PIM    max E_x E_z  sum_{i >= c} log p(t_{z_i} | x_{z_<i})                      (MaPeT Eq. 1)
    MaPeT  max E_x E_z  sum_{i >= c} log p(t_{z_i} | x_{z_<i}, m_{z_>=i})           (MaPeT Eq. 2)
    MaPeT without positions of what is not seen yet (m) is PIM, without content of predicted targets MIM.
x_j is a patch, t_j its token, z an order of the patches, visible ones first, c the cutting point, and
m_j = mask token + position j: "there is a patch at j", without its content. c counts the class token (MaPeT
Table 6): c = 50 of 197 tokens leaves 49 visible patches and 147 targets, 75 %. `beit` and `cae` hide blocks of
patches, all others random ones: only the order z differs.

Read down to the ruled line. Below it, to be skipped at first: CAE, learned tokenizers, names, pictures.

python objectives.py                             who looks at whom: 6 patches cut at 3, printed and drawn
python objectives.py mapet --patches 6 --cut 3   one of them; beit and cae print the blocks they hide as well
"""
import argparse
import copy
import math
import os
from collections import namedtuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw

from vit import (MLP, PATCH_FEATURES, Block, LayerScale, add_branch, drop_rates, exit_on_error, fold_scale,
                 gather_patches, hash_uniform, init_weights, make_projection, patchify, principal_colors,
                 save_picture, sincos_positions, split_noise, to_device, unpatchify)


# --- orders and masks -------------------------------------------------------------------------------------

def random_order(b, n, generator=None, device=None):
    """(b, n) int64: a fresh random permutation z of the n patches for each image; the first are visible."""
    return torch.rand(b, n, generator=generator, device=device).argsort(1)


def blockwise_mask(b, grid, count, generator=None, device=None, exact=True):
    """BEiT's block-wise masking (2106.08254, Alg. 1): (b, n) bool, True = hidden, of n = grid * grid patches.

    Blocks are hidden one after the other: area uniform from 16 of 196 patches to what is left to be hidden,
    height / width log-uniform from 0.3 to 1 / 0.3, sides rounded, place uniform. A block is taken if both sides
    are less than the grid's, it hides something new, and `count` in all at most. When 10 tries for a block fail,
    the image is done. exact: then hide random patches until `count` are hidden (BEiT v2); False: leave it at the blocks.
    All images at once: of the 10 tries, made in parallel, each image takes the first that fits.
    """
    min_block = max(1, round(16 / 196 * grid ** 2))            # of BEiT's scripts: 16 patches of 196
    rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)
    hidden = torch.zeros(b, grid, grid, dtype=torch.bool, device=device)
    unfinished = torch.ones(b, 1, dtype=torch.bool, device=device)
    cell = torch.arange(grid, device=device)
    inside = lambda start, length: (cell >= start[..., None]) & (cell < (start + length)[..., None])
    while unfinished.any():
        remaining = count - hidden.sum((1, 2))[:, None]
        # The tries, (b, 10) each: how large, of what shape, where.
        area = min_block + (remaining - min_block) * rand(b, 10)
        aspect = torch.exp(math.log(.3) * (2 * rand(b, 10) - 1))
        h = (area * aspect).sqrt().round()
        w = (area / aspect).sqrt().round()
        rows = inside((rand(b, 10) * (grid + 1 - h)).floor(), h)             # of each block, (b, 10, grid)
        columns = inside((rand(b, 10) * (grid + 1 - w)).floor(), w)
        again = ((rows.float() @ hidden.float()) * columns).sum(-1)
        new = h * w - again                                    # patches of the block that no other hides
        fits = unfinished & (h < grid) & (w < grid) & (new > 0) & (new <= remaining)
        first = (fits & (fits.cumsum(1) == 1))[..., None]
        hidden |= (rows & first).any(1)[:, :, None] & (columns & first).any(1)[:, None, :]
        unfinished = fits.any(1, keepdim=True)
    hidden = hidden.flatten(1)
    if exact:
        score = hidden + rand(b, grid ** 2)                    # hidden patches are above 1, the others below
        hidden = torch.zeros_like(hidden).scatter(1, score.argsort(1)[:, grid ** 2 - count:], True)
    return hidden


def two_stream_mask(visible, targets, positions=True):
    """Who may look at whom in PIM and MaPeT: (rows, keys) bool, True = may attend (MaPeT Eq. 3 and Fig. 2).

    visible    V, rows that every row may see: the class token and the visible patches, the cutting point c
    targets    T, how many patches are predicted, in the order z
    positions  True: MaPeT, with the T position-only mask tokens; False: PIM, without them

    keys (columns)              V visible | T targets, their content | T mask tokens, position only
    rows  class token, visible      all   |          none            |     all
          target i (content)        all   |       targets <= i       |  of targets > i
          mask token                all   |          none            |     all
          query of target i         all   |       targets <  i       |  of targets >= i

    Patches were permuted before, so this one mask serves every image and step. Each row of MaPeT's has V + T
    keys: every position is seen exactly once, as content or as position.
    """
    V, T = visible, targets
    full = lambda rows, keys: torch.ones(rows, keys).bool()
    none = lambda rows, keys: torch.zeros(rows, keys).bool()
    earlier = full(T, T).tril(-1)                              # [i, j]: target j comes before target i
    so_far = full(T, T).tril()                                 # ... or is target i itself
    rows = [[full(V, V), none(V, T), full(V, T)],              # class token, visible patches
            [full(T, V), so_far, ~so_far],                     # targets, their content
            [full(T, V), none(T, T), full(T, T)],              # mask tokens
            [full(T, V), earlier, ~earlier]]                   # queries
    if not positions:                                          # PIM: the same without mask tokens
        rows = [row[:2] for row in (rows[0], rows[1], rows[3])]
    return torch.cat([torch.cat(row, 1) for row in rows])


# --- objectives -------------------------------------------------------------------------------------------

class Objective(nn.Module):
    """What all objectives share: the encoder that is kept, and which patches are hidden.

    needs   what it wants besides images: "tokens" (b, n) int64, "features" (b, n, values), or None
    logs    names of what forward returns beside the loss
    cut     the cutting point c: c - 1 visible patches, targets = 1 + n - c hidden ones
    smoothing   of the labels, in the cross-entropy; blockwise: hide blocks, not random patches
    noise_rows  how many uniform numbers an image's stochastic depth takes
    """
    needs, logs = "tokens", ("accuracy",)

    def __init__(self, vit, cut, smoothing=0., blockwise=False):
        super().__init__()
        n = vit.n_patches
        if not 1 <= cut <= n:
            raise ValueError(f"cutting point {cut} is out of range: with {n} patches it is 1 to {n}")
        self.encoder, self.cut, self.targets = vit, cut, 1 + n - cut
        self.smoothing, self.blockwise, self.noise_rows = smoothing, blockwise, 2 * vit.depth

    def draw_order(self, b, seed=None, device="cpu", rows=slice(None)):
        """An order z (b, n) of each image's patches, visible first, by the seed if given; `rows` of the b only."""
        if not self.blockwise:
            generator = None if seed is None else torch.Generator(device).manual_seed(seed)
            return random_order(b, self.encoder.n_patches, generator, device)[rows]
        start, stop, _ = rows.indices(b)                       # blocks are drawn for 64 images at once
        first, orders = start // 64, []
        for chunk in range(first, -(-stop // 64)):             # on the CPU: blocks take decisions
            generator = None if seed is None else torch.Generator().manual_seed(seed + chunk)
            hidden = blockwise_mask(min(64, b - 64 * chunk), self.encoder.grid, self.targets, generator)
            orders.append(hidden.int().argsort(dim=1, stable=True))
        return to_device(torch.cat(orders)[start - 64 * first:stop - 64 * first], device)

    def split(self, images, order):
        """An order (None: drawn here) -> visible patches (b, c - 1), hidden ones (b, T), in that order."""
        order = self.draw_order(len(images), device=images.device) if order is None else order
        return order[:, :self.cut - 1], order[:, self.cut - 1:]

    def forward(self, images, tokens=None, order=None, noise=None):
        """images (b, 3, S, S) normalized, tokens (b, n) or what `needs` says -> loss, dict of 0-d logs."""
        return self.loss(*self.predict(images, tokens, order, noise))

    def loss(self, logits, tokens):
        """Cross-entropy, the mean over targets: logits (b, T, K), tokens (b, T); {"accuracy": 0-d}."""
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=self.smoothing)
        return loss, {"accuracy": (logits.detach().argmax(-1) == tokens).float().mean()}

    def before_step(self):
        """Before each optimizer step; see CAE."""

    def end_step(self, progress, all_reduce, all_gather):
        """After each: share of the steps that is done; functions to sum, to collect over processes."""


class Decoder(nn.Module):
    """Transformer blocks, norm and head: rows (b, m, d) -> (b, n_out, values), of the last n_out rows."""

    def __init__(self, width, depth, heads, values, layer_scale=None, drop=0.):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale=layer_scale, drop=rate)
                                    for rate in drop_rates(drop, depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, values)

    def forward(self, x, n_out, noise=None):
        *noise, last = split_noise(noise, len(self.blocks))
        for block, draws in zip(self.blocks, noise):
            x = block(x, noise=draws)
        return self.head(self.norm(self.blocks[-1](x, n_out=n_out, noise=last)))  # asks for these rows only


class MaskedAutoencoder(Objective):
    """MAE, MaskFeat and ClusterMIM: encode what is visible, decode the rest.

        latent     = encoder([cls ; visible patches + pos])              25 % of the rows: why it is fast
        prediction = decoder([W latent ; mask tokens] + pos)             at the mask tokens; pos of cls is 0
        loss       = MSE(prediction, target)                             MAE, MaskFeat
                   = CE(prediction, t(x))                                ClusterMIM (Sec. 3.2)

    target   "tokens": ClusterMIM, t(x) of a codebook of `size`; "pixel", "pixel-norm" (standardized): MAE;
             "hog": MaskFeat; "features": MaskFeat, rows of `size` values, brought to unit length
    depth    of the decoder; its width is 2/3 of the encoder's, at most MAE's 512, in heads of 32
    The rows stay in the order z: MAE puts them back into raster order first, which attention cannot notice.
    """

    def __init__(self, vit, cut, size=None, target="tokens", depth=8, smoothing=0.):
        super().__init__(vit, cut, smoothing)
        self.target = target
        self.needs = target if target in ("tokens", "features") else None
        self.logs = ("accuracy",) if target == "tokens" else ("explained",)
        if self.needs is None:
            images = torch.empty(1, 3, vit.image_size, vit.image_size, device="meta")      # for the shape
            size = PATCH_FEATURES[target](images, vit.patch_size).shape[-1]
        width = min(512, max(32, 2 * vit.width // 3 // 32 * 32))
        self.narrow = nn.Linear(vit.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("pos", sincos_positions(vit.grid, width, prefix=0), persistent=False)
        self.decoder = Decoder(width, depth, width // 32, size)
        self.narrow.apply(vit.initialize)
        self.decoder.apply(vit.initialize)
        self.decoder.head.apply(init_weights)                  # small: an untrained network starts at ln K
        nn.init.normal_(self.mask_token, std=.02)

    def predict(self, images, tokens=None, order=None, noise=None):
        """Predictions (b, T, size) at the hidden patches, in the order z, and what they should be."""
        vit, (visible, hidden) = self.encoder, self.split(images, order)
        latent = self.narrow(vit.encode(vit.embed(images, visible), noise=noise))
        cls, latent = latent[:, :vit.prefix], latent[:, vit.prefix:]
        patches = torch.cat([latent, self.mask_token.expand(*hidden.shape, -1)], 1)
        pos = gather_patches(self.pos.expand(len(images), -1, -1), torch.cat([visible, hidden], 1))
        rows = torch.cat([cls, patches + pos], 1)              # the class token's position is zero
        prediction = self.decoder(rows, n_out=hidden.shape[1])
        return prediction, gather_patches(self.compute_target(images, tokens), hidden)

    @torch.no_grad()
    def compute_target(self, images, given=None):
        """What every patch should be: (b, n) int64, or (b, n, size) float32. given: tokens or features."""
        if self.target == "tokens":
            return given
        with torch.autocast("cuda", enabled=False):
            if self.target == "features":
                return F.normalize(given.float(), dim=-1)
            return PATCH_FEATURES[self.target](images.float(), self.encoder.patch_size)

    def loss(self, prediction, target):
        if self.target == "tokens":
            return super().loss(prediction, target)
        loss = F.mse_loss(prediction, target)
        # Beside predicting the mean of the batch for every patch: 0 = no better, 1 = perfect.
        return loss, {"explained": 1 - loss.detach() / target.var((0, 1), unbiased=False).mean()}


class MaPeT(Objective):
    """MaPeT and its parents: predict the tokens of the patches at or after the cutting point of an order z.

    permute    predicted targets' content is revealed to later ones, in two-stream attention (PIM, MaPeT)
    positions  mask tokens tell where the unseen targets are (MIM, BEiT, MaPeT)

    Rows of the sequence, and who they look at (`two_stream_mask`):
        MIM, BEiT  [cls, visible,          mask tokens]           all see all; the mask tokens are the output
        PIM        [cls, visible, targets,              queries]
        MaPeT      [cls, visible, targets, mask tokens, queries]
    Two parts of MaPeT look at nothing outside themselves: {cls, visible, mask tokens} is MIM's sequence above,
    which never learns a target's content; {cls, visible, targets, mask tokens} is the content stream, which
    never sees a query. So the queries are an autoregressive layer on top that reads a MIM forward: the first
    query equals the first mask token in every layer, the k-th asks like one with k - 1 patches revealed.
    """

    def __init__(self, vit, cut, vocab_size, permute=True, positions=True, smoothing=0., blockwise=False):
        super().__init__(vit, cut, smoothing, blockwise)
        if not vit.prefix:
            raise ValueError("MIM, BEiT, PIM and MaPeT need a class token: the cutting point counts it")
        self.permute, self.positions = permute, positions
        self.mask_token = nn.Parameter(torch.empty(1, 1, vit.width))
        self.head = nn.Linear(vit.width, vocab_size)
        nn.init.trunc_normal_(self.mask_token, std=.02)
        self.head.apply(init_weights)
        mask = two_stream_mask(cut, self.targets, positions) if permute else None
        self.register_buffer("mask", mask, persistent=False)

    def predict(self, images, tokens, order=None, noise=None):
        """Logits (b, T, K) of the targets in the order z, their tokens (b, T). Queries, too, begin as m_j."""
        vit, (visible, hidden) = self.encoder, self.split(images, order)
        shown = torch.cat([visible, hidden], 1) if self.permute else visible
        content = vit.embed(images, shown)                     # [cls, visible, targets?]
        unseen = self.mask_token + vit.positions(hidden)       # m_j
        keys = [content] + [unseen] * self.positions
        queries = [unseen] * self.permute                      # MIM asks with the mask tokens themselves
        n_keys = sum(rows.shape[1] for rows in keys)
        x = vit.encode(torch.cat(keys + queries, 1), self.mask, n_keys, n_out=self.targets, noise=noise)
        return self.head(x), gather_patches(tokens, hidden)    # Eq. 1, Eq. 2: all ranks i >= c


# ==========================================================================================================
# Machinery. The method ends here: what follows is a baseline (CAE), names, printing and drawing.
# ==========================================================================================================

# --- CAE, a baseline of MaPeT's tables --------------------------------------------------------------------

class RegressorBlock(nn.Module):
    """Cross-attention of CAE's regressor: hidden rows ask, visible and hidden rows answer.

    Positions are added to what queries and keys are made of, before the norms. CAE's quirk: after the attention
    the *normalized* sum, norm2(x + ...), goes on, to the MLP and beside it; in a ViT block the sum itself.
    """

    def __init__(self, width, heads, layer_scale=None, drop=0.):
        super().__init__()
        self.drop = drop
        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(4))
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.mlp = MLP(width, 4 * width)
        self.ls1, self.ls2 = LayerScale(width, layer_scale), LayerScale(width, layer_scale)

    def forward(self, x, visible, pos, pos_visible, noise=(None, None)):
        """Hidden x (b, T, d), visible (b, v, d), their positions -> (b, T, d). Values carry no position."""
        x = add_branch(x, self.attend, [x, visible, pos, pos_visible], self.drop, noise[0])
        x = self.norm2(x)
        return add_branch(x, lambda x: self.mlp(x, self.ls2.gamma), [x], self.drop, noise[1])

    def attend(self, x, visible, pos, pos_visible):
        rows = torch.cat([visible, x], 1)
        q = self.q(self.norm_q(x + pos))
        k = self.k(self.norm_k(rows + torch.cat([pos_visible, pos], 1)))
        v = self.v(self.norm_v(rows))
        q, k, v = (rearrange(y, "b r (h d) -> b h r d", h=self.heads) for y in (q, k, v))
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b h r d -> b r (h d)")
        return F.linear(y, *fold_scale(self.proj, self.ls1.gamma))


class CAE(Objective):
    """Context Autoencoder (arXiv:2202.03026): guess latents of hidden patches, then their tokens.

        latent = encoder([cls ; visible])             all that the encoder sees
        guess  = regressor(mask tokens | latent)      4 cross-attention blocks
        target = teacher([cls ; hidden])              the encoder one optimizer step before, no gradient
        loss   = CE(decoder(guess + pos), t(x)) + 2 MSE(guess, target)
    So the encoder only encodes: to predict is left to the regressor. All parts are as wide as the encoder,
    with its initialization and stochastic depth (in regressor and decoder, too, linear from 0 to its last
    block's rate). The published one has no bias on keys: adding one changes no attention.
    """
    logs = "accuracy", "alignment"

    def __init__(self, vit, cut, vocab_size, depth=4, align=2., smoothing=0., blockwise=False):
        super().__init__(vit, cut, smoothing, blockwise)
        width, heads, drop = vit.width, vit.blocks[0].attn.heads, vit.blocks[-1].drop
        self.align, self.depth, self.noise_rows = align, depth, 2 * (vit.depth + 2 * depth)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.regressor = nn.ModuleList(RegressorBlock(width, heads, vit.layer_scale, rate)
                                       for rate in drop_rates(drop, depth))
        self.regressor_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder = Decoder(width, depth, heads, vocab_size, vit.layer_scale, drop)
        self.regressor.apply(vit.initialize)
        self.decoder.apply(vit.initialize)
        self.decoder.head.apply(init_weights)                  # small: an untrained network starts at ln K
        nn.init.trunc_normal_(self.mask_token, std=.02)
        self.teacher = copy.deepcopy(vit).eval().requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()                                    # its latents are a target: no stochastic depth
        return self

    def predict(self, images, tokens, order=None, noise=None):
        return self.run(images, tokens, order, noise)[:2]

    def forward(self, images, tokens=None, order=None, noise=None):
        logits, tokens, guess, target = self.run(images, tokens, order, noise)
        loss, logs = self.loss(logits, tokens)
        alignment = F.mse_loss(guess, target)
        return loss + self.align * alignment, {**logs, "alignment": alignment.detach()}

    def run(self, images, tokens, order, noise):
        """Of hidden patches, in the order z: logits (b, T, K), tokens (b, T), guessed and true latents (b, T, d)."""
        vit, (visible, hidden) = self.encoder, self.split(images, order)
        if noise is None and self.training:
            noise = torch.rand(self.noise_rows, len(images), device=images.device)
        rows = [2 * vit.depth, 2 * self.depth, 2 * self.depth]
        of_encoder, of_regressor, of_decoder = [None] * 3 if noise is None else noise.split(rows)
        latent = vit.encode(vit.embed(images, visible), noise=of_encoder)[:, vit.prefix:]
        with torch.no_grad():
            target = self.teacher.encode(self.teacher.embed(images, hidden))[:, vit.prefix:]
        pos, pos_visible = vit.positions(hidden), vit.positions(visible)
        guess = self.mask_token.expand(*hidden.shape, -1)
        for block, draws in zip(self.regressor, split_noise(of_regressor, self.depth)):
            guess = block(guess, latent, pos, pos_visible, draws)
        guess = self.regressor_norm(guess)
        logits = self.decoder(guess + pos, hidden.shape[1], of_decoder)
        return logits, gather_patches(tokens, hidden), guess, target

    @torch.no_grad()
    def before_step(self):
        """Keep the weights that this step is about to change: the next step's targets are theirs."""
        torch._foreach_copy_(list(self.teacher.parameters()), list(self.encoder.parameters()))


# --- learned tokenizers -----------------------------------------------------------------------------------

class LearnedTokenizer(Objective):
    """Encode all patches, replace each by one of K codes, decode: what stands in the middle is a tokenizer.

        z          = project(encoder([cls ; patches + pos]))     (b, n, size)
        t          = argmin_k ||z - C_k||                        hard: the nearest code
                     argmax_k (W z + b)_k                        soft: the greatest logit
        prediction = decoder(V code + pos)                       hard: code = C_t; soft: see below
        loss       = distance(prediction, target) + what ties codes and z together

    soft        dVAE (DALL-E, arXiv:2102.12092, Sec. 2.1): code = y C, y = softmax((W z + b + Gumbel noise) / tau);
                tau falls from 1 to 1/16, and beta KL(softmax(W z + b) || uniform) joins the loss, by half a cosine
                else (VQ-VAE, Eq. 3) straight-through gradients, and beta ||z - sg C_t||^2, the commitment
    unit        VQ-KD (BEiT v2, arXiv:2208.06366, Sec. 3.1): z and codes have unit length and 32 values; a code moves
                to the mean direction of its z, 1 % a step; else by gradient, hard ones by that of ||sg z - C_t||^2
    features    VQ-KD: the target is a teacher's features, 1 - cosine; else the pixels, MSE
    perceptual  PeCo (arXiv:2111.12710, Sec. 3.2): and a frozen network should see the same in both
    Ours: a code with less than a tenth of the mean share (over about 20 steps) is dead: it moves to a random z.
    """
    logs = "error", "used", "perplexity", "reseeded"

    def __init__(self, vit, vocab_size, values, depth, soft, unit, features, perceptual, beta):
        super().__init__(vit, vit.n_patches)
        self.cut, self.targets = 1 + vit.n_patches, 0          # nothing is hidden
        self.soft, self.unit, self.features, self.perceptual, self.beta = soft, unit, features, perceptual, beta
        self.needs = "features" if features else "layers" if perceptual else None
        self.layers = None  # function of images, set from outside: PeCo's network
        self.noise_rows += 2                                   # the seeds of hash_uniform
        size, K, width = 32 if unit else min(256, vit.width), vocab_size, vit.width
        self.project = make_projection(width, size)
        codebook = torch.randn(K, size)
        self.codebook = nn.Parameter(F.normalize(codebook, dim=-1) if unit else codebook, requires_grad=not unit)
        self.classify = nn.Linear(size, K) if soft else None
        self.widen = nn.Linear(size, width)
        self.register_buffer("pos", sincos_positions(vit.grid, width, prefix=0), persistent=False)
        values = values if features else 3 * vit.patch_size ** 2
        self.decoder = Decoder(width, depth, vit.blocks[0].attn.heads, values)
        for part in [self.project, self.widen, self.decoder] + [self.classify] * soft:
            part.apply(vit.initialize)
        self.decoder.head.apply(init_weights)                  # small: it starts at the mean
        self.register_buffer("share", torch.full((K,), 1 / K))
        self.register_buffer("progress", torch.zeros(()))      # a tensor: nothing is compiled anew
        self.register_buffer("state", torch.zeros(3))  # used, perplexity, reseeded, of the step before
        # Of one step, until it ends: how often each code was chosen, the sum of its z; some z by lot, columns.
        for name, start in (("counts", torch.zeros(K)), ("sums", torch.zeros(K, size)),
                            ("lots", torch.full((min(K, 64),), -1.)), ("spare", torch.zeros(size, min(K, 64)))):
            self.register_buffer(name, start, persistent=False)

    def encode_patches(self, images, noise=None):
        """z (b, n, size) float32 of all patches; noise as in ViT.encode."""
        x = self.encoder.encode(self.encoder.embed(images), noise=noise)[:, self.encoder.prefix:]
        with torch.autocast("cuda", enabled=False):
            z = self.project(x.float())
            return F.normalize(z, dim=-1) if self.unit else z

    def score(self, z):
        """(..., K): the token of z (..., size) is the greatest's; hard: (||z||^2 - ||z - C_k||^2) / 2."""
        return self.classify(z) if self.soft else z @ self.codebook.T - self.codebook.square().sum(-1) / 2

    def quantize(self, z, seeds=None):
        """z (b, n, size) -> code (b, n, size), tokens (b, n), what ties both; seeds (2, b) of the noise."""
        tokens = (scores := self.score(z)).argmax(-1)
        code = F.embedding(tokens, self.codebook)
        if not self.soft:
            loss = self.beta * F.mse_loss(z, code.detach())
            loss = loss if self.unit else loss + F.mse_loss(code, z.detach())
            return z + (code - z).detach(), tokens, loss       # straight through: the code, with z's gradient
        ramp = (1 - torch.cos(math.pi * self.progress)) / 2    # 0 to 1
        if seeds is not None:
            noise = -(-hash_uniform(seeds, scores[0].numel()).log()).log().view_as(scores)
            code = ((scores + noise) / (1 - ramp * 15 / 16)).softmax(-1) @ self.codebook
        log_q = scores.log_softmax(-1)
        kl = math.log(len(self.codebook)) + (log_q.exp() * log_q).sum(-1).mean()
        return code, tokens, self.beta * ramp * kl / (3 * self.encoder.patch_size ** 2)  # a value's, as MSE

    def predict(self, images, given=None, order=None, noise=None):
        """Prediction (b, n, values), its target, tokens (b, n), the codes' part of the loss."""
        noise = torch.rand(self.noise_rows, len(images), device=images.device) if noise is None else noise
        drop, seeds = noise.split([self.noise_rows - 2, 2]) if self.training else (None, None)
        z = self.encode_patches(images, drop)
        with torch.autocast("cuda", enabled=False):
            code, tokens, loss = self.quantize(z, seeds)
            if self.training:
                self.count(z.detach(), tokens, seeds)
        prediction = self.decoder(self.widen(code) + self.pos, code.shape[1]).float()
        return prediction, given if self.features else patchify(images, self.encoder.patch_size), tokens, loss

    def forward(self, images, tokens=None, order=None, noise=None):
        prediction, target, _, loss = self.predict(images, tokens, noise=noise)
        error = F.mse_loss(prediction, target) if not self.features else \
            1 - F.cosine_similarity(prediction, target.float(), dim=-1).mean()
        loss = loss + error
        if self.perceptual and self.layers:
            seen = self.layers(unpatchify(prediction, self.encoder.patch_size)), self.layers(images)
            loss = loss + sum(F.mse_loss(*both) for both in zip(*seen))
        return loss, dict(zip(self.logs, (error.detach(), *self.state.clone())))

    @torch.no_grad()
    def count(self, z, tokens, seeds):
        """Note what end_step needs of one micro-batch."""
        z, tokens, lots = z.flatten(0, 1), tokens.flatten(), hash_uniform(1 - seeds, z.shape[1]).flatten()
        self.counts.index_add_(0, tokens, torch.ones_like(lots))
        self.sums.index_add_(0, tokens, z)
        lots, at = torch.cat([self.lots, lots]).topk(len(self.lots))
        self.lots.copy_(lots)
        self.spare.copy_(torch.cat([self.spare, z.T], 1)[:, at])

    @torch.no_grad()
    def end_step(self, progress, all_reduce, all_gather):
        """Codes of unit length move, dead ones are re-seeded: the same on every process."""
        all_reduce(self.counts, self.sums)
        if self.unit:                                          # the direction of the sum is that of the mean
            moved = F.normalize(.99 * self.codebook + .01 * F.normalize(self.sums, dim=-1), dim=-1)
            self.codebook.copy_(torch.where(self.counts[:, None] > 0, moved, self.codebook))
        share = self.counts / self.counts.sum()
        self.share.lerp_(share, .05)
        lots, at = all_gather(self.lots).topk(len(self.lots))
        dead = self.share < .1 / len(share)
        codes = dead.int().argsort(descending=True, stable=True)[:len(lots)]
        fresh = dead[codes] & (lots >= 0)                      # no `if`: it would wait for the GPU
        self.reseed(codes, all_gather(self.spare)[:, at].T, fresh)
        self.share[codes] = torch.where(fresh, 1 / len(share), self.share[codes])
        self.state.copy_(torch.stack([(share > 0).sum(), torch.special.entr(share).sum().exp(), fresh.sum()]))
        for buffer, value in ((self.progress, progress), (self.counts, 0), (self.sums, 0), (self.lots, -1)):
            buffer.fill_(value)

    def reseed(self, codes, z, fresh):
        """Codes (m,) move to z (m, size) where fresh (m,); soft: at z their logit is 0.1 above the greatest."""
        def put(rows, new):
            keep = ~fresh.view(-1, *[1] * (rows.ndim - 1))
            rows[codes] = torch.where(keep, rows[codes], new)
        if not self.soft:
            return put(self.codebook, z)
        w, b, old = self.classify.weight, self.classify.bias, self.score(z).argmax(-1)
        put(self.codebook, self.codebook[old])
        put(w, w[old] + z / z.square().sum(-1, keepdim=True))
        put(b, b[old] - .9)  # so it splits off what lies at z and farther out

    @torch.no_grad()
    def export(self):
        """(weights of f, centroids, metric), on the CPU: a patch's token is the nearest centroid of f(image).

        Soft, too, in one dimension more: W_k.z + b_k is greatest where ||[z, 0] - [W_k, s_k]|| is least, if
        s_k^2 = constant - 2 b_k - ||W_k||^2.
        """
        f = {key: value.detach().cpu().clone() for key, value in self.state_dict().items()
             if key.startswith(("encoder.", "project."))}
        if not self.soft:
            return f, self.codebook.detach().cpu(), "cosine" if self.unit else "euclidean"
        w, b = self.classify.weight.cpu().double(), self.classify.bias.cpu().double()
        square = 2 * b + w.square().sum(-1)
        f["project.2.weight"] = F.pad(f["project.2.weight"], (0, 0, 0, 1))     # f's last value is 0
        f["project.2.bias"] = F.pad(f["project.2.bias"], (0, 1))
        return f, torch.cat([w, (square.max() - square).sqrt()[:, None]], 1).float(), "euclidean"


# --- the objectives by name -------------------------------------------------------------------------------

# What separates the objectives: the class, its switches, and the share of patches that is hidden by default.
Entry = namedtuple("Entry", "kind switches mask_ratio")
OBJECTIVES = {
    "mae": Entry(MaskedAutoencoder, dict(), .75),
    "maskfeat": Entry(MaskedAutoencoder, dict(), .75),
    "clustermim": Entry(MaskedAutoencoder, dict(), .75),
    "cae": Entry(CAE, dict(blockwise=True), .5),
    "beit": Entry(MaPeT, dict(permute=False, positions=True, blockwise=True), 75 / 196),
    "mim": Entry(MaPeT, dict(permute=False, positions=True), 75 / 196),
    "pim": Entry(MaPeT, dict(permute=True, positions=False), .75),
    "mapet": Entry(MaPeT, dict(permute=True, positions=True), .75),
    # beta of the KL: 1 is the evidence bound for pixels of variance 1/2 (DALL-E: 6.6, with its logit-Laplace);
    # of the commitment: VQ-VAE's and VQ-KD's.
    "dvae": Entry(LearnedTokenizer, dict(soft=True, unit=False, features=False, perceptual=False, beta=1.), 0),
    "vq":   Entry(LearnedTokenizer, dict(soft=False, unit=False, features=False, perceptual=False, beta=.25), 0),
    "peco": Entry(LearnedTokenizer, dict(soft=False, unit=False, features=False, perceptual=True, beta=.25), 0),
    "vqkd": Entry(LearnedTokenizer, dict(soft=False, unit=True, features=True, perceptual=False, beta=1.), 0),
}
TARGETS = {"mae": ("pixel", "pixel-norm"), "maskfeat": ("hog", "features")}     # the others predict tokens
TOKENIZERS = [name for name, entry in OBJECTIVES.items() if entry.kind is LearnedTokenizer]  # or learn them


def make(name, vit, vocab_size=None, cut=None, mask_ratio=None, target=None, label_smoothing=0., decoder_depth=None,
         values=None):
    """The objective `name` around `vit`, an nn.Module: forward(images, tokens, order=None) -> loss, logs.

    vocab_size       codebook size K; of maskfeat with target="features" the values a patch
    cut, mask_ratio  how much is hidden: the cutting point, class token included, or a share of the patches
    target           mae: "pixel" or "pixel-norm" (each patch standardized); maskfeat: "hog" or "features"
    decoder_depth    of mae, maskfeat, clustermim (8 blocks), tokenizers (3); of cae's two parts (4 each)
    values           of vqkd: a patch's, of its teacher
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}: choose from {', '.join(OBJECTIVES)}")
    kind, switches, default_ratio = OBJECTIVES[name]
    choices = TARGETS.get(name, ("tokens",))
    target = target or choices[0]
    if target not in choices:
        raise ValueError(f"{name} cannot predict {target!r}: choose from {', '.join(choices)}")
    if target in ("tokens", "features") and (vocab_size or 0) < (2 if target == "tokens" else 1):
        raise ValueError(f"objective {name} needs a vocab_size, of at least 2 tokens, not {vocab_size}")
    if cut is not None and mask_ratio is not None:
        raise ValueError("give a cutting point or a mask ratio, not both: the one follows from the other")
    if name in TOKENIZERS:
        if cut or mask_ratio:
            raise ValueError(f"{name} hides nothing: it takes no --cut and no --mask-ratio")
        return kind(vit, vocab_size, values, decoder_depth or 3, **switches)
    if cut is None:
        mask_ratio = default_ratio if mask_ratio is None else mask_ratio
        if not 0 < mask_ratio <= 1:
            raise ValueError(f"mask ratio {mask_ratio} is out of range: more than 0, at most 1")
        cut = 1 + vit.n_patches - max(1, round(vit.n_patches * mask_ratio))
    options = dict(switches, smoothing=label_smoothing)
    if kind is MaskedAutoencoder:
        options["target"] = target
    if kind is not MaPeT and decoder_depth is not None:
        options["depth"] = decoder_depth
    return kind(vit, cut, vocab_size, **options)


# --- masks and predictions, printed and drawn -------------------------------------------------------------

def list_stages(name, order, cut):
    """Who looks at whom in each network of an objective, for one order (n,): [(title, mask, rows, keys)].

    Rows and keys are names: cls, x3 = content of patch 3, m3 its mask token (position), g3 query, t3 token.
    """
    kind, switches, _ = OBJECTIVES[name]
    cut = len(order) + 1 if kind is LearnedTokenizer else cut
    x, m, g = ([f"{letter}{int(j)}" for j in order] for letter in "xmg")
    visible, tokens = ["cls"] + x[:cut - 1], [f"t{int(j)}" for j in order]
    x, m, g = x[cut - 1:], m[cut - 1:], g[cut - 1:]
    if switches.get("permute"):
        keys = visible + x + m * switches["positions"]
        return [(name, two_stream_mask(cut, len(m), switches["positions"]), keys + g, keys)]
    if kind is MaPeT:
        stages = [(name, visible + m, visible + m)]            # the encoder is all there is
    elif kind is CAE:                                          # its class token stays in the encoder
        stages = [(f"{name}-encoder", visible, visible), (f"{name}-regressor", m, visible[1:] + m),
                  (f"{name}-decoder", m, m)]
    elif kind is LearnedTokenizer:
        stages = [(f"{name}-encoder", visible, visible), (f"{name}-decoder", tokens, tokens)]
    else:
        stages = [(f"{name}-encoder", visible, visible), (f"{name}-decoder", visible + m, visible + m)]
    return [(title, torch.ones(len(rows), len(keys)).bool(), rows, keys) for title, rows, keys in stages]


def draw_mask(mask, rows, keys, visible, path, cell=26):
    """PNG of a mask as in MaPeT Fig. 2: a line for each row, a column for each key; `visible`: names of V's.

    Blue = content may be attended to, orange = only a position, white = nothing. Black: other kinds of rows.
    """
    blue, orange, gray = (49, 104, 173), (236, 151, 60), (205, 205, 205)
    picture = Image.new("RGB", (cell * (len(keys) + 8), cell * (len(rows) + 3)), "white")
    draw = ImageDraw.Draw(picture)
    at = lambda *places: [cell * (2 + place) for place in places]  # x, y in cells, from the mask's corner
    write = lambda x, y, text, anchor="mm": draw.text(at(x, y), text, "black", anchor=anchor, font_size=cell * .48)
    for x, key in enumerate(keys):
        write(x + .5, -.5, key)
    for y, row in enumerate(rows):
        write(-.8, y + .5, row)
        for x, key in enumerate(keys):
            color = orange if key[0] == "m" else blue
            draw.rectangle(at(x, y, x + 1, y + 1), fill=color if mask[y, x] else "white", outline=gray)
    # Where the kind of row changes; the class token counts as visible content.
    names = {"x": "content, targets", "m": "mask tokens", "g": "query stream", "t": "tokens"}
    kinds = lambda rows: ["content, visible" if row in visible else names[row[0]] for row in rows]
    edges = lambda kinds: [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
    for x in edges(kinds(keys)):
        draw.line(at(x, 0, x, len(rows)), fill="black", width=2)
    for y in edges(kinds(rows)):
        draw.line(at(0, y, len(keys), y), fill="black", width=2)
    for y in [0] + edges(kinds(rows)):
        write(len(keys) + .5, y + .5, kinds(rows)[y], "lm")
    save_picture(picture, path)


def picture_hog(x, p):
    """HOG (b, n, 27 m^2) -> (b, n, 3 p^2) in 0..1: in each cell nine strokes along the edges."""
    m = math.isqrt(x.shape[-1] // 27)
    bins = rearrange(x, "b n (c o i j) -> b n c o i j", c=3, o=9, i=m).clamp(min=0).mean(2)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, p // m, device=x.device)] * 2, indexing="ij")
    angle = (torch.arange(9, device=x.device) + .5) * math.pi / 9         # of the gradient, from the y axis
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    along = cos * x - sin * y                                  # the edge is square to the gradient
    across = sin * x + cos * y
    strokes = torch.exp(-8 * across ** 2) * (along.abs() < 1)
    gray = torch.einsum("bnoij,oyx->bniyjx", bins, strokes)
    gray = rearrange(gray, "b n i y j x -> b n (i y j x) 1") / gray.amax().clamp(min=1e-6)
    return gray.expand(-1, -1, -1, 3).flatten(2)


@torch.no_grad()
def picture_codes(model, images, x, given, unscale):
    """Rows for draw_grid, and labels: image, token map (a color a token), target (features), what is rebuilt."""
    p, was_training = model.encoder.patch_size, model.training
    prediction, target, tokens, _ = model.eval().predict(x, given)
    model.train(was_training)
    colors = torch.rand(len(model.codebook), 3, generator=torch.Generator().manual_seed(0)).to(images)
    paint = lambda colors: unpatchify(colors.repeat(1, 1, p * p), p)
    rows = [images, paint(colors[tokens])]
    if not model.features:
        return rows + [unscale(unpatchify(prediction, p)).clamp(0, 1)], ["image", "tokens", "rebuilt"]
    both = principal_colors(*(F.normalize(part.float(), dim=-1) for part in (target, prediction)))
    return rows + [paint(part) for part in both], ["image", "tokens", "target", "rebuilt"]


@torch.no_grad()
def picture_predictions(model, images, mean, std, tokens=None, patch_pictures=None, seed=0):
    """Rows of images (b, 3, S, S) in 0..1 for draw_grid, and their labels: image, visible, predicted, target.

    images (b, 3, S, S) in 0..1; mean, std (3,) of the normalization; tokens as in forward, None: not known
    (then no target is drawn); patch_pictures (K, 3 p^2) in 0..1: of each code; seed: of the order.
    """
    p, mean, std = model.encoder.patch_size, images.new_tensor(mean), images.new_tensor(std)
    x = (images - mean[:, None, None]) / std[:, None, None]
    if isinstance(model, LearnedTokenizer):
        return picture_codes(model, images, x, tokens, lambda row: row * std[:, None, None] + mean[:, None, None])
    order = model.draw_order(len(images), seed, images.device)
    hidden = order[:, model.cut - 1:]
    given = torch.zeros_like(order) if tokens is None else tokens            # only the target row needs them
    was_training = model.training
    prediction, target = model.eval().predict(x, given, order)
    model.train(was_training)
    # `whole` (b, n, d) with its hidden patches replaced by values (b, T, d).
    fill = lambda whole, values: whole.scatter(1, hidden[..., None].expand(values.shape), values.to(whole))
    patches, own = patchify(images, p), gather_patches(patchify(x, p), hidden)
    rows = [patches, fill(patches, torch.full_like(own, .5))]
    if model.needs == "tokens":
        codes = [prediction.argmax(-1)] + [target] * (tokens is not None)
        rows += [fill(patches, patch_pictures[code]) for code in codes]
    elif model.target in ("pixel", "pixel-norm"):
        guess = prediction.float()
        if model.target == "pixel-norm":                       # in the hidden patch's own mean and contrast
            guess = guess * (own.var(-1, keepdim=True) + 1e-6).sqrt() + own.mean(-1, keepdim=True)
        rows.append(fill(patches, guess * std.repeat(p * p) + mean.repeat(p * p)))
    else:
        whole = model.compute_target(x, tokens)
        guess = fill(whole, prediction.float())
        if model.target == "hog":
            rows += [picture_hog(guess, p), picture_hog(whole, p)]
        else:
            rows += [colors.repeat(1, 1, p * p) for colors in reversed(principal_colors(whole, guess))]
    return [unpatchify(row, p) for row in rows], ["image", "visible", "predicted", "target"][:len(rows)]


def main(argv=None):
    parser = argparse.ArgumentParser(description="What each objective hides, and who looks at whom, printed and drawn.")
    add = parser.add_argument
    add("objective", nargs="?", choices=list(OBJECTIVES), help="default: all of them")
    add("--patches", type=int, default=6, metavar="N", help="patches in the image (default 6)")
    add("--cut", type=int, default=3, metavar="C",
        help="cutting point, class token included: C - 1 visible patches (default 3; paper 50 of 197)")
    add("--seed", type=int, default=0, help="of the random order and of the blocks (default 0)")
    add("--out", default="runs/masks", metavar="FOLDER", help="for the PNGs (default runs/masks)")
    args = parser.parse_args(argv)
    if not 1 <= args.cut <= args.patches:
        parser.error(f"--cut {args.cut}: with --patches {args.patches} it is 1 to {args.patches}")
    cut = 1 + args.patches if args.objective in TOKENIZERS else args.cut
    generator = torch.Generator().manual_seed(args.seed)
    order = random_order(1, args.patches, generator)[0]
    names = [f"x{int(j)}" for j in order]
    print(f"order z: {' '.join(names)}; cut {cut}: the class token and the first {cut - 1} are visible, "
          f"{1 + args.patches - cut} are targets. x content, m mask token (position only), g query, t token")
    for name in [args.objective] if args.objective else OBJECTIVES:
        for title, mask, rows, keys in list_stages(name, order, cut):
            path = os.path.join(args.out, f"{title}.png")
            print(f"\n{title}: rows attend to columns marked #")
            print("      " + " ".join(f"{key:>3}" for key in keys) + "   keys")
            for row, sees in zip(rows, mask):
                print(f"{row:>5} " + " ".join("  #" if s else "  ." for s in sees) + f"   {int(sees.sum())}")
            with exit_on_error("objectives.py"):
                draw_mask(mask, rows, keys, {"cls", *names[:cut - 1]}, path)
            print(f"drawn in {path}")
        if name in TOKENIZERS:
            print(f"{name} hides nothing; switches: {OBJECTIVES[name].switches}")
    if args.objective in ("beit", "cae"):
        count = round(196 * OBJECTIVES[args.objective].mask_ratio)
        print(f"\n{args.objective} hides blocks: {count} of 14 x 14 patches, marked #")
        for line in blockwise_mask(1, 14, count, generator=generator).view(14, 14):
            print("      " + " ".join("#" if hide else "." for hide in line))


if __name__ == "__main__":
    main()
