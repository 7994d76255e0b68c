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
    vqkd         all patches                            a decoder, from codes        features, cosine

Rows 1 to 3 are one class, `MaskedAutoencoder`; the last three lines another, `LearnedTokenizer`, whose codes
are tokens for the others. MIM, BEiT, PIM and MaPeT are a third, `MaPeT`: take one of its two ideas away and
its parents appear:
    PIM    max E_x E_z  sum_{i >= c} log p(t_{z_i} | x_{z_<i})                      (MaPeT Eq. 1)
    MaPeT  max E_x E_z  sum_{i >= c} log p(t_{z_i} | x_{z_<i}, m_{z_>=i})           (MaPeT Eq. 2)
    MaPeT without positions of what is not seen yet (m) is PIM, without content of predicted targets MIM.
x_j is a patch, t_j its token, z an order of the patches, visible ones first, c the cutting point, and
m_j = mask token + position j: "there is a patch at j", without its content. c counts the class token, whose
rank is 0 here, so the papers' i > c is i >= c (MaPeT Table 6): c = 50 of 197 tokens leaves 49 visible patches
and 147 targets, 75 %. `beit` and `cae` hide blocks of patches, all others random ones: only z differs.

python objectives.py mapet --patches 6 --cut 3   who looks at whom, printed and drawn; also mim, pim, beit
python objectives.py cae                         the blocks that it hides; also beit
"""
import argparse
import copy
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from vit import (PATCH_FEATURES, Block, drop_rates, gather_patches, init_weights, load_matplotlib, mae_init,
                 patchify, principal_colors, save_figure, sincos_positions, unpatchify)


# --- orders and masks -------------------------------------------------------------------------------------

def random_order(b, n, generator=None, device=None):
    """(b, n) int64: a fresh random permutation z of the n patches for each image; the first are visible."""
    return torch.rand(b, n, generator=generator, device=device).argsort(1)


def blockwise_mask(b, grid, count, generator=None):
    """BEiT's block-wise masking (2106.08254, Alg. 1): (b, n) bool, True = hidden, of n = grid * grid patches.

    Blocks are hidden one after the other: area uniform from 16 of 196 patches to what is left to be hidden,
    height / width log-uniform from 0.3 to 1 / 0.3, sides rounded, place uniform. A block is taken if both
    sides are less than the grid's, it hides something new, and `count` in all at most. When 10 tries for a
    block fail, the image's blocks are done, and random patches make up `count` (BEiT v2; v1 leaves them out,
    CAE tries on).
    All images at once: of the 10 tries, made in parallel, each image takes the first that fits.
    """
    def uniform():                                             # a number for each image and try
        return torch.rand(b, 10, 1, generator=generator)

    def cover(length):                                         # at a random place: -> (b, 10, grid)
        start = (uniform() * (grid + 1 - length)).floor()
        return ((cell >= start) & (cell < start + length)).float()

    n = grid ** 2
    least = round(16 / 196 * n)                                # of BEiT's scripts: 16 patches of 196
    cell = torch.arange(grid)
    hidden = torch.zeros(b, grid, grid)                        # 0 and 1, as products count cells
    unfinished = torch.ones(b, 1, 1, dtype=torch.bool)
    while unfinished.any():
        remaining = count - hidden.sum((1, 2), keepdim=True)
        area = least + (remaining - least) * uniform()         # downwards, where less is left: as in BEiT
        aspect = .3 ** (2 * uniform() - 1)
        h = (area * aspect).sqrt().round()
        w = (area / aspect).sqrt().round()
        rows = cover(h)
        columns = cover(w)
        new = h * w - torch.einsum("b r y, b y x, b r x -> b r", rows, hidden, columns)[..., None]
        fits = unfinished & (h < grid) & (w < grid) & (new > 0) & (new <= remaining)
        first = fits & (fits.cumsum(1) == 1)
        block = torch.einsum("b r y, b r x -> b y x", first * rows, columns)
        hidden = hidden.maximum(block)
        unfinished = fits.any(1, keepdim=True)
    score = hidden.flatten(1) + torch.rand(b, n, generator=generator)   # above 1: hidden by a block
    return score.argsort(1).argsort(1) >= n - count           # by rank: exactly `count`


def two_stream_mask(visible, targets, positions=True):
    """Who may look at whom in PIM and MaPeT: (rows, keys) bool, True = may attend (MaPeT Eq. 3 and Fig. 2).

    visible    V, rows that every row may see: the class token, if any, and the visible patches
    targets    T, how many patches are predicted, in the order z
    positions  True: MaPeT, with the T position-only mask tokens; False: PIM, without them

    keys (columns)              V visible | T targets, their content | T mask tokens, position only
    rows  class token, visible      all   |          none            |     all
          target i (content)        all   |       targets <= i       |  of targets > i
          mask token                all   |          none            |     all
          query of target i         all   |       targets <  i       |  of targets >= i

    Patches were permuted before, so this one mask serves every image and step. A limit says all of a row: the
    last target (1 to T; 0: none) whose content it may see; of later ones MaPeT's rows see the positions. So
    each of them has V + T keys: every position is seen exactly once, as content or as position.
    """
    target = torch.arange(1, targets + 1)
    content = F.pad(target, (visible, 0))                      # 0: what all may see
    limits = [content, 0 * target, target - 1]                 # of content, mask tokens, queries
    if not positions:
        del limits[1]
    limit = torch.cat(limits)[:, None]
    mask = content <= limit
    return torch.cat([mask, target > limit], 1) if positions else mask


# --- what all objectives share ----------------------------------------------------------------------------

class Objective(nn.Module):
    """The encoder that is kept, which patches are hidden, and what every patch should be.

    cut     the cutting point c: c - 1 visible patches, num_targets = 1 + n - c hidden ones
    target  "tokens", "features", or a name in PATCH_FEATURES: made of the images
    needs   what it wants besides images: "tokens" (b, n) int64, "features" (b, n, values), or None
    blockwise   hide blocks, not random patches
    """
    blockwise = False

    def __init__(self, vit, cut, target="tokens"):
        super().__init__()
        self.encoder = vit
        self.cut = cut
        self.num_targets = 1 + vit.n_patches - cut
        self.target = target
        self.needs = target if target in ("tokens", "features") else None

    def draw_order(self, b, generator=None, device=None):
        """An order z (b, n) of each image's patches, visible ones first; blocks: on the CPU."""
        if not self.blockwise:
            return random_order(b, self.encoder.n_patches, generator, device)
        hidden = blockwise_mask(b, self.encoder.grid, self.num_targets, generator)
        return hidden.argsort(stable=True).to(device)

    def split(self, images, order=None):
        """Visible patches (b, c - 1), hidden ones (b, T), in the order z (None: drawn here)."""
        if order is None:
            order = self.draw_order(len(images), device=images.device)
        return order.tensor_split([self.cut - 1], 1)

    @torch.no_grad()
    def compute_target(self, images, given=None):
        """What every patch should be: (b, n) int64, or (b, n, values) float32. given: what `needs` says."""
        if self.target == "tokens":
            return given
        if self.target == "features":
            return F.normalize(given.float(), dim=-1)
        return PATCH_FEATURES[self.target](images, self.encoder.patch_size)

    def forward(self, images, tokens=None, order=None):
        """images (b, 3, S, S) normalized, tokens or what `needs` says, order z -> loss, dict of 0-d logs."""
        return self.loss(*self.predict(images, tokens, order))

    def loss(self, prediction, target):
        """Mean over targets. Tokens (b, T): cross-entropy of logits (b, T, K). Values (b, T, values): MSE.

        explained = 1 - MSE / variance: 0 is no better than the batch's mean for every patch, 1 is perfect.
        """
        if self.target != "tokens":
            loss = F.mse_loss(prediction, target)
            variance = target.var((0, 1), unbiased=False).mean()
            return loss, {"explained": 1 - loss.detach() / variance}
        loss = F.cross_entropy(prediction.flatten(0, 1), target.flatten())
        right = prediction.argmax(-1) == target
        return loss, {"accuracy": right.float().mean()}

    def initialize(self, *parts):
        """All parts as the encoder, then the decoder's head anew.

        Ours: a small head, so that an untrained network guesses uniformly, loss ln K.
        """
        for part in parts:
            part.apply(self.encoder.initialize)
        self.decoder[-1].apply(init_weights)

    def before_step(self, progress):
        """Called before each optimizer step; progress: the share of all steps that is done, 0..1."""


def make_decoder(width, depth, heads, values, layer_scale=None, drop_path=0.):
    """Transformer blocks, norm and head: rows (b, m, d) -> (b, m, values)."""
    blocks = [Block(width, heads, 4, layer_scale, rate)
              for rate in drop_rates(drop_path, depth)]
    return nn.Sequential(
        *blocks,
        nn.LayerNorm(width, eps=1e-6),
        nn.Linear(width, values))


# --- MAE, MaskFeat, ClusterMIM ----------------------------------------------------------------------------

class MaskedAutoencoder(Objective):
    """MAE, MaskFeat and ClusterMIM: encode what is visible, decode the rest.

        latent     = encoder([cls ; visible patches + pos])              25 % of the rows: why it is fast
        prediction = decoder([W latent ; mask tokens] + pos)             at the mask tokens; pos of cls is 0
        loss       = MSE(prediction, target)                             MAE, MaskFeat
                   = CE(prediction, t(x))                                ClusterMIM (Sec. 3.2)

    target   "tokens": ClusterMIM, t(x) of a codebook of `size`; "pixel", "pixel-norm" (standardized): MAE;
             "hog": MaskFeat; "features": MaskFeat, rows of `size` values, brought to unit length.
             MaskFeat is the row of ClusterMIM's tables; its own paper has mask tokens in the encoder
    depth    of the decoder; its width is 2/3 of the encoder's, at most MAE's 512, in heads of 32
    The rows stay in the order z: MAE puts them back into raster order first, which attention cannot notice.
    """

    def __init__(self, vit, cut, size=None, target="tokens", depth=8):
        super().__init__(vit, cut, target)
        if not self.needs:
            side = vit.image_size
            size = self.compute_target(torch.zeros(1, 3, side, side)).shape[-1]
        width = min(512, 32 * max(1, vit.width // 48))
        self.decoder_embed = nn.Linear(vit.width, width)
        self.register_buffer(
            "pos", sincos_positions(vit.grid, width, prefix=0),
            persistent=False)
        self.decoder = make_decoder(width, depth, width // 32, size)
        self.initialize(self.decoder_embed, self.decoder)
        self.mask_token = nn.Parameter(.02 * torch.randn(1, 1, width))

    def predict(self, images, tokens=None, order=None):
        """Predictions (b, T, size) at the hidden patches, in the order z, and what they should be."""
        vit = self.encoder
        visible, hidden = self.split(images, order)
        latent = self.decoder_embed(vit.encode(vit.embed(images, visible)))
        masked = self.mask_token.expand(*hidden.shape, -1)
        pos = gather_patches(self.pos, torch.cat([visible, hidden], 1))
        pos = F.pad(pos, (0, 0, vit.prefix, 0))                # the class token's is 0
        x = self.decoder(torch.cat([latent, masked], 1) + pos)
        target = self.compute_target(images, tokens)
        return x[:, -self.num_targets:], gather_patches(target, hidden)


# --- MIM, BEiT, PIM, MaPeT --------------------------------------------------------------------------------

class MaPeT(Objective):
    """MaPeT and its parents: predict the tokens of the patches at or after the cutting point of an order z.

    permute    predicted targets' content is revealed to later ones, in two-stream attention (PIM, MaPeT)
    positions  mask tokens tell where the unseen targets are (MIM, BEiT, MaPeT)

    Rows of the sequence, and who they look at (`two_stream_mask`):
        MIM, BEiT  [cls, visible,          mask tokens]           all see all; the mask tokens are the output
        PIM        [cls, visible, targets,              queries]
        MaPeT      [cls, visible, targets, mask tokens, queries]
    Two parts of MaPeT look at nothing outside themselves: {cls, visible, mask tokens} is MIM's sequence, and
    never learns a target's content; {cls, visible, targets, mask tokens} is the content stream, which never
    sees a query. So the queries are an autoregressive layer on top that reads a MIM forward: the first query
    equals the first mask token in every layer, the k-th asks like one with k - 1 patches revealed.
    """

    def __init__(self, vit, cut, vocab_size, permute=True, positions=True):
        super().__init__(vit, cut)
        self.permute = permute
        self.positions = positions
        self.head = nn.Linear(vit.width, vocab_size)
        self.mask_token = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, 1, vit.width), std=.02))
        self.head.apply(init_weights)
        mask = None
        if permute:
            mask = two_stream_mask(vit.prefix + cut - 1, self.num_targets, positions)
        self.register_buffer("mask", mask, persistent=False)

    def predict(self, images, tokens, order=None):
        """Logits (b, T, K) of the targets in the order z, their tokens (b, T). Queries, too, begin as m_j."""
        vit = self.encoder
        visible, hidden = self.split(images, order)
        unseen = self.mask_token + vit.positions(hidden)       # m_j
        patches = torch.cat([visible, hidden], 1) if self.permute else visible
        rows = [vit.embed(images, patches)]                    # class token and content
        if self.positions:
            rows.append(unseen)                                # mask tokens; MIM asks them
        if self.permute:
            rows.append(unseen)                                # queries, which are never looked at
        n_keys = self.mask.shape[1] if self.permute else None
        x = vit.encode(torch.cat(rows, 1), self.mask, n_keys, n_out=self.num_targets)
        return self.head(x), gather_patches(tokens, hidden)    # Eq. 1, Eq. 2: all ranks i >= c


# --- CAE, a baseline of MaPeT's tables --------------------------------------------------------------------

class RegressorBlock(Block):
    """Cross-attention of CAE's regressor: hidden rows ask, visible and hidden rows answer.

    Positions are added to what queries and keys are made of, before the norms; values carry none. CAE's
    quirk: after the attention the *normalized* sum, norm2(x + ...), goes on, to the MLP and beside it; in a
    ViT block the sum itself.
    """

    def __init__(self, width, *sizes):
        super().__init__(width, *sizes)
        self.norm_k = nn.LayerNorm(width, eps=1e-6)
        self.norm_v = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, visible, pos):
        """Hidden x (b, T, d), visible (b, v, d), positions of the visible, then the hidden -> (b, T, d)."""
        rows = torch.cat([visible, x], 1)
        read = [self.norm1(x + pos[:, visible.shape[1]:]),
                self.norm_k(rows + pos),
                self.norm_v(rows)]
        layer = self.attn.qkv
        qkv = map(F.linear, read, layer.weight.chunk(3), layer.bias.chunk(3))
        qkv_heads = (rearrange(y, "b r (h e) -> b h r e", h=self.attn.heads)
                     for y in qkv)
        branch = F.scaled_dot_product_attention(*qkv_heads)
        branch = self.attn.proj(rearrange(branch, "b h r e -> b r (h e)"))
        x = self.norm2(x + self.drop_path(self.ls1(branch)))
        return x + self.drop_path(self.ls2(self.mlp(x)))


class CAE(Objective):
    """Context Autoencoder (arXiv:2202.03026): guess latents of hidden patches, then their tokens.

        latent = encoder([cls ; visible])             all that the encoder sees
        guess  = regressor(mask tokens | latent)      4 cross-attention blocks
        target = teacher([cls ; hidden])              the encoder one optimizer step before, no gradient
        loss   = CE(decoder(guess + pos), t(x)) + 2 MSE(guess, target)
    So the encoder only encodes: to predict is left to the regressor. All parts are as wide as the encoder,
    with its initialization and stochastic depth. The published one has no bias on keys: it would change no
    attention.
    """

    def __init__(self, vit, cut, vocab_size, depth=4):
        super().__init__(vit, cut)
        width, heads, scale = vit.width, vit.heads, vit.layer_scale
        self.regressor = nn.ModuleList(
            RegressorBlock(width, heads, 4, scale, rate)
            for rate in drop_rates(vit.drop_path, depth))
        self.regressor_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder = make_decoder(width, depth, heads, vocab_size, scale, vit.drop_path)
        self.initialize(self.regressor, self.decoder)
        if vit.initialize is mae_init:                         # CAE draws q, k, v apart, with Xavier's bound
            for block in self.regressor:                       # sqrt(6 / 2d); that of all three: sqrt(6 / 4d)
                block.attn.qkv.weight.data.mul_(math.sqrt(2))
        self.mask_token = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, 1, width), std=.02))
        self.teacher = copy.deepcopy(vit).requires_grad_(False)

    def predict(self, images, tokens, order=None):
        """Logits (b, T, K) of the hidden patches in the order z, their tokens, latents guessed, and true."""
        vit = self.encoder
        visible, hidden = self.split(images, order)
        latent = vit.encode(vit.embed(images, visible))[:, vit.prefix:]
        pos = vit.positions(torch.cat([visible, hidden], 1))
        guess = self.mask_token.expand(*hidden.shape, -1)
        for block in self.regressor:
            guess = block(guess, latent, pos)
        guess = self.regressor_norm(guess)
        logits = self.decoder(guess + vit.positions(hidden))
        teacher = self.teacher.eval()                          # its latents are a target: no stochastic depth
        target = teacher.encode(teacher.embed(images, hidden))[:, vit.prefix:].detach()
        return logits, gather_patches(tokens, hidden), guess, target

    def loss(self, logits, tokens, guess, target):
        loss, logs = super().loss(logits, tokens)
        alignment = F.mse_loss(guess, target)
        return loss + 2 * alignment, {**logs, "alignment": alignment.detach()}

    @torch.no_grad()
    def before_step(self, progress):
        """Keep the weights that this step is about to change: the next step's targets are theirs."""
        self.teacher.load_state_dict(self.encoder.state_dict())


# --- learned tokenizers -----------------------------------------------------------------------------------

class LearnedTokenizer(Objective):
    """Encode all patches, replace each by one of K codes, decode: what stands in the middle is a tokenizer.

        z          = project(encoder([cls ; patches + pos]))     (b, n, size)
        t          = argmin_k ||z - C_k||                        hard: the nearest code
                     argmax_k (W z + b)_k                        soft: the greatest logit
        prediction = decoder(V code + pos)                       hard: code = C_t; soft: see below
        loss       = distance(prediction, target) + what ties codes and z together

    soft        dVAE (DALL-E, arXiv:2102.12092, Sec. 2.1), r rising from 0 to 1 by half a cosine:
                    code = y C, y = softmax((W z + b + Gumbel) / tau), tau = 1 - 15/16 r
                    loss = MSE + r KL(softmax(W z + b) || uniform) / (3 p^2)     (DALL-E: 6.6 KL, Laplace)
    else        VQ-VAE (arXiv:1711.00937, Eq. 3), sg: no gradient, so codes get one of the last term alone:
                    code = z + sg(C_t - z)
                    loss = MSE + ||z - sg C_t||^2 / 4 + ||sg z - C_t||^2
    unit        VQ-KD (BEiT v2, arXiv:2208.06366, Sec. 3.1): z and codes have unit length and 32 values; the
                target is a teacher's features, not pixels
                    loss = 1 - cosine + ||z - sg C_t||^2
                    C_k <- norm(.99 C_k + .01 norm(sum of its z)) each step
    perceptual  PeCo (arXiv:2111.12710, Sec. 3.2): and what a frozen network sees in both should be the same,
                f: normalized images -> (b, rows, d), each row standardized
                    loss = VQ-VAE's + MSE(f(prediction), f(images))       (PeCo: of four of f's layers)
    Ours: a hard code that was not used for `patience` steps takes the z of a patch of one image of the batch,
    in each step until it is used. Where hard codes start: `start_codebook` in train.py.
    """
    patience = 200

    def __init__(self, vit, vocab_size, values, depth=3,
                 soft=False, unit=False, perceptual=None):
        # The cutting point is behind the last patch: nothing is hidden.
        super().__init__(vit, 1 + vit.n_patches, "features" if unit else "pixel")
        self.soft = soft
        self.unit = unit
        self.perceptual = perceptual
        width = vit.width
        size = 32 if unit else min(256, width)
        self.project = nn.Sequential(                          # VQ-KD's
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, size))
        self.codebook = nn.Parameter(
            torch.randn(vocab_size, size),
            requires_grad=not unit)
        self.classify = nn.Linear(size, vocab_size) if soft else nn.Identity()
        self.decoder_embed = nn.Linear(size, width)
        if not unit:
            values = 3 * vit.patch_size ** 2
        self.decoder = make_decoder(width, depth, vit.heads, values)
        self.initialize(self.project, self.classify, self.decoder_embed, self.decoder)
        self.register_buffer("ramp", torch.zeros(()))          # r; a tensor: nothing is compiled anew
        self.register_buffer("idle", torch.zeros(vocab_size))  # steps since a code was used
        # Of one step: the sum of each code's z, and of a 1 beside each z, how many.
        self.register_buffer("sums", torch.zeros(vocab_size, size + 1), persistent=False)

    def encode_patches(self, images):
        """z (b, n, size) float32 of all patches."""
        x = self.encoder(images)[:, self.encoder.prefix:]
        with torch.autocast(images.device.type, enabled=False):
            z = self.project(x.float())
            return F.normalize(z, dim=-1) if self.unit else z

    def linear_layer(self):
        """weight (K, size), bias (K,): the token of z is argmax_k weight_k . z + bias_k.

        The nearest code has the greatest, as ||z - C||^2 = ||z||^2 - 2 (z . C - ||C||^2 / 2).
        """
        if self.soft:
            return self.classify.weight, self.classify.bias
        return self.codebook, -self.codebook.square().sum(-1) / 2

    def quantize(self, z):
        """z (b, n, size) -> code (b, n, size), the part of the loss that ties both, tokens (b, n)."""
        logits = F.linear(z, *self.linear_layer())
        tokens = logits.argmax(-1)
        code = self.codebook[tokens]
        if self.soft:
            if self.training:                                  # a mixture of codes while it learns
                tau = 1 - 15 / 16 * self.ramp
                code = F.gumbel_softmax(logits, tau) @ self.codebook
            log_q = logits.log_softmax(-1)
            kl = math.log(len(self.codebook)) + (log_q.exp() * log_q).sum(-1).mean()
            loss = self.ramp * kl / (3 * self.encoder.patch_size ** 2)       # of a pixel's value, as the MSE
        else:
            loss = F.mse_loss(z, code.detach())                # commitment
            if not self.unit:
                loss = .25 * loss + F.mse_loss(code, z.detach())
            code = z + (code - z).detach()                     # straight through: the code, with z's gradient
        return code, loss, tokens

    def predict(self, images, given=None, order=None):
        """Prediction (b, n, values), its target, the codes' part of the loss, tokens (b, n), z."""
        z = self.encode_patches(images)
        with torch.autocast(images.device.type, enabled=False):
            code, tie, tokens = self.quantize(z)
        x = self.decoder_embed(code) + self.encoder.positions(None)
        prediction = self.decoder(x).float()
        return prediction, self.compute_target(images, given), tie, tokens, z.detach()

    def loss(self, prediction, target, tie, tokens, z):
        if self.unit:
            error = 1 - F.cosine_similarity(prediction, target, dim=-1).mean()
        else:
            error = F.mse_loss(prediction, target)
        loss = tie + error
        if self.perceptual:
            features = [self.perceptual(unpatchify(x, self.encoder.patch_size)).float()
                        for x in (prediction, target)]
            seen, wanted = (F.layer_norm(x, x.shape[-1:]) for x in features)
            loss += F.mse_loss(seen, wanted)
        self.sums.index_add_(                                  # for `before_step`
            0, tokens.flatten(),
            F.pad(z, (0, 1), value=1.).flatten(0, 1))
        self.example = z[0]                                    # all z of one image
        counts = self.sums[:, -1]
        entropy = torch.special.entr(counts / counts.sum()).sum()
        return loss, {"error": error.detach(), "perplexity": entropy.exp()}

    @torch.no_grad()
    def before_step(self, progress):
        """Codes of unit length follow their z, idle hard ones start anew: the same on every process."""
        self.ramp.fill_((1 - math.cos(math.pi * progress)) / 2)
        if not self.soft:
            if dist.is_initialized():
                dist.all_reduce(self.sums)
                dist.broadcast(self.example, 0)
            if self.unit:                                      # the direction of the sum is that of the mean
                mean = F.normalize(self.sums[:, :-1])          # 0 of codes that were not used: they stay
                self.codebook.copy_(F.normalize(.99 * self.codebook + .01 * mean))
            self.idle += 1
            self.idle *= self.sums[:, -1] == 0
            dead = (self.idle >= self.patience).nonzero()[:, 0]
            self.codebook[dead] = self.example[dead % len(self.example)]     # of equal ones the first is used
        self.sums.zero_()

    def export(self):
        """A tokenizer is a function f and a linear layer: weights (of f: encoder, project), weight, bias."""
        return self.state_dict(), *(x.detach() for x in self.linear_layer())


# --- the objectives by name -------------------------------------------------------------------------------

# What separates the objectives: the class, its arguments, and the share of patches that is hidden by default.
OBJECTIVES = {
    "mae": (MaskedAutoencoder, {"target": "pixel"}, .75),
    "maskfeat": (MaskedAutoencoder, {"target": "hog"}, .75),
    "clustermim": (MaskedAutoencoder, {}, .75),
    "cae": (CAE, {}, .5),
    "beit": (MaPeT, {"permute": False}, 75 / 196),
    "mim": (MaPeT, {"permute": False}, 75 / 196),
    "pim": (MaPeT, {"positions": False}, .75),
    "mapet": (MaPeT, {}, .75),
    "dvae": (LearnedTokenizer, {"soft": True}, 0),
    "vq": (LearnedTokenizer, {}, 0),
    "peco": (LearnedTokenizer, {}, 0),                         # vq, with `perceptual`
    "vqkd": (LearnedTokenizer, {"unit": True}, 0),
}
TARGETS = {"mae": ("pixel", "pixel-norm"), "maskfeat": ("hog", "features")}     # the others predict tokens
BLOCKWISE = "beit", "cae"                                                       # random patches the others
TOKENIZERS = "dvae", "vq", "peco", "vqkd"                                       # or learn them


def make(name, vit, vocab_size=None, cut=None, mask_ratio=None, target=None,
         decoder_depth=None, values=None, perceptual=None):
    """The objective `name` around `vit`, an nn.Module: forward(images, tokens, order=None) -> loss, logs.

    vocab_size       codebook size K; of maskfeat with target="features" the values a patch
    cut, mask_ratio  how much is hidden: the cutting point, class token included, or a share of the patches
    target           mae: "pixel" or "pixel-norm" (each patch standardized); maskfeat: "hog" or "features"
    decoder_depth    of mae, maskfeat, clustermim (8 blocks), tokenizers (3); of cae's two parts (4 each)
    values           of vqkd: a patch's, of its teacher; perceptual: of peco, see `LearnedTokenizer`
    """
    kind, arguments, share = OBJECTIVES[name]
    arguments = dict(arguments)
    if decoder_depth and kind is not MaPeT:
        arguments["depth"] = decoder_depth
    if kind is LearnedTokenizer:
        if cut or mask_ratio:
            raise ValueError(f"{name} hides nothing: it takes no --cut and no --mask-ratio")
        return kind(vit, vocab_size, values, perceptual=perceptual, **arguments)
    if target and name in TARGETS:
        if target not in TARGETS[name]:
            raise ValueError(f"{name} cannot predict {target!r}: choose from {TARGETS[name]}")
        arguments["target"] = target
    n = vit.n_patches
    if mask_ratio is not None:
        share = mask_ratio
    if cut is None:
        cut = 1 + n - round(n * share)
    if not 1 <= cut <= n:
        raise ValueError(f"cutting point {cut} is out of range: with {n} patches it is 1 to {n}")
    model = kind(vit, cut, vocab_size, **arguments)
    model.blockwise = name in BLOCKWISE
    return model


# --- masks and predictions, printed and drawn -------------------------------------------------------------

def show_mask(path, order, cut, permute=True, positions=True):
    """Print who looks at whom for one order of the patches, and draw it as in MaPeT Fig. 2, a PNG.

    A row is named by its group and its patch; blue is content, orange only a position.
    """
    targets = order[cut - 1:]
    groups = ["mask tokens"] if positions else []
    if permute:
        groups = ["targets", *groups, "queries"]
    rows = ["cls"] + [f"v{patch}" for patch in order[:cut - 1]]
    for group in groups:
        rows += [f"{group[0]}{patch}" for patch in targets]
    if permute:
        mask = two_stream_mask(cut, len(targets), positions)
    else:                                                      # MIM: all look at all
        mask = two_stream_mask(len(rows), 0)
    keys = rows[:mask.shape[1]]                                # queries come last
    print("Rows look at keys marked #: v visible, t target (content), m mask token, q query; how many keys")
    print("     ", *[f"{key:>3}" for key in keys])
    for row, marks in zip(rows, mask):
        line = " ".join("  #" if mark else "  ." for mark in marks)
        print(f"{row:>5} {line}   {int(marks.sum())}")
    plt = load_matplotlib()
    if not plt:
        return
    blue, orange = [.19, .41, .68], [.93, .59, .24]
    colors = torch.tensor([orange if key[0] == "m" else blue for key in keys])
    plt.pcolormesh(keys, rows, torch.where(mask[..., None], colors, 1.),
                   edgecolors="silver", linewidth=.5)
    for i, group in enumerate(["visible", *groups]):           # at its last row, a line below
        end = cut + i * len(targets) - .5
        plt.text(len(keys), end - .5, group)
        plt.axhline(end, color="black")
    plt.axis("scaled")
    plt.gca().invert_yaxis()
    save_figure(plt, path)


@torch.no_grad()
def picture_predictions(model, images, mean, std, given=None, looks=None):
    """{label: images (b, 3, S, S) in 0..1} for `vit.draw_rows`: image, visible, predicted, target.

    images, mean, std on the scale 0..1; given: tokens or features as in forward; None: unknown, and no target
    is drawn; looks (K, 3 p^2) in 0..1: what each code looks like. The model is left in evaluation mode.
    """
    p = model.encoder.patch_size
    pixels = patchify(images, p)
    mean, std = (pixels.new_tensor(values).repeat(p * p)       # of a patch's values
                 for values in (mean, std))
    x = unpatchify((pixels - mean) / std, p)
    order = model.draw_order(len(x), device=x.device)
    known = torch.zeros_like(order) if given is None else given
    guess, target = model.eval().predict(x, known, order)[:2]
    if model.needs == "tokens":
        guess, target = looks[guess.argmax(-1)], looks[target]
    elif model.target in ("hog", "features"):                  # in three colors, each paints all of a patch
        target, guess = (colors.repeat(1, 1, p * p)
                         for colors in principal_colors(target, guess))
    else:                                                      # pixel-norm: all of the same contrast
        guess, target = guess * std + mean, target * std + mean
    _, hidden = model.split(x, order)
    if not model.num_targets:                                  # a learned tokenizer rebuilds all patches
        hidden = order.sort(1).values

    def fill(patches):
        place = hidden[..., None].expand_as(patches)
        return unpatchify(pixels.scatter(1, place, patches), p)

    rows = {"image": images}
    if model.num_targets:
        rows["visible"] = fill(torch.full_like(guess, .5))
    rows["predicted"] = fill(guess)
    if given is not None or not model.needs:
        rows["target"] = fill(target)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description="Who looks at whom, and which blocks are hidden.")
    parser.add_argument("objective", choices=["mim", "beit", "pim", "mapet", "cae"])
    parser.add_argument("--patches", type=int, default=6, help="patches in the image (default 6)")
    parser.add_argument("--cut", type=int, default=3,
                        help="cutting point, class token included: C - 1 visible patches (default 3)")
    args = parser.parse_args(argv)
    if not 1 <= args.cut <= args.patches:
        parser.error(f"--cut {args.cut}: with --patches {args.patches} it is 1 to {args.patches}")
    kind, arguments, share = OBJECTIVES[args.objective]
    torch.manual_seed(0)
    if kind is MaPeT:
        order = torch.randperm(args.patches).tolist()
        show_mask(f"runs/masks/{args.objective}.png", order, args.cut, **arguments)
    if args.objective in BLOCKWISE:
        print("It hides blocks of the 14 x 14 patches, marked 1")
        print(blockwise_mask(1, 14, round(196 * share)).view(14, 14).long())


if __name__ == "__main__":
    main()
